"""The WKV ops on the emulated device, with the signatures of rwkv_ext's ops.

    emulator = Emulator(segment_tokens=128)
    y, state_out = emulator.wkv6(r, k, v, w, u, state)     # has gradients: rwkv_ext.testing takes it as an op
    emulator.launches                                      # what ran last, with the bytes it moved
"""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from emulator.build import PLAIN, Variant, build, run
from torch import Tensor

CHUNK = 128  # tokens between saved states
ALIGNMENT = 16  # bytes: of states, and for the chunk kernels of every row


class EmulatorError(RuntimeError):
    """The kernel broke a rule, or a sanitizer found something. The message is what the process wrote."""


class Launch(NamedTuple):
    blocks: int
    threads: int
    shared_bytes: int
    bytes_read: int
    distinct_bytes_read: int  # without repetitions
    bytes_written: int
    kernel: str


class Plan(NamedTuple):
    kernel: str
    segment_tokens: int
    items: int
    workspace_bytes: int


class Saved(NamedTuple):
    chunk_states: Tensor
    scores: Tensor


@cache
def program_of(variant: Variant) -> Path:
    return build(variant)  # looks at every source: once in a process is enough


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def extent(x: Tensor) -> Tensor:
    """Return the memory from x's first element to its last, in one dimension."""
    if x.numel() == 0:
        return x.reshape(-1)
    return x.as_strided((sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1,), (1,))


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Return batch, token and head strides; 0 repeats, as the ops hand them to the kernels."""
    if x.dim() == 4:
        return x.stride()[:3]
    if x.dim() == 3:  # [B, H, N]
        return x.stride(0), 0, x.stride(1)
    return 0, 0, x.stride(0)


def aligned_state(x: Tensor | None) -> Tensor | None:
    """Return a state as the ops hand it on: contiguous, and aligned (a copy if need be)."""
    if x is None or (x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def to_bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


class Problem:
    """One call: settings and tensors, written to a file; results read back."""

    def __init__(self, op, **settings):
        self.lines = [f"op {op}", *(f"{name} {value}" for name, value in settings.items())]
        self.blobs = []
        self.results = []

    def add(self, name, x: Tensor | None, use="in"):
        if x is None:
            return
        memory = extent(x)
        remainder = x.data_ptr() % 256 if use == "in" and x.numel() else 0
        size = memory.numel() * x.element_size()
        words = [name, name_of(x.dtype), use, size, remainder, *(strides_of(x) if x.dim() > 1 else (0, 0, 0))]
        self.lines.append("tensor " + " ".join(map(str, words)))
        if use != "out":
            self.blobs.append(to_bytes(memory))
        if use != "in":
            self.results.append((name, x))

    def write(self, path: Path):
        path.write_bytes("\n".join([*self.lines, "end", ""]).encode() + b"".join(self.blobs))

    def read(self, path: Path) -> dict[str, Tensor]:
        data, results = memoryview(bytearray(path.read_bytes())), {}
        for name, x in self.results:
            size = x.numel() * x.element_size()
            if size:
                x = torch.frombuffer(data[:size], dtype=x.dtype).view(x.shape).clone()
            results[name], data = x, data[size:]
        assert not len(data)
        return results


@dataclass
class Emulator:
    """Settings of the emulated device, and the ops on it.

    kernel: "auto", "chunk" or "recurrent"; segment_tokens: 0 as planned, or a multiple of 128.
    order: which threads, warps and blocks go first: "ascending", "descending" or "random SEED".
    """

    variant: Variant = PLAIN
    program: Path | None = None  # None: built when needed
    kernel: str = "auto"
    segment_tokens: int = 0
    order: str = "ascending"
    multiprocessors: int = 4
    most_shared_bytes: int = 227 * 1024  # of a block
    timeout: float = 600

    def __post_init__(self):
        self.launches: list[Launch] = []
        self.plan: Plan | None = None

    def call(self, problem: Problem) -> dict[str, Tensor]:
        if self.program is None:
            self.program = program_of(self.variant)
        with tempfile.TemporaryDirectory() as folder:
            paths = Path(folder, "problem"), Path(folder, "result")
            problem.write(paths[0])
            done = run(self.variant, self.program, *paths, timeout=self.timeout)
            if done.returncode:
                raise EmulatorError(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
            results = problem.read(paths[1])
        lines = [line.split(" ", 7) for line in done.stdout.splitlines()]
        self.launches = [Launch(*map(int, x[1:7]), x[7]) for x in lines if x[0] == "launch"]
        plans = [Plan(x[1], *map(int, x[2:])) for x in lines if x[0] == "plan"]
        self.plan = plans[0] if plans else None
        return results

    def problem(self, op, like: Tensor, w: Tensor, cu_seqlens) -> tuple[Problem, int, int]:
        """Return a problem without tensors, the number of sequences and that of chunk states."""
        batch, tokens, heads, size = like.shape
        sequences, chunks = batch, batch * -(-tokens // CHUNK)
        if cu_seqlens is not None:
            sequences = len(cu_seqlens) - 1
            chunks = -(-tokens // CHUNK) + sequences - 1
        problem = Problem(
            op,
            shape=f"{batch} {tokens} {heads} {size} {sequences} {chunks}",
            constant_decay=int(w.dim() == 2),
            fp64=int(like.dtype == torch.float64),
            kernel=self.kernel,
            segment_tokens=self.segment_tokens,
            order=self.order,
            multiprocessors=self.multiprocessors,
            most_shared_bytes=self.most_shared_bytes,
        )
        return problem, sequences, chunks

    def aligned(self, x: Tensor | None) -> Tensor | None:
        """Return x as the ops hand it on: unit last stride, and aligned for the chunk kernels (a copy if need be)."""
        if x is None:
            return None
        if x.stride(-1) != 1:
            x = x.contiguous()
        if x.dim() == 4 and self.kernel != "recurrent":
            places = [x.data_ptr(), *(s * x.element_size() for n, s in zip(x.shape[:3], x.stride()) if n > 1)]
            if any(place % ALIGNMENT for place in places):
                x = x.clone(memory_format=torch.contiguous_format)
        return x

    def forward(self, r, k, v, w, u, state=None, cu_seqlens=None, save=True):
        """Return (y, state_out, Saved)."""
        problem, sequences, chunks = self.problem("forward", r, w, cu_seqlens)
        batch, tokens, heads, size = r.shape
        wide = torch.promote_types(r.dtype, torch.float32)
        for name, x in zip("rkvw", (r, k, v, w)):
            problem.add(name, self.aligned(x))
        problem.add("u", self.aligned(u))
        problem.add("state", aligned_state(state))
        problem.add("cu_seqlens", cu_seqlens)
        problem.add("y", torch.empty(r.shape, dtype=r.dtype), "out")
        problem.add("state_out", torch.empty(sequences, heads, size, size, dtype=wide), "out")
        if save:
            problem.add("chunk_states", torch.empty(chunks, heads, size, size, dtype=wide), "out")
            if r.element_size() == 2:
                problem.add("scores", torch.empty(batch, heads, tokens, 16), "out")
        results = self.call(problem)
        saved = Saved(results["chunk_states"], results.get("scores")) if save else None
        return results["y"], results["state_out"], saved

    def backward(self, dy, dstate_out, r, k, v, w, u, saved: Saved, cu_seqlens=None, with_state=True):
        """Return dr, dk, dv, dw, du, dstate (None without a state)."""
        problem, sequences, _ = self.problem("backward", r, w, cu_seqlens)
        wide = torch.promote_types(r.dtype, torch.float32)
        for name, x in zip("rkvw", (r, k, v, w)):
            problem.add(name, self.aligned(x))
        problem.add("u", self.aligned(u))
        problem.add("dy", self.aligned(dy))
        problem.add("dstate_out", aligned_state(dstate_out))
        problem.add("cu_seqlens", cu_seqlens)
        problem.add("chunk_states", saved.chunk_states)
        problem.add("scores", saved.scores)
        for name, x in zip(("dr", "dk", "dv", "dw", "du"), (r, k, v, w, u)):
            problem.add(name, torch.empty(x.shape, dtype=x.dtype), "out")
        if with_state:
            problem.add("dstate", torch.empty(sequences, r.shape[2], r.shape[3], r.shape[3], dtype=wide), "out")
        results = self.call(problem)
        return (*(results[name] for name in ("dr", "dk", "dv", "dw", "du")), results.get("dstate"))

    def summary(self, k, v, w, cu_seqlens=None):
        """Return (decay [S, H, N], state [S, H, N, N])."""
        problem, sequences, _ = self.problem("summary", k, w, cu_seqlens)
        return self.summarise(problem, sequences, zip("kvw", (k, v, w)), cu_seqlens, k, True)

    def adjoint_summary(self, r, w, dy, cu_seqlens=None):
        """Return dstate [S, H, N, N]."""
        problem, sequences, _ = self.problem("adjoint_summary", r, w, cu_seqlens)
        return self.summarise(problem, sequences, zip(("r", "dy", "w"), (r, dy, w)), cu_seqlens, r, False)[1]

    def summarise(self, problem, sequences, tensors, cu_seqlens, like, with_decay):
        _, _, heads, size = like.shape
        wide = torch.promote_types(like.dtype, torch.float32)
        for name, x in tensors:
            problem.add(name, self.aligned(x))
        problem.add("cu_seqlens", cu_seqlens)
        if with_decay:
            problem.add("decay", torch.empty(sequences, heads, size, dtype=wide), "out")
        problem.add("state", torch.empty(sequences, heads, size, size, dtype=wide), "out")
        results = self.call(problem)
        return results.get("decay"), results["state"]

    def step(self, r, k, v, w, u, state, slots=None):
        """Return y, and the state after the step (the ops change it in place)."""
        batch, heads, size = r.shape
        problem = Problem(
            "step",
            shape=f"{batch} 1 {heads} {size} {len(state)} 0",
            constant_decay=int(w.dim() == 2),
            fp64=int(r.dtype == torch.float64),
            order=self.order,
        )
        for name, x in zip("rkvwu", (r, k, v, w, u)):
            problem.add(name, x)
        problem.add("slots", slots)
        problem.add("y", torch.empty(r.shape, dtype=r.dtype), "out")
        problem.add("state", state, "inout")
        results = self.call(problem)
        return results["y"], results["state"]

    def wkv6(self, r, k, v, w, u, state=None, cu_seqlens=None):
        """Return (y, state_out), with gradients."""
        return _Wkv.apply(self, r, k, v, w, u, state, cu_seqlens)

    wkv5 = wkv6


class _Wkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, emulator, r, k, v, w, u, state, cu_seqlens):
        save = any(ctx.needs_input_grad)
        y, state_out, saved = emulator.forward(r, k, v, w, u, state, cu_seqlens, save)
        ctx.emulator, ctx.saved, ctx.with_state = emulator, saved, state is not None
        ctx.save_for_backward(r, k, v, w, u, cu_seqlens)
        ctx.set_materialize_grads(False)
        return y, state_out

    @staticmethod
    def backward(ctx, dy, dstate_out):
        r, k, v, w, u, cu_seqlens = ctx.saved_tensors
        grads = ctx.emulator.backward(dy, dstate_out, r, k, v, w, u, ctx.saved, cu_seqlens, ctx.with_state)
        return None, *grads, None
