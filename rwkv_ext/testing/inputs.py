"""Inputs for WKV ops: six regimes of decays, memory layouts, packing, any dtype; the same numbers on every machine."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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


def normal(shape, generator):
    """Return a standard normal tensor in fp64."""
    return torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device)


def _typical(shape, generator):
    base = torch.linspace(-6, 1, shape[-1], dtype=torch.float64, device=generator.device)
    return base + 0.5 * normal(shape, generator)


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

    def drawn(*shape):
        return normal(shape, generator)

    r, k, v = (place(drawn(batch, tokens, heads, size), dtype) for _ in range(3))
    w_shape = (heads, size) if version == "5.2" else (batch, tokens, heads, size)
    w = place(decay_regimes[regime](w_shape, generator), parameter_dtype or wide)
    u = place(drawn(heads, size), parameter_dtype or wide)
    initial = place(drawn(sequences, heads, size, size), wide) if state else None
    return WkvInputs(r, k, v, w, u, initial, cu_seqlens)
