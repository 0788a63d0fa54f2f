"""Block: one layer of the model, a time mix and a channel mix, each on the layer-normed residual stream."""

from torch import Tensor, nn

from .channel_mix import ChannelMix
from .config import EAGLE, RWKVConfig
from .residual_norm import ResidualNorm
from .time_mix import EagleTimeMix, FinchTimeMix
from .token_shift import Packing


class Block(nn.Module):
    """x + TimeMix(ln1(x)), then x + ChannelMix(ln2(x)); the first block also normalises the embedding (ln0).

    What a sub-module adds to the stream stays apart from it until the next norm takes both.
    """

    def __init__(self, config: RWKVConfig, layer: int):
        super().__init__()
        self.ln1 = ResidualNorm(config.n_embd)
        self.ln2 = ResidualNorm(config.n_embd)
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.is_first = layer == 0
        self.att = EagleTimeMix(config) if config.version == EAGLE else FinchTimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        att_shift: Tensor | None,
        wkv: Tensor | None,
        ffn_shift: Tensor | None,
        packing: Packing | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Map the residual stream x + delta [B, T, D], delta None for zeros; return both parts and the new state."""
        if self.is_first:
            x = self.ln0(x)
        x, h = self.ln1(x, delta)
        delta, att_shift, wkv = self.att(h, att_shift, wkv, packing)
        x, h = self.ln2(x, delta)
        delta, ffn_shift = self.ffn(h, ffn_shift, packing)
        return x, delta, att_shift, wkv, ffn_shift

    def step(self, x: Tensor, att_shift: Tensor, wkv: Tensor, ffn_shift: Tensor) -> Tensor:
        """Map one token's x [B, D] and update the three states in place."""
        if self.is_first:
            x = self.ln0(x)
        x, h = self.ln1(x)
        x, h = self.ln2(x, self.att.step(h, att_shift, wkv))
        return x + self.ffn.step(h, ffn_shift)
