"""Tools for testing a WKV kernel against rwkv_ext.reference, here or in a port of your own.

    inputs = make_inputs("6.0", batch=2, tokens=257, heads=3, size=64, regime="resets", dtype=torch.bfloat16)
    exact = outputs_and_gradients(reference.wkv6, inputs.double())
    plain = outputs_and_gradients(reference.wkv6, inputs)
    assert_close_ratio(outputs_and_gradients(my_wkv6, inputs), exact, plain)

Every op here has the signature of rwkv_ext.wkv6. Errors are relative root-mean-square errors, one per named tensor,
judged in fp64 and against the error that plain PyTorch makes in the same dtype: no tolerance has to be guessed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GRADIENTS = ("dr", "dk", "dv", "dw", "du", "dstate")


class WkvInputs(NamedTuple):
    """The arguments of wkv5 or wkv6 in their order: call op(*inputs)."""

    r: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    u: Tensor
    state: Tensor | None
    cu_seqlens: Tensor | None

    def double(self) -> "WkvInputs":
        """Return the same values in fp64, where exactness is judged."""
        return WkvInputs(*(x if x is None else x.double() for x in self[:6]), self.cu_seqlens)


def _uniform(low, high):
    def make(shape, generator):
        x = torch.empty(shape, dtype=torch.float64, device=generator.device)
        return x.uniform_(low, high, generator=generator)

    return make


def _normal(shape, generator):
    return torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device)


def _typical(shape, generator):
    base = torch.linspace(-6, 1, shape[-1], dtype=torch.float64, device=generator.device)
    return base + 0.5 * _normal(shape, generator)


def _sprinkled(fraction, rare, usual):
    def make(shape, generator):
        w, strong = usual(shape, generator), rare(shape, generator)
        chosen = torch.rand(shape, generator=generator, device=generator.device) < fraction
        chosen.view(-1)[: min(1, chosen.numel())] = True  # a small tensor has a strong decay as well
        return torch.where(chosen, strong, w)

    return make


decay_regimes: dict[str, Callable[[Sequence[int], torch.Generator], Tensor]] = {
    "typical": _typical,
    "mixed": _uniform(-9, 4),
    "near_one": _uniform(-20, -8),
    "near_zero": _uniform(3, 6),
    "resets": _sprinkled(0.05, _uniform(5, 12), _uniform(-8, -3)),
    "huge": _sprinkled(0.02, _uniform(60, 100), _uniform(-4, 0)),
}
"""Makers of the raw decay parameter w, fp64: name -> f(shape, generator). These are where kernels go wrong:

typical: as a trained model has it, a base per channel from -6 to 1, noise of 0.5
mixed: every decay from 0.9999 to 1e-24 side by side
near_one: long memory, sums that must not drift
near_zero: a few decays in a row, or a single one, underflow in fp32
resets: 5 % of the decays erase, or nearly erase, what they multiply
huge: 2 % have exp(w) beyond 1e26, up to inf in fp32
"""


def _strided(x):
    return torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2]


def _offset(x):
    return torch.cat([x.new_full((1,), float("nan")), x.reshape(-1)])[1:].view(x.shape)


layouts: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "strided": _strided,
    "offset": _offset,
    "expanded": lambda x: x[:1].expand_as(x),
}
"""Memory layouts: name -> f(tensor).

transposed: B and H trade places in memory (nothing for [H, N])
strided: the last stride is 2, with NaN between
offset: one element into its storage
expanded: the first row repeated with stride 0; the only one that changes values
"""


def make_inputs(
    version: str,
    batch: int = 1,
    tokens: int = 0,
    heads: int = 1,
    size: int = 64,
    *,
    regime: str = "typical",
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    state: bool = True,
    lengths: Sequence[int] | None = None,
    layout: str = "contiguous",
    device: str | torch.device | None = None,
    seed: int = 0,
) -> WkvInputs:
    """Make reproducible inputs for wkv5 (version "5.2") or wkv6 ("6.0").

    Args:
        batch, tokens, heads, size: B, T, H, N. With lengths, B is 1 and T their sum.
        regime: a name of decay_regimes.
        dtype: of r, k, v. The values are drawn in fp64, so every dtype gets the same ones, rounded.
        parameter_dtype: of w and u; None means float32 (float64 beside float64).
        state: whether there is an initial state, float32 (float64 beside float64).
        lengths: packed sequences of these lengths, 0 allowed: adds cu_seqlens, int64.
        layout: a name of layouts, for all tensors but cu_seqlens.
        device: None means torch's default device. The values do not depend on it.

    Raises:
        ValueError: an unknown version, regime or layout.
    """
    for name, value, known in (
        ("version", version, ("5.2", "6.0")),
        ("regime", regime, decay_regimes),
        ("layout", layout, layouts),
    ):
        if value not in known:
            raise ValueError(f"make_inputs: {name} must be one of {', '.join(known)}, got {value!r}")
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device() if device is None else device
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cu_seqlens = None
    sequences = batch
    if lengths is not None:
        batch, tokens, sequences = 1, sum(lengths), len(lengths)
        cu_seqlens = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(device)

    def place(x, dtype):
        return layouts[layout](x.to(device=device, dtype=dtype))

    def normal(*shape):
        return _normal(shape, generator)

    r, k, v = (place(normal(batch, tokens, heads, size), dtype) for _ in range(3))
    w_shape = (heads, size) if version == "5.2" else (batch, tokens, heads, size)
    w = place(decay_regimes[regime](w_shape, generator), parameter_dtype or wide)
    u = place(normal(heads, size), parameter_dtype or wide)
    initial = place(normal(sequences, heads, size, size), wide) if state else None
    return WkvInputs(r, k, v, w, u, initial, cu_seqlens)


def outputs_and_gradients(
    op: Callable,
    inputs: WkvInputs,
    *,
    gradients: Sequence[str] = GRADIENTS,
    cotangents: Sequence[str] = ("y", "state_out"),
    seed: int = 1,
) -> dict[str, Tensor]:
    """Run op forward and backward and return y, state_out and the wanted gradients by name.

    Args:
        gradients: which inputs require one: any of dr, dk, dv, dw, du, dstate (dstate only where there is a state).
        cotangents: which outputs the loss uses. Their gradients are reproducible and about normal, with so few digits
            that every dtype holds them exactly: a run in fp64 judges the same problem. A gradient that autograd does
            not reach from there is zeros.
    """
    wanted = [f"d{name}" in gradients and x is not None for name, x in zip(inputs._fields, inputs, strict=True)]
    leaves = WkvInputs(*(x.detach().requires_grad_() if need else x for x, need in zip(inputs, wanted, strict=True)))
    results = dict(zip(("y", "state_out"), op(*leaves), strict=True))
    generator = torch.Generator("cpu").manual_seed(seed)
    used = []
    for name, x in results.items():
        cotangent = (_normal(x.shape, generator) * 32).round().clamp(-127, 127).div(32).to(x)
        if name in cotangents and x.requires_grad:
            used.append((x, cotangent))
    sources = {f"d{name}": x for name, x in leaves._asdict().items() if x is not None and x.requires_grad}
    results |= {name: torch.zeros_like(x) for name, x in sources.items()}
    if used:
        roots, seeds = zip(*used, strict=True)
        grads = torch.autograd.grad(roots, list(sources.values()), seeds, materialize_grads=True)
        results |= zip(sources, grads, strict=True)
    return {name: x.detach() for name, x in results.items()}


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


def assert_close_ratio(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor] | None = None,
    *,
    floor: float | None = None,
    limit: float = 0.005,
) -> None:
    """Compare named tensors by error_ratio and raise AssertionError with every tensor's ratio when one is too large.

    Args:
        actual: what the kernel gave.
        expected: the fp64 truth; the names must be the same.
        baseline: the same tensors from plain PyTorch in the kernel's dtype; the kernel may err twice as much.
        floor: added to what is allowed; None means 4 eps of the tensor's dtype.
        limit: the most that is ever allowed beside the floor, whatever the baseline does.
    """
    if set(actual) != set(expected):
        raise AssertionError(f"expected tensors {sorted(expected)}, got {sorted(actual)}")
    lines, failed = [], []
    for name, x in actual.items():
        ratio = error_ratio(x, expected[name])
        allowed = 4 * torch.finfo(x.dtype).eps if floor is None else floor
        if baseline is not None:
            allowed += min(2 * error_ratio(baseline[name], expected[name]), limit)
        lines.append(f"{name}: error ratio {ratio:.2e}, allowed {allowed:.2e}")
        if not ratio <= allowed:
            failed.append(name)
            lines[-1] += f"  <-- {list(x.shape)} {x.dtype}"
    if failed:
        raise AssertionError(f"too inexact: {', '.join(failed)}\n" + "\n".join(lines))


def gradcheck_wkv(op: Callable, inputs: WkvInputs, *, fast_mode: bool = False) -> None:
    """Compare op's gradients of every input, from y and state_out, with finite differences in fp64.

    Takes T N calls of op for every input; use fast_mode (random projections) for more than a few hundred elements.

    Raises:
        ValueError: inputs are not fp64.
        torch.autograd.gradcheck.GradcheckError: the gradients differ.
    """
    if inputs.r.dtype != torch.float64:
        raise ValueError(f"gradcheck_wkv: inputs must be float64, got {inputs.r.dtype}; use inputs.double()")
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:6] if x is not None]

    def run(*tensors):
        state = tensors[5] if inputs.state is not None else None
        y, state_out = op(*tensors[:5], state, inputs.cu_seqlens)
        return y, state_out

    torch.autograd.gradcheck(run, leaves, fast_mode=fast_mode)
