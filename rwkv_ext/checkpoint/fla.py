"""The names, layouts and config.json of flash-linear-attention's rwkv6 models: Finch alone, in both directions.

Low-rank factors lie transposed there, as nn.Linear has them, and the five mixing vectors in the order r, w, k, v, g
instead of the official w, k, v, r, g. That library has one norm_eps for all norms and no place for a tuned initial
state: see docs/checkpoints.md.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.config import FINCH, RWKVConfig
from . import official
from .tensors import Recipe, Translated

# official -> theirs, the same tensor
_OUTSIDE = {
    "emb.weight": "model.embeddings.weight",
    "blocks.0.ln0.weight": "model.layers.0.pre_norm.weight",
    "blocks.0.ln0.bias": "model.layers.0.pre_norm.bias",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_SAME = {
    "ln1.weight": "attn_norm.weight",
    "ln1.bias": "attn_norm.bias",
    "ln2.weight": "ffn_norm.weight",
    "ln2.bias": "ffn_norm.bias",
    "att.time_faaaa": "attn.bonus",
    "att.receptance.weight": "attn.r_proj.linear.weight",
    "att.key.weight": "attn.k_proj.linear.weight",
    "att.value.weight": "attn.v_proj.linear.weight",
    "att.gate.weight": "attn.g_proj.linear.weight",
    "att.output.weight": "attn.o_proj.weight",
    "att.ln_x.weight": "attn.g_norm.weight",
    "att.ln_x.bias": "attn.g_norm.bias",
    "ffn.key.weight": "ffn.key.linear.weight",
    "ffn.receptance.weight": "ffn.receptance.linear.weight",
    "ffn.value.weight": "ffn.value.weight",
}
# [1, 1, D] <-> [D]
_VECTORS = {
    "att.time_maa_x": "attn.x_proj.0.mu",
    "att.time_decay": "attn.w_proj.linear.lora.2.bias",
    "ffn.time_maa_k": "ffn.key.mu",
    "ffn.time_maa_r": "ffn.receptance.mu",
}
# [in, out] <-> [out, in]
_TRANSPOSED = {
    "att.time_decay_w1": "attn.w_proj.linear.lora.0.weight",
    "att.time_decay_w2": "attn.w_proj.linear.lora.2.weight",
}
_MIXING_IN, _MIXING_OUT, _MIXING = "attn.x_proj.0.linear.weight", "attn.x_proj.2.weight", "attn.x_bias"
_THEIR_ORDER = "rwkvg"
_TO_THEIRS = ["wkvrg".index(x) for x in _THEIR_ORDER]
_TO_OFFICIAL = [_THEIR_ORDER.index(x) for x in "wkvrg"]

NORM_NOTE = (
    "flash-linear-attention has one norm_eps, 1e-5, for all norms, but these models' head norms need 64e-5: after "
    "loading there, set g_norm.eps = 64e-5 in every layer's attn"
)

# Axes that a tensor must have before its layout can be translated at all; 5 marks an axis of five groups.
_AXES = {_MIXING_IN: ("5", ""), _MIXING_OUT: ("", "5"), _MIXING: ("5", "")}
_AXES |= {name: ("",) for name in _VECTORS.values()} | {name: ("", "") for name in _TRANSPOSED.values()}


def infer_config(path: object, tensors: Mapping[str, Tensor]) -> RWKVConfig:
    """See official.infer_config."""
    if not any(_MIXING_IN in name for name in tensors):
        seven = any(".attn.r_k" in name or ".attn.x_r" in name for name in tensors)
        found = "an RWKV-7 model" if seven else f"another one (no {_MIXING_IN}), with {', '.join(list(tensors)[:3])}"
        raise ValueError(
            f"from_pretrained: {path} must be an rwkv6 (Finch) model of flash-linear-attention, got {found}"
        )
    for name, x in tensors.items():
        axes = _AXES.get(name.split(".", 3)[-1] if ".layers." in name else name)
        if axes and (x.dim() != len(axes) or any(x.shape[i] % 5 for i, axis in enumerate(axes) if axis)):
            needed = ", ".join("a multiple of 5" if axis else "any size" for axis in axes)
            raise ValueError(f"from_pretrained: {path} must have {name} as [{needed}], got {list(x.shape)}")
    return official.infer_config(path, to_official(tensors), file_name)


def file_name(name: str) -> str:
    """Return what these files call the tensor of an official name (or the one that it is a part of)."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if not match:
        return name
    theirs = _SAME | _VECTORS | _TRANSPOSED | {"att.time_maa_w1": _MIXING_IN, "att.time_maa_w2": _MIXING_OUT}
    theirs |= {f"att.time_maa_{x}": _MIXING for x in _THEIR_ORDER}
    return f"model.layers.{match[1]}.{theirs.get(match[2], match[2])}"


def to_official(tensors: Mapping[str, Tensor]) -> Translated:
    """Return a file's tensors under their official names, in the official layout."""
    recipes = {ours: Recipe((theirs,), _same) for ours, theirs in _OUTSIDE.items()}
    for layer in _layers(tensors, r"model\.layers\.(\d{1,9})\."):
        for ours, recipe in _layer_to_official().items():
            sources = tuple(f"model.layers.{layer}.{source}" for source in recipe.sources)
            recipes[f"blocks.{layer}.{ours}"] = Recipe(sources, recipe.make)
    return _available(tensors, recipes)


def from_official(tensors: Mapping[str, Tensor]) -> Translated:
    """Return a Finch model's tensors under the files' names, in their layout.

    Raises ValueError where they have no place for what the model has.
    """
    if any(name.endswith("time_state") for name in tensors):
        raise ValueError(
            "save_pretrained: format fla must be given a model without a tuned initial state, got one with "
            "att.time_state, which flash-linear-attention does not have; use another format"
        )
    recipes = {theirs: Recipe((ours,), _same) for ours, theirs in _OUTSIDE.items()}
    for layer in _layers(tensors, r"blocks\.(\d+)\."):
        for theirs, recipe in _layer_from_official().items():
            sources = tuple(f"blocks.{layer}.{source}" for source in recipe.sources)
            recipes[f"model.layers.{layer}.{theirs}"] = Recipe(sources, recipe.make)
    return _available(tensors, recipes)


def _layers(tensors: Mapping[str, Tensor], pattern: str) -> list[int]:
    return sorted({int(match[1]) for name in tensors if (match := re.match(pattern, name))})


def _available(tensors: Mapping[str, Tensor], recipes: dict[str, Recipe]) -> Translated:
    here = {name: recipe for name, recipe in recipes.items() if all(source in tensors for source in recipe.sources)}
    return Translated(tensors, here)


def _layer_to_official() -> dict[str, Recipe]:
    recipes = {ours: Recipe((theirs,), _same) for ours, theirs in _SAME.items()}
    recipes |= {ours: Recipe((theirs,), lambda x: x.reshape(1, 1, -1)) for ours, theirs in _VECTORS.items()}
    recipes |= {ours: Recipe((theirs,), torch.t) for ours, theirs in _TRANSPOSED.items()}
    for row, which in enumerate(_THEIR_ORDER):
        recipes[f"att.time_maa_{which}"] = Recipe((_MIXING,), lambda x, row=row: x[row].reshape(1, 1, -1))
    recipes["att.time_maa_w1"] = Recipe((_MIXING_IN,), lambda x: _ordered(_groups(x), _TO_OFFICIAL).flatten(0, 1).t())
    recipes["att.time_maa_w2"] = Recipe((_MIXING_OUT,), lambda x: _ordered(_groups(x.t()), _TO_OFFICIAL))
    return recipes


def _layer_from_official() -> dict[str, Recipe]:
    recipes = {theirs: Recipe((ours,), _same) for ours, theirs in _SAME.items()}
    recipes |= {theirs: Recipe((ours,), torch.flatten) for ours, theirs in _VECTORS.items()}
    recipes |= {theirs: Recipe((ours,), torch.t) for ours, theirs in _TRANSPOSED.items()}
    parts = tuple(f"att.time_maa_{which}" for which in _THEIR_ORDER)
    recipes[_MIXING] = Recipe(parts, lambda *vectors: torch.stack([x.flatten() for x in vectors]))
    recipes[_MIXING_IN] = Recipe(("att.time_maa_w1",), lambda x: _ordered(_groups(x.t()), _TO_THEIRS).flatten(0, 1))
    recipes[_MIXING_OUT] = Recipe(("att.time_maa_w2",), lambda x: _ordered(x, _TO_THEIRS).flatten(0, 1).t())
    return recipes


def _same(x: Tensor) -> Tensor:
    return x


def _groups(x: Tensor) -> Tensor:
    """Map [5 R, D] to [5, R, D]."""
    return x.unflatten(0, (5, -1))


def _ordered(groups: Tensor, order: list[int]) -> Tensor:
    return torch.stack([groups[i] for i in order])


def settings(config: RWKVConfig) -> dict[str, object]:
    """Return config.json. gate_low_rank_dim is the decay's rank, whatever its name says."""
    if config.version != FINCH:
        raise ValueError(
            "save_pretrained: format fla must be given a Finch (6.0) model, got an Eagle (5.2) one, which "
            "flash-linear-attention does not have; use another format"
        )
    ratio = config.dim_att / config.n_embd
    return {
        "architectures": ["RWKV6ForCausalLM"],
        "model_type": "rwkv6",
        "attn": None,
        "attn_mode": "chunk",
        "hidden_size": config.n_embd,
        "expand_k": ratio,
        "expand_v": ratio,
        "hidden_ratio": 3.5,
        "intermediate_size": config.dim_ffn,
        "num_hidden_layers": config.n_layer,
        "num_heads": config.n_head,
        "proj_low_rank_dim": config.mix_rank,
        "gate_low_rank_dim": config.decay_rank,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "vocab_size": config.vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }


# What must agree with the tensors, or with the equations, wherever a file says it.
CHECKED = (
    "attn", "hidden_size", "expand_k", "expand_v", "intermediate_size", "num_hidden_layers", "num_heads",
    "proj_low_rank_dim", "gate_low_rank_dim", "hidden_act", "norm_first", "norm_bias", "norm_eps", "vocab_size",
    "tie_word_embeddings",
)  # fmt: skip
