"""The ways of computing WKV-6 whose errors bench_numerics compares, each as a function of inputs.

A way returns what testing.outputs_and_gradients does: y, state_out and the gradients by name, from both outputs.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_ext import reference, wkv6
from rwkv_ext.testing import WkvInputs, outputs_and_gradients

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 64


class Way(NamedTuple):
    name: str
    dtype: torch.dtype
    run: Callable[[WkvInputs], dict[str, torch.Tensor]]


def log_cumsum(r, k, v, w, u, state, cu_seqlens=None):
    """Chunks of 64 tokens by differences of cumulative log decays, as most chunked kernels do; autograd's gradients.

    The decay from token j to i is exp(L_i - L_j), L the cumulative sum of log w = -exp(w) from the chunk's start.
    """
    dtype, wide = r.dtype, torch.promote_types(r.dtype, torch.float32)
    r, k, v = (x.to(wide).transpose(1, 2) for x in (r, k, v))  # [B, H, T, N]
    log_w = -torch.exp(w.to(wide)).transpose(1, 2)
    y = []
    for first in range(0, r.shape[2], CHUNK):
        ri, ki, vi, log_wi = (x[:, :, first : first + CHUNK] for x in (r, k, v, log_w))
        until = log_wi.cumsum(2)  # the token's own decay included
        before = until - log_wi
        exponent = before[:, :, :, None] - until[:, :, None]  # [B, H, i, j, N]
        later = torch.ones(exponent.shape[2:4]).tril(-1).bool()[:, :, None]
        pairs = torch.exp(exponent.masked_fill(~later, float("-inf")))
        scores = torch.einsum("bhin,bhjn,bhijn->bhij", ri, ki, pairs)
        now = (ri * u.to(wide)[:, None] * ki).sum(-1, keepdim=True) * vi
        y.append((ri * torch.exp(before)) @ state + scores @ vi + now)
        last = until[:, :, -1:]
        state = torch.exp(last).mT * state + (ki * torch.exp(last - until)).mT @ vi
    return torch.cat(y, 2).transpose(1, 2).to(dtype), state


def emulated():
    """Return the CUDA kernels' own source, run on the CPU."""
    sys.path.insert(0, str(ROOT / "tests"))
    from emulator.ops import Emulator

    emulator = Emulator()
    return lambda inputs: outputs_and_gradients(emulator.wkv6, inputs)


def fla(python: Path, op: str, dots: str = "tf32"):
    """Return flash-linear-attention's kernels in Triton's interpreter, run by another environment's Python."""

    def run(inputs):
        given = {name: x for name, x in inputs._asdict().items() if x is not None}
        cotangents = {}
        outputs_and_gradients(lambda *x: keep_cotangents(cotangents, *wkv6(*x)), inputs)
        with tempfile.TemporaryDirectory() as folder:
            paths = Path(folder, "in.pt"), Path(folder, "out.pt")
            torch.save(given | cotangents, paths[0])
            program = ROOT / "benchmarks" / "fla_interpreter.py"
            done = subprocess.run([python, program, *paths, "--op", op, "--dots", dots], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"bench_numerics: {program.name} failed: {done.stderr[-2000:]}")
            results = torch.load(paths[1])
        results.pop("about")
        return results

    return run


def keep_cotangents(kept: dict, y, state_out):
    """Catch the gradients that come into y and state_out, so that every way gets the same ones."""
    y, state_out = y * 1, state_out * 1
    y.register_hook(lambda g: kept.update(dy=g))
    state_out.register_hook(lambda g: kept.update(dstate_out=g))
    return y, state_out


def cpu_ways(dtype: torch.dtype) -> list[Way]:
    plain = {"rwkv_ext, CPU": wkv6, "PyTorch loop": reference.wkv6, "log-cumsum form": log_cumsum}
    return [Way(name, dtype, lambda inputs, op=op: outputs_and_gradients(op, inputs)) for name, op in plain.items()]


def ways(fla_python: Path | None, with_emulator: bool) -> list[Way]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found = cpu_ways(fp32)
    if with_emulator:
        kernels = emulated()
        found += [Way("rwkv_ext, CUDA kernels", dtype, kernels) for dtype in (fp32, bf16, fp16)]
    if fla_python:
        found += [Way("FLA chunk", dtype, fla(fla_python, "chunk")) for dtype in (fp32, bf16)]
        found += [Way("FLA recurrent", fp32, fla(fla_python, "recurrent"))]
    return found
