"""Token shift: every token's predecessor, across a carried state and the boundaries of packed sequences.

Shapes: h [B, T, D] the (layer-normed) input of a sub-module; last [B or nseq, D] its value at the token before.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layer_registration import has_layer_ops
from ..matrix_product import linear


class Packing(NamedTuple):
    """Where packed sequences begin and end, computed once per forward pass and used by every layer.

    cu_seqlens      [nseq + 1] boundaries, as given by the user
    previous_index  [T] row of cat(last, h) that holds each token's predecessor
    last_index      [nseq] row of cat(last, h) that holds each sequence's newest token
    """

    cu_seqlens: Tensor
    previous_index: Tensor
    last_index: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, n_tokens: int) -> "Packing":
        """Index a row of n_tokens tokens cut at cu_seqlens; shapes depend on shapes alone, so graphs can be captured.

        Values of cu_seqlens that are no valid boundaries are clamped here, and reported by the wkv op.
        """
        n_sequences = cu_seqlens.numel() - 1
        positions = torch.arange(n_tokens, device=cu_seqlens.device)
        # right=True finds the last sequence that starts at or before a token, hence skips empty ones.
        sequence = torch.searchsorted(cu_seqlens.to(torch.int64), positions, right=True) - 1
        sequence = sequence.clamp(0, n_sequences - 1)
        starts, ends = cu_seqlens[:-1].to(torch.int64), cu_seqlens[1:].to(torch.int64)
        is_first = starts[sequence] == positions
        previous_index = torch.where(is_first, sequence, n_sequences + positions - 1)
        own = torch.arange(n_sequences, device=cu_seqlens.device)
        last_index = torch.where(ends > starts, n_sequences + ends - 1, own).clamp(0, n_sequences + n_tokens - 1)
        return cls(cu_seqlens, previous_index, last_index)


def shift_tokens(h: Tensor, last: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Return (previous [B, T, D], newest [B or nseq, D]): each token's predecessor, and what to carry onwards.

    last None means zeros. Differentiable in h and last. An empty sequence carries `last` through.
    """
    if packing is None:
        padded = F.pad(h, (0, 0, 1, 0)) if last is None else torch.cat([last.to(h.dtype).unsqueeze(1), h], 1)
        # A copy: the view would keep all T tokens of every layer alive until the end of the forward pass.
        return padded[:, :-1], padded[:, -1].clone()
    if last is None:
        last = h.new_zeros(packing.last_index.numel(), h.shape[-1])
    rows = torch.cat([last.to(h.dtype), h[0]])
    return rows.index_select(0, packing.previous_index).unsqueeze(0), rows.index_select(0, packing.last_index)


class TokenShift:
    """The tokens of a sub-module together with their predecessors, to be mixed in any proportion."""

    def __init__(self, h: Tensor, last: Tensor | None, packing: Packing | None = None):
        self.h, self.packing = h, packing
        self.last = None if last is None else last.to(h.dtype)

    def mix(self, weights: Tensor, low: Tensor | None = None, up: Tensor | None = None, weighs_current: bool = False):
        """Return C tensors [B, T, D]: h + (previous - h) w_c, or previous + (h - previous) w_c if weighs_current.

        weights [C, D]; w_c is weights[c], plus low[:, :, c] up[c] where given, low [B, T, C, R] and up [C, R, D].
        """
        if weights.dtype != self.h.dtype:  # of another precision than the activations: the sums stay in fp32
            weights = weights.float()
        if not has_layer_ops(self.h):
            return self._plain_mix(weights.to(self.h.dtype), low, up, weighs_current)
        proportions: Sequence[Tensor] = ()
        if low is not None and (low.dtype == torch.float32 or torch.is_grad_enabled()):
            # One product each: fp32 ones go to oneDNN, and the gradients need not be put together again.
            proportions = [linear(factor, matrix.t()) for factor, matrix in zip(low.unbind(2), up, strict=True)]
        elif low is not None:
            product = torch.bmm(low.flatten(0, 1).transpose(0, 1), up.to(low.dtype))
            proportions = product.unflatten(1, self.h.shape[:2]).unbind(0)
        bounds = None if self.packing is None else self.packing.cu_seqlens
        return torch.ops.rwkv_ext.shift_mix(self.h, self.last, weights, proportions, bounds, weighs_current)

    def newest(self) -> Tensor:
        """Return what to carry onwards [B or nseq, D]: each sequence's newest token, or `last` where it has none."""
        h, last = self.h, self.last
        if last is None:
            n_sequences = h.shape[0] if self.packing is None else self.packing.last_index.numel()
            last = h.new_zeros(n_sequences, h.shape[2])
        if not h.shape[1]:
            return last.clone()
        if self.packing is None:
            return h[:, -1].clone()  # a view would keep all T tokens of every layer alive until the forward pass ends
        row = self.packing.last_index - last.shape[0]
        return torch.where((row < 0).unsqueeze(1), last, h[0].index_select(0, row.clamp(min=0)))

    @cached_property
    def _previous(self) -> Tensor:
        return shift_tokens(self.h, self.last, self.packing)[0]

    @cached_property
    def _difference(self) -> Tensor:
        return self._previous - self.h

    def _plain_mix(self, weights, low, up, weighs_current):
        if weighs_current:
            return [torch.lerp(self._previous, self.h, weight) for weight in weights]
        if low is not None:
            # One batched product gives all vectors, [C, B * T, D].
            weights = torch.baddbmm(weights.unsqueeze(1), low.flatten(0, 1).transpose(0, 1), up.to(low.dtype))
            weights = weights.unflatten(1, self.h.shape[:2])
        return [torch.addcmul(self.h, self._difference, weight) for weight in weights.unbind(0)]
