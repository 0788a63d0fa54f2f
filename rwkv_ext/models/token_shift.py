"""Token shift: every token's predecessor, across a carried state and the boundaries of packed sequences.

Shapes: h [B, T, D] the (layer-normed) input of a sub-module; last [B or nseq, D] its value at the token before.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
