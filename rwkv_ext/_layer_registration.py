"""What the dispatcher must know about a layer's CPU ops beside their kernels: fake (shapes) and autograd.

The schemas are in csrc/ops.cpp. These ops are private: losses.py and models/ call them on CPU tensors, where the plain
PyTorch form of the same function, which other devices run, is what they are tested against.
"""

import torch

from . import _load


def has_layer_ops(x: torch.Tensor) -> bool:
    """Tell whether the ops of this file can take x: a CPU tensor, and the op library is built."""
    return x.is_cpu and _load.error is None


def _cross_entropy_rows_fake(logits, targets, l2wrap, overwrite):
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


def _register():
    torch.library.register_fake("rwkv_ext::cross_entropy_rows", _cross_entropy_rows_fake)


if _load.error is None:
    _register()
