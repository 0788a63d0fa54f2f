"""Judging what a WKV op gave: relative rms errors, by tensor and by the strength of the decay."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from .inputs import WkvInputs

# Bins of the log of the decay, -exp(w), for decay_bins; the last one underflows in 16 bits, and its end in fp32.
DECAY_BINS = ((-1, 0), (-3, -1), (-6, -3), (-12, -6), (-40, -12), (-math.inf, -40))
_JUDGED = 64  # elements of a bin that make its error a statistic


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Return rms(actual - expected) / rms(expected), computed in fp64; 0 for empty tensors.

    Where expected is inf or NaN, actual must be the same; otherwise the ratio is inf. What underflows in actual's
    dtype, or in the arithmetic behind it (fp32, or fp64 for fp64), is no error.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"error_ratio: actual must have shape {list(expected.shape)}, got {list(actual.shape)}")
    arithmetic, stored = torch.finfo(torch.promote_types(actual.dtype, torch.float32)), torch.finfo(actual.dtype)
    underflow = arithmetic.smallest_normal + stored.smallest_normal * stored.eps
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    finite = expected.isfinite()
    same = torch.isclose(actual[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True).all()
    if not same or not actual[finite].isfinite().all():
        return float("inf")
    error = ((actual - expected)[finite].abs() - underflow).clamp_min(0).norm().item()
    scale = expected[finite].norm().item()
    return 0.0 if error == 0 else float("inf") if scale == 0 else error / scale


def decay_bins(w: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (bin, mask of w's shape) for every bin of the decay exp(-exp(w)) that has elements, weak decays first."""
    log_decay = -torch.exp(w.detach().double())
    for low, high in DECAY_BINS:
        here = (log_decay > low) & (log_decay <= high)
        if low == -math.inf:
            here |= log_decay == low
        if here.any():
            yield f"({math.exp(low):.2g}, {math.exp(high):.2g}]", here


def assert_close_ratio(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor] | None = None,
    *,
    floor: float | None = None,
    limit: float = 0.005,
    inputs: WkvInputs | None = None,
) -> None:
    """Compare named tensors by error_ratio and raise AssertionError with every tensor's ratio when one is too large.

    Args:
        actual: what the kernel gave.
        expected: the fp64 truth; the names must be the same.
        baseline: the same tensors from plain PyTorch in the kernel's dtype; the kernel may err twice as much.
        floor: added to what is allowed; None means 4 eps of the tensor's dtype.
        limit: the most that is ever allowed beside the floor, whatever the baseline does.
        inputs: what the kernel was given. Then dr, dk and dw (with one decay per channel also du, dstate and
            state_out) must be as exact in every bin of the decay of at least 64 elements, and the message has the
            errors by bin: a ratio over all elements is blind to gradients that are small because the decay is strong.
    """
    if set(actual) != set(expected):
        raise AssertionError(f"expected tensors {sorted(expected)}, got {sorted(actual)}")
    lines, failed = [], []

    def judge(name, part):
        """Return the error ratio of a part of a tensor, and what is allowed."""
        x, truth = actual[name][part], expected[name][part]
        allowed = 4 * torch.finfo(x.dtype).eps if floor is None else floor
        if baseline is not None:
            allowed += min(2 * error_ratio(baseline[name][part], truth), limit)
        return error_ratio(x, truth), allowed

    for name, x in actual.items():
        ratio, allowed = judge(name, ...)
        lines.append(f"{name}: error ratio {ratio:.2e}, allowed {allowed:.2e}")
        if not ratio <= allowed:
            failed.append(name)
            lines[-1] += f"  <-- {list(x.shape)} {x.dtype}"
    if inputs is not None:
        lines += _table_by_decay(inputs, {name: x.shape for name, x in actual.items()}, judge, failed)
    if failed:
        raise AssertionError(f"too inexact: {', '.join(failed)}\n" + "\n".join(lines))


def _table_by_decay(
    inputs: WkvInputs, shapes: Mapping[str, torch.Size], judge: Callable, failed: list[str]
) -> list[str]:
    """Return the lines of a table of errors by decay, and add what is too large to failed."""
    decays = {name: w for name, shape in shapes.items() if (w := _decay_parameter(inputs, name, shape)) is not None}
    cells: dict[str, dict[str, str]] = {}  # bin -> name -> text
    counts: dict[str, list[str]] = {}
    for name, w in decays.items():
        for label, here in decay_bins(w):
            ratio, allowed = judge(name, here)
            is_off = here.sum() >= _JUDGED and not ratio <= allowed
            cells.setdefault(label, {})[name] = f"{ratio:.1e}{'!' if is_off else ' '}"
            counts.setdefault(label, []).append(str(int(here.sum())))
            if is_off and name not in failed:
                failed.append(f"{name} where the decay is in {label}")
    lines = ["error ratio by decay exp(-exp(w)), ! is more than allowed:"]
    lines.append(f"{'decay':20}{'elements':>10}" + "".join(f"{name:>11} " for name in decays).rstrip())
    for label, row in cells.items():
        errors = "".join(f"{row.get(name, ''):>12}" for name in decays)
        lines.append(f"{label:20}{counts[label][0]:>10}{errors}".rstrip())
    return lines


def _decay_parameter(inputs: WkvInputs, name: str, shape: torch.Size) -> Tensor | None:
    """Return w for every element of a tensor of key channels; None where an element has no decay of its own."""
    if 0 in shape:
        return None
    if name in ("dr", "dk", "dw") and inputs.w.dim() == 4:
        return inputs.w
    if inputs.w.dim() == 2:  # one decay per channel
        if name in ("dr", "dk", "dw", "du"):
            return inputs.w.expand(shape)
        if name in ("state_out", "dstate"):
            return inputs.w.unsqueeze(-1).expand(shape)
    return None
