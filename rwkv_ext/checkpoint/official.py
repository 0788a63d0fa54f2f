"""The names of the official .pth files, which are RWKV's own: names and shapes of every size, and sizes from them."""

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from ..models.config import EAGLE, FINCH, RWKVConfig


def shapes(config: RWKVConfig, time_state: bool = False) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all tensors of a model, in the order of RWKV(config).state_dict()."""
    vocab, width, att, ffn = config.vocab_size, config.n_embd, config.dim_att, config.dim_ffn
    heads, size = config.n_head, config.head_size
    if config.version == EAGLE:
        mixing = {f"att.time_mix_{x}": (1, 1, width) for x in "kvrg"} | {"att.time_decay": (heads, size)}
        channel = "ffn.time_mix_"
    else:
        mixing = {f"att.time_maa_{x}": (1, 1, width) for x in "xwkvrg"}
        mixing |= {"att.time_maa_w1": (width, 5 * config.mix_rank), "att.time_maa_w2": (5, config.mix_rank, width)}
        mixing |= {"att.time_decay": (1, 1, att)}
        mixing |= {"att.time_decay_w1": (width, config.decay_rank), "att.time_decay_w2": (config.decay_rank, att)}
        channel = "ffn.time_maa_"
    block = _norm("ln1", width) | _norm("ln2", width) | mixing | {"att.time_faaaa": (heads, size)}
    if time_state:
        block["att.time_state"] = (heads, size, size)
    block |= {f"att.{name}.weight": (att, width) for name in ("receptance", "key", "value")}
    block |= {"att.output.weight": (width, att), "att.gate.weight": (att, width)} | _norm("att.ln_x", att)
    block |= {f"{channel}k": (1, 1, width), f"{channel}r": (1, 1, width), "ffn.key.weight": (ffn, width)}
    block |= {"ffn.receptance.weight": (width, width), "ffn.value.weight": (width, ffn)}
    result = {"emb.weight": (vocab, width)}
    for layer in range(config.n_layer):
        for name, shape in block.items():
            result[f"blocks.{layer}.{name}"] = shape
            if layer == 0 and name == "ln2.bias":
                result |= _norm("blocks.0.ln0", width)
    return result | _norm("ln_out", width) | {"head.weight": (vocab, width)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def infer_config(
    path: object, tensors: Mapping[str, Tensor], shown: Callable[[str], str] = lambda name: name
) -> RWKVConfig:
    """Derive version, sizes and ranks from names and shapes; ValueError naming what else the file holds.

    shown turns an official name into the one that the file has, for messages.
    """
    version = detect_version(path, tensors)
    first = "blocks.0."
    dims = {"emb.weight": 2, f"{first}att.time_faaaa": 2, f"{first}att.key.weight": 2, f"{first}ffn.key.weight": 2}
    if version == FINCH:
        dims |= {f"{first}att.time_maa_w1": 2, f"{first}att.time_decay_w1": 2}
    wrong = [
        f"{shown(name)} with {axes} axes ({'missing' if name not in tensors else list(tensors[name].shape)})"
        for name, axes in dims.items()
        if name not in tensors or tensors[name].dim() != axes
    ]
    if wrong:
        raise ValueError(f"from_pretrained: {path} must have the tensors that tell its sizes, lacks {', '.join(wrong)}")
    ranks = {}
    if version == FINCH:
        ranks["mix_rank"] = tensors[f"{first}att.time_maa_w1"].shape[1] // 5
        ranks["decay_rank"] = tensors[f"{first}att.time_decay_w1"].shape[1]
    vocab_size, n_embd = tensors["emb.weight"].shape
    n_layer = _count_layers(path, tensors)
    try:
        return RWKVConfig(
            version=version,
            vocab_size=vocab_size,
            n_layer=n_layer,
            n_embd=n_embd,
            head_size=tensors[f"{first}att.time_faaaa"].shape[1],
            dim_att=tensors[f"{first}att.key.weight"].shape[0],
            dim_ffn=tensors[f"{first}ffn.key.weight"].shape[0],
            **ranks,
        )
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path} must have the sizes of an Eagle or Finch model: {error}") from error


def _count_layers(path: object, tensors: Mapping[str, Tensor]) -> int:
    layers = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d{1,9})\.", name))}
    absent = next(layer for layer in range(len(layers) + 1) if layer not in layers)
    if absent != len(layers):
        raise ValueError(
            f"from_pretrained: {path} must have every layer, has layer {max(layers)} but no layer {absent}; "
            "a part of it may be missing: download it again"
        )
    return len(layers)


def detect_version(path: object, tensors: Mapping[str, Tensor]) -> str:
    """Return "5.2" or "6.0"; ValueError naming the version or kind of file found otherwise."""

    def has(part: str) -> bool:
        return any(part in name for name in tensors)

    found = None
    if has("att.r_k") or has("att.x_r"):
        found = "an RWKV-7 model"
    elif has("att.gate_w1"):
        found = "an RWKV-6.0a model (att.gate_w1)"
    elif has("time_maa_rkvw_w1"):
        found = "an RWKV-6.0b or 6.0c model (time_maa_rkvw_w1)"
    elif tensors and all(name.endswith("att.time_state") for name in tensors):
        found = (
            "a tuned initial state alone (time_state); load its base model, and give this file as time_state=, "
            "or to load_time_state()"
        )
    elif {"att_shift", "wkv", "ffn_shift"} <= set(tensors):
        found = "the state of a text; load it with RWKVState.load"
    elif has("lora_A") or has("lora_B"):
        found = "a LoRA adapter; merge it into its base model's file"
    elif not has("emb.weight") or not has("blocks.0."):
        found = f"tensors that are not RWKV's, such as {', '.join(list(tensors)[:3]) or 'none at all'}"
    elif has("time_maa"):
        return FINCH
    elif not has("att.ln_x"):
        found = "an RWKV-4 or older model (no att.ln_x)"
    elif not has("att.gate.weight"):
        found = "an RWKV-5.0 model (no att.gate)"
    else:
        decay = tensors.get("blocks.0.att.time_decay")
        if decay is not None and decay.dim() == 2 and decay.shape[1] > 1:
            return EAGLE
        shape = "none" if decay is None else list(decay.shape)
        found = f"an RWKV-5.1 model (one decay per head: att.time_decay {shape})"
    raise ValueError(f"from_pretrained: {path} must be an Eagle (5.2) or Finch (6.0) model, got {found}")


def check_names_and_shapes(
    path: object, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = "exactly one model"
) -> None:
    """Compare with what there should be; ValueError that lists every missing, extra and misshaped tensor."""
    problems = [f"missing {name} {list(x.shape)}" for name, x in expected.items() if name not in tensors]
    for name, x in tensors.items():
        if name not in expected:
            problems.append(f"extra {name} {list(x.shape)}")
        elif x.shape != expected[name].shape:
            problems.append(f"{name} must be {list(expected[name].shape)}, got {list(x.shape)}")
        if not x.is_floating_point():
            problems.append(f"{name} must be floating point, got {x.dtype}")
    if problems:
        raise ValueError(
            f"from_pretrained: {path} must hold {what}; {len(problems)} wrong tensors:\n  " + "\n  ".join(problems)
        )


def to_official(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors: the counterpart of what huggingface.py and fla.py do."""
    return tensors


def from_official(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors."""
    return tensors
