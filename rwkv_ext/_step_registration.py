"""What the dispatcher must know about rwkv5_step and rwkv6_step beside their kernel: fake (shapes) and vmap.

The schemas are in csrc/ops.cpp, the caller is models/fused_step.py.
"""

from functools import partial

import torch

from . import _load
from ._registration import refuse

HEAD = 4  # the place of head.weight [V, D] in `weights`: csrc/decode_prepare.h reads it there


def _fake(op, x, weights, scales, att_shift, wkv, ffn_shift, slots):
    if x.dim() != 2:
        raise ValueError(f"{op}: x must have 2 dimensions [B, D], got {list(x.shape)}")
    if len(weights) <= HEAD:
        raise ValueError(f"{op}: weights must be a whole model's, got {len(weights)} tensors")
    return x.new_empty(x.shape[0], weights[HEAD].shape[0])


if _load.error is None:
    for _op in ("rwkv5_step", "rwkv6_step"):
        torch.library.register_fake(f"rwkv_ext::{_op}", partial(_fake, _op))
        torch.library.register_vmap(f"rwkv_ext::{_op}", refuse(_op, "torch.vmap is", "give it a batch axis B instead"))
