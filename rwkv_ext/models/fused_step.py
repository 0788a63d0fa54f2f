"""FusedStep: one token through a whole model as one op on the CPU, torch.ops.rwkv_ext.rwkv5_step and rwkv6_step.

RWKV._plain_step is what it computes, one torch operator at a time; here everything between the weights and the state
is fp32, and the weights are read once for all rows. Results are bitwise the same for any number of threads and of rows.
"""

import torch
from torch import Tensor, nn

from .. import _load, _step_registration  # noqa: F401  (the second registers the ops' fakes)
from .._registration import with_torchs_errors
from .block import Block
from .channel_mix import ChannelMix
from .config import EAGLE, RWKVConfig
from .projection import Projection, TokenEmbedding
from .quantized import QuantizedProjection
from .residual_norm import ResidualNorm
from .state import RWKVState
from .time_mix import EagleTimeMix, FinchTimeMix, HeadNorm

_MODEL = ("blocks.0.ln0.weight", "blocks.0.ln0.bias", "ln_out.weight", "ln_out.bias", "head.weight")
_NORMS = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")
_EAGLE_MIXING = tuple(f"att.time_mix_{x}" for x in "kvrg") + ("att.time_decay",)
_FINCH_MIXING = (
    *(f"att.time_maa_{x}" for x in "xwkvrg"),
    *("att.time_maa_w1", "att.time_maa_w2", "att.time_decay", "att.time_decay_w1", "att.time_decay_w2"),
)
_ATTENTION = (
    "att.time_faaaa",
    *(f"att.{x}.weight" for x in ("receptance", "key", "value", "output", "gate")),
    *("att.ln_x.weight", "att.ln_x.bias"),
)
_CHANNEL = ("ffn.key.weight", "ffn.receptance.weight", "ffn.value.weight")

_GROUP = 8  # rows that one call takes: kMaxDecodeBatch of csrc/decode_params.h
# With more rows than these, matrix products by torch are faster; int8 ones have to be widened for it, which takes long.
MAX_BATCH, MAX_QUANTIZED_BATCH = 8, 32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight_names(config: RWKVConfig) -> list[str]:
    """Return the names of all the weights of a step in the order in which csrc/decode_prepare.h reads them."""
    eagle = config.version == EAGLE
    mixing = "time_mix_" if eagle else "time_maa_"
    layer = _NORMS + (_EAGLE_MIXING if eagle else _FINCH_MIXING) + _ATTENTION
    layer += (f"ffn.{mixing}k", f"ffn.{mixing}r", *_CHANNEL)
    return [*_MODEL, *(f"blocks.{i}.{name}" for i in range(config.n_layer) for name in layer)]


# Whose forward the op knows; adapters, parametrizations and the like are others.
_MODULES = (
    *(nn.ModuleList, nn.LayerNorm, ResidualNorm, Block, EagleTimeMix, FinchTimeMix, ChannelMix, HeadNorm),
    *(Projection, QuantizedProjection, TokenEmbedding),
)


class FusedStep:
    """Knows where a model keeps its weights. Made once; it notices a model whose modules have been replaced since."""

    def __init__(self, model: nn.Module):
        name = "rwkv5_step" if model.config.version == EAGLE else "rwkv6_step"
        self._op = getattr(torch.ops.rwkv_ext, name).default
        # Dictionaries and keys instead of tensors: what takes a parameter's place later is found.
        self._weights, self._scales = [], []
        inner = [module for module in model.modules() if module is not model]
        self._hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._children = [module._modules for module in model.modules()]
        self._known_children = [dict(children) for children in self._children]
        self._is_ordinary = all(type(module) in _MODULES for module in inner)
        if not self._is_ordinary:
            return
        for name in weight_names(model.config):
            path, _, key = name.rpartition(".")
            owner = model.get_submodule(path)
            if isinstance(owner, QuantizedProjection):
                self._weights.append((owner._buffers, "weight"))
                self._scales.append((owner._buffers, "scale"))
            else:
                self._weights.append((owner._parameters, key))

    def knows_the_modules(self) -> bool:
        """Tell whether the model still consists of the modules it had."""
        return self._children == self._known_children

    def fits(self, x: Tensor, state: RWKVState) -> bool:
        """Tell whether the op does what the modules one by one would do with x [B, D] and this state.

        Not on a GPU, in fp64 or under autocast, nor where a module inside the model has a hook or is of another class.
        """
        return (
            self._is_ordinary
            and x.is_cpu
            and x.dtype in _DTYPES
            and x.shape[0] <= (MAX_QUANTIZED_BATCH if self._scales else MAX_BATCH)
            and all(part.is_cpu and part.dtype in _DTYPES for part in state)
            and state.wkv.dtype == torch.float32
            and state.wkv[0, :1].is_contiguous()
            and state.att_shift.stride(-1) == state.ffn_shift.stride(-1) == 1
            and not any(self._hooks)
            and not torch.is_autocast_enabled("cpu")
        )

    def __call__(self, x: Tensor, state: RWKVState) -> Tensor:
        """Return logits [B, V]; update `state` in place."""
        weights, scales = ([tensors[key] for tensors, key in places] for places in (self._weights, self._scales))
        logits = []
        for rows, *parts in zip(x.split(_GROUP), *(part.split(_GROUP, 1) for part in state), strict=True):
            logits.append(with_torchs_errors(self._op, rows, weights, scales, *parts, None))
        # The dispatcher does not count the in-place change; without this autograd would miss a stale saved state.
        for part in state:
            torch.autograd.graph.increment_version(part)
        return logits[0] if len(logits) == 1 else torch.cat(logits)
