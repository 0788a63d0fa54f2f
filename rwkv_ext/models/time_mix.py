"""Time mix: token shift, projections, the wkv recurrence, head norm and gate (arXiv 2404.05892, section 4).

Shapes: h [B, T, D] layer-normed input; r, k, v [B, T, H, N]; y as r; tokens as rows [M, D] with M = B * T;
w the raw decay parameter omega, [B, T, H, N] (Finch) or [H, N] (Eagle); u [H, N]; state [B, H, N(key), N(value)].
Parameter names, shapes and order are those of the released .pth files.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._layer_registration import has_layer_ops
from ..matrix_product import linear
from .config import RWKVConfig
from .projection import Projection
from .token_shift import Packing, TokenShift

# Official Eagle code divides y by 8 and uses 1e-5; 64e-5 on the undivided y, as for Finch, is the same function.
HEAD_NORM_EPS = 64e-5


class HeadNorm(nn.Module):
    """Normalise every head of a token to mean 0, variance 1, then scale and shift per channel, in fp32 or better."""

    def __init__(self, n_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_channels))
        self.bias = nn.Parameter(torch.empty(n_channels))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """Map y [M, H, N] and gate [M, H * N] to norm(y) * silu(gate) [M, H * N] in y's dtype."""
        weight, bias = self.weight, self.bias
        if weight.dtype != y.dtype:
            weight, bias = weight.float(), bias.float()
        if has_layer_ops(y):
            return torch.ops.rwkv_ext.head_norm_gate(y, weight, bias, gate, HEAD_NORM_EPS)
        wide = torch.promote_types(y.dtype, torch.float32)
        # Several times faster on a CPU than group_norm, which is the same function.
        normal = F.layer_norm(y.to(wide), y.shape[-1:], eps=HEAD_NORM_EPS).flatten(1)
        return torch.addcmul(bias.to(wide), normal, weight.to(wide)).to(y.dtype) * F.silu(gate)


class TimeMix(nn.Module):
    """What Eagle and Finch share. A subclass has their differences: parameters, mix() and the recurrence."""

    def __init__(self, config: RWKVConfig):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.head_size
        width, att = config.n_embd, config.dim_att
        self._add_mixing(config)
        self.time_faaaa = nn.Parameter(torch.empty(self.n_head, self.head_size))
        # Present in state-tuned checkpoints alone: [H, N(value), N(key)], the transpose of the recurrence's state.
        self.register_parameter("time_state", None)
        self.receptance = Projection(width, att)
        self.key = Projection(width, att)
        self.value = Projection(width, att)
        self.output = Projection(att, width)
        self.gate = Projection(width, att)
        self.ln_x = HeadNorm(att)

    def forward(
        self, h: Tensor, last: Tensor | None, state: Tensor | None, packing: Packing | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (output [B, T, D], newest h [B or nseq, D], state after the last token); None stands for zeros."""
        shift = TokenShift(h, last, packing)
        r, k, v, g, w = self.mix(shift)
        cu_seqlens = None if packing is None else packing.cu_seqlens
        y, state = self._wkv(r, k, v, w, self._bonus(), state, cu_seqlens)
        return self._project(y.flatten(0, 1), g.flatten(0, 1)).view(h.shape), shift.newest(), state

    def step(self, h: Tensor, last: Tensor, state: Tensor) -> Tensor:
        """Take one token, h [B, D], under no_grad; update last [B, D] and state [B, H, N, N] in place."""
        r, k, v, g, w = self.mix(TokenShift(h.unsqueeze(1), last))
        last.copy_(h)
        r, k, v, g = (x.squeeze(1) for x in (r, k, v, g))
        w = w.squeeze(1) if w.dim() == 4 else w
        return self._project(self._wkv_step(r, k, v, w, self._bonus(), state), g)

    def mix(self, shift: TokenShift) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return r, k, v [B, T, H, N], the gate before silu [B, T, A] and omega ([B, T, H, N] or [H, N], fp32)."""
        raise NotImplementedError

    def _add_mixing(self, config: RWKVConfig) -> None:
        raise NotImplementedError

    def _heads(self, r: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = (self.receptance(r), self.key(k), self.value(v))
        return tuple(x.unflatten(2, (self.n_head, self.head_size)) for x in projected)

    def _bonus(self) -> Tensor:
        return self.time_faaaa.to(torch.promote_types(self.time_faaaa.dtype, torch.float32))

    def _project(self, y: Tensor, g: Tensor) -> Tensor:
        return self.output(self.ln_x(y, g))


class EagleTimeMix(TimeMix):
    """Static mixing vectors, weight 1 meaning the current token alone, and one decay per channel (section 4.1)."""

    _wkv = staticmethod(ops.wkv5)
    _wkv_step = staticmethod(ops.wkv5_step)

    def _add_mixing(self, config: RWKVConfig) -> None:
        for name in ("time_mix_k", "time_mix_v", "time_mix_r", "time_mix_g"):
            setattr(self, name, nn.Parameter(torch.empty(1, 1, config.n_embd)))
        self.time_decay = nn.Parameter(torch.empty(config.n_head, config.head_size))

    def mix(self, shift: TokenShift) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See TimeMix.mix; omega is [H, N]."""
        static = (self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g)
        k, v, r, g = shift.mix(torch.cat(static).flatten(1), weighs_current=True)
        omega = self.time_decay.to(torch.promote_types(self.time_decay.dtype, torch.float32))
        return *self._heads(r, k, v), self.gate(g), omega


class FinchTimeMix(TimeMix):
    """Mixing and decay that depend on the token through low-rank factors (section 4.2).

    The opposite convention to Eagle's: a mixing value of 0 means the current token alone.
    """

    _wkv = staticmethod(ops.wkv6)
    _wkv_step = staticmethod(ops.wkv6_step)

    def _add_mixing(self, config: RWKVConfig) -> None:
        width, rank = config.n_embd, config.mix_rank
        for name in ("x", "w", "k", "v", "r", "g"):
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, width)))
        self.time_maa_w1 = nn.Parameter(torch.empty(width, 5 * rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, rank, width))
        self.time_decay = nn.Parameter(torch.empty(1, 1, config.dim_att))
        self.time_decay_w1 = nn.Parameter(torch.empty(width, config.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, config.dim_att))

    def mix(self, shift: TokenShift) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See TimeMix.mix; omega is [B, T, H, N]: low-rank products in h's dtype, added to time_decay in fp32."""
        (mixed,) = shift.mix(self.time_maa_x.flatten(0, 1))
        low = torch.tanh(linear(mixed, self.time_maa_w1.t())).unflatten(2, (5, -1))
        # The files' order: w, k, v, r, g.
        static = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        w, k, v, r, g = shift.mix(torch.cat(static).flatten(1), low, self.time_maa_w2)
        low_decay = linear(torch.tanh(linear(w, self.time_decay_w1.t())), self.time_decay_w2.t())
        wide = torch.promote_types(self.time_decay.dtype, torch.float32)
        omega = self.time_decay.flatten().to(wide) + low_decay.to(wide)
        return *self._heads(r, k, v), self.gate(g), omega.unflatten(2, (self.n_head, self.head_size))
