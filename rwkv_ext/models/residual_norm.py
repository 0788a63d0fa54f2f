"""ResidualNorm: the layer norm of the residual stream, together with the sum that comes before it."""

import torch
from torch import Tensor, nn

from .._layer_registration import has_layer_ops


class ResidualNorm(nn.LayerNorm):
    """Layer norm over the last axis D of what the stream and the sub-module before it add up to."""

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x + delta, its layer norm), shaped as x [..., D]; delta None stands for zeros.

        The norm comes in x's dtype, or autocast's: what follows then keeps 16-bit tensors for the backward pass.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        fitting = x.dtype in (dtype, torch.float32) and (delta is None or delta.dtype == dtype)
        if fitting and self.bias is not None and has_layer_ops(x):
            op = torch.ops.rwkv_ext.add_layer_norm
            total, normal = op(x, delta, self.weight, self.bias, self.eps, dtype)
            return x if delta is None else total, normal
        if delta is not None:
            x = x + delta
        return x, super().forward(x).to(dtype)
