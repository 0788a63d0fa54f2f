"""Channel mix: token shift and a gated two-layer network with squared ReLU (arXiv 2404.05892, section 4)."""

import torch
from torch import Tensor, nn

from .._layer_registration import has_layer_ops
from .config import EAGLE, RWKVConfig
from .projection import Projection
from .token_shift import Packing, TokenShift


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
        shift = TokenShift(h, last, packing)
        return self._gated(shift), shift.newest()

    def step(self, h: Tensor, last: Tensor) -> Tensor:
        """Take one token, h [B, D], and update last [B, D] in place; return [B, D]."""
        out = self._gated(TokenShift(h.unsqueeze(1), last)).squeeze(1)
        last.copy_(h)
        return out

    def _gated(self, shift: TokenShift) -> Tensor:
        static = torch.cat([getattr(self, self.mixing + name) for name in ("k", "r")]).flatten(1)
        k, r = shift.mix(static, weighs_current=self.weighs_current)
        gate, key = self.receptance(r), self.key(k)
        if has_layer_ops(gate):
            return torch.ops.rwkv_ext.sigmoid_gate(gate, self.value(torch.ops.rwkv_ext.squared_relu(key)))
        return torch.sigmoid(gate) * self.value(torch.relu(key).square())
