"""The smallest case of every CUDA kernel, forward, backward and step, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu_sanitized.py

Lengths are just past a block of 16 and a chunk of 128 tokens; without torch's cache every tensor is an allocation of
its own, so that memcheck sees the first byte past its end. Inputs are made and results judged on the CPU: hardly any
kernel but ours runs.
"""

import argparse

import torch

from rwkv_ext import ops, testing

OPS = {
    "5.2": (ops.wkv5, ops.wkv5_step, ops.wkv5_summary, ops.wkv5_adjoint_summary),
    "6.0": (ops.wkv6, ops.wkv6_step, ops.wkv6_summary, ops.wkv6_adjoint_summary),
}
CASES = [
    dict(batch=2, tokens=33, heads=1, size=64, dtype=torch.bfloat16),
    dict(batch=1, tokens=145, heads=1, size=64, dtype=torch.bfloat16, parameter_dtype=torch.bfloat16),
    dict(batch=1, tokens=49, heads=1, size=32, dtype=torch.float16),
    dict(batch=1, tokens=35, heads=1, size=128, dtype=torch.bfloat16),
    dict(lengths=[17, 0, 130], size=64, dtype=torch.bfloat16),
    dict(batch=1, tokens=1040, heads=1, size=32, dtype=torch.bfloat16),  # several segments
    dict(batch=1, tokens=5, heads=2, size=64, dtype=torch.bfloat16),
    dict(batch=1, tokens=18, heads=1, size=64, dtype=torch.float32),
    dict(batch=1, tokens=18, heads=1, size=32, dtype=torch.float64),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    for version, (op, step, summary, adjoint_summary) in OPS.items():
        for case in CASES:
            inputs = testing.make_inputs(version, **case, device=device)
            results = list(testing.outputs_and_gradients(op, inputs).values())
            r, k, v, w, _, _, cu_seqlens = inputs
            results += [*summary(k, v, w, cu_seqlens), adjoint_summary(r, w, v, cu_seqlens)]
            assert all(x.cpu().isfinite().all() for x in results), case
            if inputs.cu_seqlens is None:
                token = [x[:, 0] if x.dim() == 4 else x for x in inputs[:4]]
                assert step(*token, inputs.u, inputs.state).cpu().isfinite().all(), case
    print(f"{len(OPS) * len(CASES)} cases ran")


if __name__ == "__main__":
    main()
