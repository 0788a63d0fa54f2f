"""The other ways of doing it that bench_gpu times in the same run, each where it can be imported.

A peer turns a case and its inputs into a Run: forward alone, forward and backward, and its errors against the truth.
Where a peer computes another function (attention, a state-space scan), its truth is that function's own plain form.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gpu_upstream
import torch
import torch.nn.functional as F
from gpu_cases import Case
from gpu_check import OPS, OUTPUTS, REFERENCES, Expected, gradients_of

from rwkv_ext.testing import WkvInputs, error_ratio

NAIVE_TOKENS = 512  # beyond, the loop's saved states fill the memory
PREFIX = 256  # tokens of another function's own check


class Run(NamedTuple):
    forward: Callable[[], object]
    train: Callable[[], object]  # forward and backward
    errors: Callable[[Expected], dict[str, float]]


class Peer(NamedTuple):
    name: str
    prepare: Callable[[Case, WkvInputs, torch.Tensor], Run]
    refuses: Callable[[Case], str]  # why it cannot run a case, or ""


def ours(case: Case, inputs: WkvInputs, dy: torch.Tensor) -> Run:
    op = OPS[case.version]
    return _run_of(op, inputs, dy)


def _run_of(op, inputs, dy):
    def forward():
        with torch.no_grad():
            return op(*inputs)

    def train():
        return gradients_of(op, inputs, dy)

    return Run(forward, train, lambda expected: expected.errors(train()))


def _loop(case, inputs, dy):
    return _run_of(REFERENCES[case.version], inputs, dy)


def _fla(op):
    def prepare(case, inputs, dy):
        # The op takes log w; exp(w), which ours computes itself, is not in its times.
        log_w = -torch.exp(inputs.w.float())

        def as_wkv(r, k, v, w, u, state, cu_seqlens):
            return op(r, k, v, w, u, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)

        run = _run_of(as_wkv, inputs._replace(w=log_w), dy)

        def errors(expected):
            results = run.train()
            results["dw"] = results["dw"] * log_w  # with respect to w
            return expected.errors(results)

        return run._replace(errors=errors)

    return prepare


def _attention(case, inputs, dy):
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in inputs[:3])
    dy = dy.transpose(1, 2)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward():
        with torch.no_grad():
            return attend(q, k, v)

    def errors(_):
        prefix = [x[:1, :1, :PREFIX].detach().double() for x in (q, k, v)]
        scores = prefix[0] @ prefix[1].mT / q.shape[-1] ** 0.5
        mask = torch.ones_like(scores).triu(1).bool()
        y = scores.masked_fill(mask, -torch.inf).softmax(-1) @ prefix[2]
        return {"y": error_ratio(forward()[:1, :1, :PREFIX], y)}

    return Run(forward, lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), dy), errors)


def _mamba(case, inputs, dy):
    """The scan of a layer of the same model width: twice the channels, 16 states each."""
    module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    device, dtype = inputs.r.device, case.dtype
    batch, tokens, width, states = case.batch, case.tokens, 2 * case.heads * case.size, 16
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

    x, delta, z = (normal(batch, width, tokens) for _ in range(3))
    b, c = (normal(batch, states, tokens) for _ in range(2))
    skip, bias = (normal(width, dtype=torch.float32) for _ in range(2))
    a = torch.arange(1.0, states + 1, device=device).neg().repeat(width, 1).requires_grad_()
    leaves = (x, delta, a, b, c, skip, z)
    gradient = torch.randn_like(x)

    def scan(*given):
        return module.selective_scan_fn(*given, delta_bias=bias, delta_softplus=True)

    def forward():
        with torch.no_grad():
            return scan(*leaves)

    def errors(_):
        with torch.no_grad():
            prefix = [t[:1, ..., :PREFIX] if t.dim() == 3 else t for t in leaves]
            expected = module.selective_scan_ref(*(t.float() for t in prefix), delta_bias=bias, delta_softplus=True)
            return {"y": error_ratio(forward()[:1, :, :PREFIX], expected)}

    return Run(forward, lambda: torch.autograd.grad(scan(*leaves), leaves, gradient), errors)


def _only(version=None, packed=True, tokens=None):
    def refuses(case):
        if version and case.version != version:
            return "another recurrence"
        if case.lengths and not packed:
            return "no packed sequences"
        if tokens and case.tokens > tokens:
            return f"no more than {tokens} tokens"
        return ""

    return refuses


def find_peers(upstream: Path | None, device: torch.device) -> tuple[list[Peer], list[str]]:
    """Return the peers that are here, and a line for each one that is not."""
    found = [
        Peer("PyTorch loop", _loop, _only(tokens=NAIVE_TOKENS)),
        Peer("PyTorch attention (SDPA)", _attention, _only(packed=False)),
    ]
    missing = []

    def look(what, add):
        try:
            add()
        except Exception as error:  # a peer's import or build may fail in any way: say so, go on without it
            missing.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def fla():
        if device.type != "cuda":
            raise RuntimeError("its Triton kernels need a GPU")
        from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6

        version = importlib.metadata.version("fla-core")
        found.append(Peer(f"FLA {version} chunk", _fla(chunk_rwkv6), _only(version="6.0")))
        found.append(Peer(f"FLA {version} recurrent", _fla(fused_recurrent_rwkv6), _only(version="6.0", tokens=16384)))

    def mamba():
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        found.append(Peer("Mamba selective_scan", _mamba, _only(packed=False)))

    def kernels():
        tokens = 4096
        for version, prepare in gpu_upstream.build(upstream, tokens):
            peer = Peer(f"RWKV-LM wkv{version[0]}", _upstream(prepare), _only(version, packed=False, tokens=tokens))
            found.append(peer)

    look("flash-linear-attention", fla)
    look("mamba-ssm", mamba)
    if upstream:
        look("RWKV-LM's kernels", kernels)
    return found, missing


def _upstream(prepare):
    def run(case, inputs, dy):
        forward, backward = prepare(inputs, dy)

        def train():
            return dict(zip(OUTPUTS, (forward(), *backward()), strict=True))

        return Run(forward, train, lambda expected: expected.errors(train()))

    return run
