"""Cases for the kernels in the emulator, and what they are judged by.

A case is a point in many dimensions (dtype, head size, regime, length, ...). `covering` chooses few of them such that
every pair of values of any two dimensions occurs.

The floor of an output is the error that no kernel of this kind can avoid: that of rounding the result to the output's
dtype and, independent of that, of having read operands as tf32 once. Such an operand is rounded; for dr, dk, dv and dw
it is cut off, because the state and its gradient stay in registers and the hardware itself drops their low bits.
Beside rounding to bf16 (1.7e-3) this is nothing (2e-4, 4e-4), beside rounding to fp16 (2e-4) it counts, and it is all
there is for fp32 results. Twice the floor is allowed, in every bin of the decay for dw. Kernels that compute in fp32 or
fp64 throughout are held to twice the error of the plain PyTorch recurrence in the same dtype.
"""

import itertools
import math
import random
from typing import NamedTuple

import torch

from rwkv_ext import reference, testing
from rwkv_ext.testing import decay_bins, error_ratio

REGIMES = tuple(testing.decay_regimes)
TOKENS = (0, 1, 15, 16, 17, 31, 33, 64, 65, 128, 129, 200, 300)
REFERENCES = {"5.2": reference.wkv5, "6.0": reference.wkv6}
ROUNDING = 0.212  # rms relative error, in eps of the format, of normal numbers rounded to it
TF32_EPS = 2**-10
HALF = (torch.bfloat16, torch.float16)


class Instance(NamedTuple):
    """What is chosen when a kernel is compiled, and which kernel."""

    version: str
    kernel: str  # chunk or recurrent
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    size: int

    def __str__(self):
        types = "-".join(str(x).removeprefix("torch.") for x in (self.dtype, self.parameter_dtype))
        return f"{'eagle' if self.version == '5.2' else 'finch'}-{self.kernel}-{types}-N{self.size}"


class Case(NamedTuple):
    instance: Instance
    regime: str
    tokens: int
    packing: str  # no, int64, int32: cu_seqlens, with empty sequences
    segment_tokens: int  # 0: one segment
    state: bool
    cotangents: tuple[str, ...]
    layout: str

    def __str__(self):
        flags = [f"T{self.tokens}", self.regime, self.layout, "+".join(self.cotangents)]
        flags += [f"packed-{self.packing}"] if self.packing != "no" else []
        flags += [f"segments-{self.segment_tokens}"] if self.segment_tokens else []
        return "-".join([str(self.instance), *flags, "state" if self.state else "zeros"])


def finch(kernel, dtype, parameter_dtype, size):
    return Instance("6.0", kernel, dtype, parameter_dtype, size)


MAIN = finch("chunk", torch.bfloat16, torch.bfloat16, 64)
MAIN_INSTANCES = [  # all of head size 64 in bf16
    Instance(version, "chunk", torch.bfloat16, parameter_dtype, 64)
    for version in ("6.0", "5.2")
    for parameter_dtype in (torch.bfloat16, torch.float32)
]
CHUNK_INSTANCES = [
    Instance(version, "chunk", dtype, parameter_dtype, size)
    for version in ("6.0", "5.2")
    for dtype in HALF
    for parameter_dtype in (dtype, torch.float32)
    for size in (32, 64, 128)
]
RECURRENT_INSTANCES = [
    Instance(version, "recurrent", dtype, parameter_dtype, size)
    for version in ("6.0", "5.2")
    for dtype, parameter_dtype in (
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    )
    for size in (32, 64, 128)
]
DIMENSIONS = {
    "regime": REGIMES,
    "tokens": TOKENS,
    "packing": ("no", "int64", "int32"),
    "segment_tokens": (0, 128, 256),
    "state": (True, False),
    "cotangents": (("y", "state_out"), ("y",), ("state_out",)),
    "layout": ("contiguous", "transposed", "strided", "offset"),
}


def covering(instances, seed=0) -> list[Case]:
    """Return cases such that every two values of two dimensions (the instance is one) meet in at least one of them.

    Greedy: of some random cases around an uncovered pair, the one that covers most comes next.
    """
    chooser = random.Random(seed)
    choices = [list(instances), *map(list, DIMENSIONS.values())]
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(choices)), 2)
        for a in range(len(choices[i]))
        for b in range(len(choices[j]))
    }
    cases = []

    def pairs(row):
        return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}

    while missing:
        i, a, j, b = min(missing)
        tried = []
        for _ in range(20):
            row = [chooser.randrange(len(x)) for x in choices]
            row[i], row[j] = a, b
            tried.append(row)
        best = max(tried, key=lambda row: len(missing & pairs(row)))
        missing -= pairs(best)
        cases.append(Case(*(x[at] for x, at in zip(choices, best))))
    return cases


def lengths_of(tokens: int) -> list[int]:
    """Return the lengths of five sequences, some empty, that have so many tokens together."""
    first = tokens * 2 // 3
    return [0, first, 0, min(1, tokens - first), tokens - first - min(1, tokens - first)]


def inputs_of(case: Case, seed=0) -> testing.WkvInputs:
    instance = case.instance
    inputs = testing.make_inputs(
        instance.version,
        1 if case.packing != "no" else 2,
        case.tokens,
        heads=2,
        size=instance.size,
        regime=case.regime,
        dtype=instance.dtype,
        parameter_dtype=instance.parameter_dtype,
        state=case.state,
        lengths=lengths_of(case.tokens) if case.packing != "no" else None,
        layout=case.layout,
        seed=seed,
    )
    if case.packing == "int32":
        inputs = inputs._replace(cu_seqlens=inputs.cu_seqlens.int())
    return inputs


def floor_of(name: str, dtype: torch.dtype) -> float:
    operand = ROUNDING * TF32_EPS * (2 if name[:2] in ("dr", "dk", "dv", "dw") else 1)
    return math.hypot(ROUNDING * torch.finfo(dtype).eps, operand)


def complaints(case: Case, inputs, actual, exact, plain) -> list[str]:
    """Return what is too inexact: one line per output, empty if all is well."""
    lines = []

    def judge(name, x, truth, allowed):
        ratio = error_ratio(x, truth)
        if not ratio <= allowed:
            lines.append(f"{name}: error ratio {ratio:.2e}, allowed {allowed:.2e}  {list(x.shape)} {x.dtype}")

    if case.instance.kernel == "recurrent":
        for name, x in actual.items():
            # In fp64 there is nothing wider to be exact in: both sides round.
            slack = (5 if x.dtype == torch.float64 else 4) * torch.finfo(x.dtype).eps
            judge(name, x, exact[name], 2 * error_ratio(plain[name], exact[name]) + slack)
        return lines
    named = [(name, x, exact[name]) for name, x in actual.items()]
    if case.instance.version == "6.0" and "dw" in actual:
        dw, truth = actual["dw"], exact["dw"]
        named += [(f"dw where the decay is in {bin}", dw[here], truth[here]) for bin, here in decay_bins(inputs.w)]
    for name, x, truth in named:
        # One element has no statistics: its error may be anything up to the largest rounding error.
        few = torch.finfo(x.dtype if x.dtype in HALF else torch.float16).eps / 2 if x.numel() < 64 else 0.0
        judge(name, x, truth, max(2 * floor_of(name, x.dtype), few))
    return lines
