"""Weight-only int8: matrices as integers with one scale a row, for decoding that is bound by reading the weights.

W[i, j] becomes scale[i] * weight[i, j], weight from -127 to 127 and scale[i] the largest |W[i, :]| / 127, so every
number is within scale[i] / 2 of what it was. Activations, sums, embedding, norms, mixing vectors and low-rank factors
keep their dtypes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.large_pages import copy_in_large_pages
from ..checkpoint.tensors import cast, release
from ..matrix_product import linear
from .projection import Projection

KINDS = ("int8",)
_BLOCK = 1 << 22  # numbers of a weight that are widened at a time: bounds the memory of a product


class QuantizedRows(NamedTuple):
    """A matrix [out, in]: weight int8 [out, in], scale fp32 [out]."""

    weight: Tensor
    scale: Tensor

    @classmethod
    def of(cls, name: str, matrix: Tensor) -> "QuantizedRows":
        """Quantise; ValueError naming the matrix where it holds NaN or infinity, which no integer stands for."""
        scale = _largest(name, matrix) / 127
        integers = matrix.detach() / torch.where(scale > 0, scale, 1).unsqueeze(1)
        integers.round_().clamp_(-127, 127)
        return cls(copy_in_large_pages(integers, torch.int8) if integers.is_cpu else integers.to(torch.int8), scale)


class QuantizedProjection(nn.Module):
    """A Projection with int8 rows. Inference alone: the integers have no gradient, and none is passed on to x."""

    def __init__(self, rows: QuantizedRows):
        super().__init__()
        self.register_buffer("weight", rows.weight)
        self.register_buffer("scale", rows.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out] in x's dtype, a block of rows at a time."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "RWKV: a model with int8 weights cannot be trained, got an input that requires a gradient; load it "
                "without quantize to train it, or run it under torch.no_grad()"
            )
        rows = max(1, _BLOCK // self.weight.shape[1])
        blocks = zip(self.weight.split(rows), self.scale.split(rows), strict=True)
        # Integers / 128 are exact in every dtype, and their sums stay in float16's range; scales go onto the sums.
        parts = [linear(x, weight.to(x.dtype).div_(128)) * (128 * scale).to(x.dtype) for weight, scale in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix [out, in] that this stands for."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.weight.to(wide) * self.scale.to(wide).unsqueeze(1)).to(dtype)

    def _apply(self, fn, recurse=True):
        # Such as .to(torch.bfloat16), which is about activations: the scale stays fp32 and keeps its bits.
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        # torch would cast numbers to integers without a word.
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.dtype != torch.int8:
            errors.append(
                f"{prefix}weight must be int8 with a scale, got {given.dtype}; load it into a model that is not "
                "quantised, then call quantize_()"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f'quantize: kind must be "int8", got {kind!r}')


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedProjection) for module in model.modules())


def quantize_projections(model: nn.Module) -> None:
    """Put a QuantizedProjection in the place of every Projection, one by one; all of them or none."""
    for name, _, _, projection in _projections(model):
        _largest(f"{name}.weight", projection.weight)
    for name, parent, key, projection in _projections(model):
        setattr(parent, key, QuantizedProjection(QuantizedRows.of(f"{name}.weight", projection.weight)))
    model.requires_grad_(False)


def load_quantized(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, device) -> None:
    """Fill a model on the meta device with a checkpoint's tensors, quantised as each is read."""
    matrices = set()
    for name, parent, key, projection in _projections(model):
        matrices.add(f"{name}.weight")
        like = projection.weight
        empty = QuantizedRows(torch.empty_like(like, dtype=torch.int8), torch.empty(like.shape[0], device="meta"))
        setattr(parent, key, QuantizedProjection(empty))
    loaded = {}
    for name in tensors:
        x = cast(name, tensors[name], dtype, device, copy=True)
        if name in matrices:
            loaded[name], loaded[name.removesuffix("weight") + "scale"] = QuantizedRows.of(name, x)
        else:
            loaded[name] = x
        release(tensors, name)
    model.load_state_dict(loaded, assign=True)
    model.requires_grad_(False)


def _largest(name: str, matrix: Tensor) -> Tensor:
    """Return the largest magnitude of every row, fp32."""
    largest = matrix.detach().abs().amax(1).float()
    if not largest.isfinite().all():
        raise ValueError(f"quantize: {name} must be finite, got NaN or infinity; check where the model comes from")
    return largest


def _projections(model: nn.Module) -> list[tuple[str, nn.Module, str, Projection]]:
    return [
        (f"{name}.{key}" if name else key, parent, key, child)
        for name, parent in model.named_modules()
        for key, child in parent.named_children()
        if isinstance(child, Projection)
    ]
