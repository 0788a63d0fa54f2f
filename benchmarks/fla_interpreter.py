"""Run flash-linear-attention's own RWKV-6 kernels, unmodified, on the CPU: in Triton's interpreter.

    python -m venv fla && fla/bin/pip install torch numpy
    fla/bin/pip install --no-deps fla-core==0.6.0 triton==3.9.0 einops==0.8.2 packaging
    fla/bin/python benchmarks/fla_interpreter.py IN.pt OUT.pt --op chunk --dots tf32

IN.pt holds r, k, v, w, u, state, dy and dstate_out, as rwkv_ext.wkv6 names and shapes them; OUT.pt gets y, state_out
and the gradients dr, dk, dv, dw, du and dstate. bench_numerics.py calls this with the Python of that environment.

Four things differ between the interpreter and a GPU and are mended here at run time: bf16 (the interpreter keeps it as
integers and would compute with those), the rounding of fp32 dots to tf32 (Triton's default on a GPU), autotuning (one
configuration, the last) and loop indices (kernels use them as Triton integers).
"""

import argparse
import os
import sys
from importlib.metadata import version

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"

MISSING = (
    "fla_interpreter: {error}; in an environment of its own: pip install torch numpy && "
    "pip install --no-deps fla-core==0.6.0 triton==3.9.0 einops==0.8.2 packaging"
)

try:
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import autotuner, interpreter
except ImportError as error:
    sys.exit(MISSING.format(error=error))

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
LOOPING_MODULES = ("fla.ops.common.chunk_h", "fla.ops.rwkv6.chunk", "fla.ops.gla.chunk")


def is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle):
    """Return the handle in fp32, where it is bf16."""
    if not is_bf16(handle):
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrowed(handle):
    """Return an fp32 handle in bf16, rounded to nearest even."""
    values = torch.from_numpy(np.ascontiguousarray(handle.data, dtype=np.float32))
    return Handle(values.to(torch.bfloat16).view(torch.uint16).numpy(), tl.bfloat16)


def in_fp32(method, operands: int):
    """Let a method of the interpreter compute bf16 operands in fp32 and round what comes out."""

    def compute(self, *arguments):
        handles, rest = arguments[:operands], arguments[operands:]
        if not all(is_bf16(x) for x in handles):
            return method(self, *arguments)
        result = method(self, *(widened(x) for x in handles), *rest)
        return result if result.data.dtype == np.bool_ else narrowed(result)

    return compute


def mend_numbers(tf32_dots: bool) -> None:
    plain_cast, plain_dot = Builder.cast_impl, Builder.create_dot
    plain_convert = Builder.create_fp_to_fp

    def cast(self, source, target):
        if source.dtype.scalar == target.scalar:
            return Handle(source.data, target.scalar)
        if target.scalar == tl.bfloat16:
            return narrowed(source)
        return plain_cast(self, widened(source), target)

    def convert(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        return plain_convert(self, source, target, rounding)

    def dot(self, a, b, sum_, precision, imprecise):
        round_operands = tf32_dots and a.dtype.scalar == tl.float32 and "TF32" in str(precision)
        a, b = widened(a), widened(b)
        if round_operands:
            a, b = (Handle(interpreter._round_f32_to_tf32(x.data), tl.float32) for x in (a, b))
        return plain_dot(self, a, b, sum_, precision, imprecise)

    Builder.binary_op, Builder.unary_op = in_fp32(Builder.binary_op, 2), in_fp32(Builder.unary_op, 1)
    Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot = cast, convert, dot


def mend_autotuning() -> None:
    plain_init = autotuner.Autotuner.__init__

    def init(self, function, names, configurations, *arguments, **options):
        plain_init(self, function, names, configurations[-1:], *arguments, **options)

    autotuner.Autotuner.__init__ = init


def load_ops() -> dict:
    """Import FLA's operators as on a large GPU: what it asks of the hardware only selects tile sizes."""
    sys.modules["fla.layers"] = sys.modules["fla.models"] = None  # optional, and they would need transformers
    import fla.utils
    import fla.utils.hardware

    fla.utils.check_shared_mem = fla.utils.hardware.check_shared_mem = lambda *_, **__: True
    from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6

    def triton_range(*bounds):
        return (interpreter._implicit_cvt(i) for i in range(*(int(x) for x in bounds)))

    for name in LOOPING_MODULES:
        sys.modules[name].range = triton_range
    return {"chunk": chunk_rwkv6, "recurrent": fused_recurrent_rwkv6}


def run(op, given: dict) -> dict:
    """Return outputs and gradients with respect to rwkv_ext's arguments; FLA itself takes log w = -exp(w)."""
    leaves = {name: given[name].detach().requires_grad_() for name in ("r", "k", "v", "u", "state")}
    log_w = (-torch.exp(given["w"].float())).requires_grad_()
    y, state_out = op(
        *(leaves[name] for name in "rkv"),
        log_w,
        leaves["u"],
        scale=1.0,
        initial_state=leaves["state"],
        output_final_state=True,
    )
    torch.autograd.backward((y, state_out), (given["dy"], given["dstate_out"]))
    results = {"y": y.detach(), "state_out": state_out.detach()}
    results |= {f"d{name}": x.grad for name, x in leaves.items()}
    # d/dw = log w d/dlog w, and 0 where that is 0 although log w is -inf
    scale = log_w.detach().double().clamp_min(-torch.finfo(torch.float32).max)
    results["dw"] = torch.where(log_w.grad == 0, 0, scale * log_w.grad.double())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--op", choices=("chunk", "recurrent"), default="chunk")
    parser.add_argument("--dots", choices=("tf32", "ieee"), default="tf32", help="how fp32 dots round their operands")
    options = parser.parse_args()
    np.seterr(all="ignore")
    mend_numbers(options.dots == "tf32")
    mend_autotuning()
    try:
        op = load_ops()[options.op]
    except ImportError as error:
        sys.exit(MISSING.format(error=error))
    results = run(op, torch.load(options.input))
    results["about"] = f"fla-core {version('fla-core')}, triton {version('triton')}, {options.dots} dots"
    torch.save(results, options.output)


if __name__ == "__main__":
    main()
