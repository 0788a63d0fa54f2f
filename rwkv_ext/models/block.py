"""Block: one layer of the model, a time mix and a channel mix, each on the layer-normed residual stream."""

import torch
from torch import Tensor, nn

from .channel_mix import ChannelMix
from .config import EAGLE, RWKVConfig
from .time_mix import EagleTimeMix, FinchTimeMix
from .token_shift import Packing


class Block(nn.Module):
    """x + TimeMix(ln1(x)), then x + ChannelMix(ln2(x)); the first block also normalises the embedding (ln0)."""

    def __init__(self, config: RWKVConfig, layer: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.is_first = layer == 0
        self.att = EagleTimeMix(config) if config.version == EAGLE else FinchTimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(
        self,
        x: Tensor,
        att_shift: Tensor | None,
        wkv: Tensor | None,
        ffn_shift: Tensor | None,
        packing: Packing | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map the residual stream x [B, T, D]; return it and the layer's new state."""
        if self.is_first:
            x = self.ln0(x)
        y, att_shift, wkv = self.att(activation(self.ln1(x)), att_shift, wkv, packing)
        x = x + y
        y, ffn_shift = self.ffn(activation(self.ln2(x)), ffn_shift, packing)
        return x + y, att_shift, wkv, ffn_shift

    def step(self, x: Tensor, att_shift: Tensor, wkv: Tensor, ffn_shift: Tensor) -> Tensor:
        """Map one token's x [B, D] and update the three states in place."""
        if self.is_first:
            x = self.ln0(x)
        x = x + self.att.step(activation(self.ln1(x)), att_shift, wkv)
        return x + self.ffn.step(activation(self.ln2(x)), ffn_shift)


def activation(h: Tensor) -> Tensor:
    """Cast a layer norm's output to the autocast dtype: the sub-modules then keep 16-bit tensors for the backward."""
    if torch.is_autocast_enabled(h.device.type):
        return h.to(torch.get_autocast_dtype(h.device.type))
    return h
