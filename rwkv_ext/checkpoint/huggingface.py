"""The names and config.json of the models RWKV/v5-Eagle-*-HF and RWKV/v6-Finch-*-HF; no tensor is reshaped."""

import re
from collections.abc import Mapping

from torch import Tensor

from ..models.config import EAGLE, RWKVConfig
from . import official
from .tensors import Translated, renamed

_EAGLE_MIXING = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
_LAYER_PARTS = {"att": "attention", "ffn": "feed_forward"}


def file_name(name: str) -> str:
    """Return what these files call the tensor of an official name."""
    if name == "head.weight":
        return name
    name = re.sub(r"^emb\.", "embeddings.", name)
    name = re.sub(r"^blocks\.0\.ln0\.", "blocks.0.pre_ln.", name)
    name = re.sub(r"^(blocks\.\d+)\.(att|ffn)\.", lambda match: f"{match[1]}.{_LAYER_PARTS[match[2]]}.", name)
    name = re.sub(r"\.time_mix_([kvrg])$", lambda match: f".time_mix_{_EAGLE_MIXING[match[1]]}", name)
    return f"rwkv.{name}"


def official_name(name: str) -> str:
    """Return the official name of a tensor of these files; a name that is none of theirs stays what it is."""
    name = name.removeprefix("rwkv.")
    name = re.sub(r"^embeddings\.", "emb.", name)
    name = re.sub(r"^blocks\.0\.pre_ln\.", "blocks.0.ln0.", name)
    name = re.sub(r"^(blocks\.\d+)\.attention\.", r"\1.att.", name)
    name = re.sub(r"^(blocks\.\d+)\.feed_forward\.", r"\1.ffn.", name)
    return re.sub(r"\.time_mix_(key|value|receptance|gate)$", lambda match: f".time_mix_{match[1][0]}", name)


def infer_config(path: object, tensors: Mapping[str, Tensor]) -> RWKVConfig:
    """See official.infer_config."""
    return official.infer_config(path, to_official(tensors), file_name)


def to_official(tensors: Mapping[str, Tensor]) -> Translated:
    """Return a file's tensors under their official names."""
    return renamed(tensors, {official_name(name): name for name in tensors})


def from_official(tensors: Mapping[str, Tensor]) -> Translated:
    """Return a model's tensors under the files' names."""
    return renamed(tensors, {file_name(name): name for name in tensors})


def settings(config: RWKVConfig) -> dict[str, object]:
    """Return config.json. num_attention_heads is left out: in the released files it holds the head size."""
    version = "5" if config.version == EAGLE else "6"
    return {
        "architectures": [f"Rwkv{version}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_rwkv{version}.Rwkv{version}Config",
            "AutoModelForCausalLM": f"modeling_rwkv{version}.Rwkv{version}ForCausalLM",
        },
        "model_type": f"rwkv{version}",
        "hidden_size": config.n_embd,
        "attention_hidden_size": config.dim_att,
        "num_hidden_layers": config.n_layer,
        "head_size": config.head_size,
        "head_size_divisor": 8,
        "intermediate_size": config.dim_ffn,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 6,
        "vocab_size": config.vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }


# What must agree with the tensors, or with the equations, wherever a file says it.
CHECKED = (
    "hidden_size", "attention_hidden_size", "num_hidden_layers", "head_size", "head_size_divisor",
    "intermediate_size", "layer_norm_epsilon", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
