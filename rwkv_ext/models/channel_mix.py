"""Channel mix: token shift and a gated two-layer network with squared ReLU (arXiv 2404.05892, section 4)."""

import torch
from torch import Tensor, nn

from .config import EAGLE, RWKVConfig
from .projection import Projection
from .token_shift import Packing, shift_tokens


class ChannelMix(nn.Module):
    """Map layer-normed h [B, T, D] to [B, T, D]. Eagle and Finch differ in their mixing vectors' meaning alone.

    Eagle's time_mix_* weigh the current token, Finch's time_maa_* the previous one.
    """

    def __init__(self, config: RWKVConfig):
        super().__init__()
        self.weighs_current = config.version == EAGLE
        self.mixing = "time_mix_" if self.weighs_current else "time_maa_"
        for name in ("k", "r"):
            setattr(self, self.mixing + name, nn.Parameter(torch.empty(1, 1, config.n_embd)))
        self.key = Projection(config.n_embd, config.dim_ffn)
        self.receptance = Projection(config.n_embd, config.n_embd)
        self.value = Projection(config.dim_ffn, config.n_embd)

    def forward(self, h: Tensor, last: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """Return (output, newest h [B or nseq, D]); last is the carried h, None for zeros."""
        previous, newest = shift_tokens(h, last, packing)
        return self._gated(h, previous), newest

    def step(self, h: Tensor, last: Tensor) -> Tensor:
        """Take one token, h [B, D], and update last [B, D] in place; return [B, D]."""
        previous = last.to(h.dtype, copy=True)
        last.copy_(h)
        return self._gated(h, previous)

    def _gated(self, h: Tensor, previous: Tensor) -> Tensor:
        start, end = (previous, h) if self.weighs_current else (h, previous)
        k, r = (torch.lerp(start, end, getattr(self, self.mixing + name).flatten().to(h.dtype)) for name in ("k", "r"))
        return torch.sigmoid(self.receptance(r)) * self.value(torch.relu(self.key(k)).square())
