"""The official .pth files (an ordered dict of tensors, BlinkDL names): what they hold, reading and writing them."""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.config import EAGLE, FINCH, RWKVConfig
from .atomic_file import atomic_write

# Left on the names by DeepSpeed, by adapter trainers, and by torch's own wrappers.
_PREFIXES = ("_forward_module.", "_orig_mod.", "module.", "model.")


def read(path: str | os.PathLike) -> tuple[RWKVConfig, dict[str, Tensor]]:
    """Return the sizes of the model in a .pth file and its tensors, memory-mapped, in the file's order and dtype.

    Raises FileNotFoundError, or ValueError where the file is no Eagle or Finch model.
    """
    tensors = _strip_prefixes(path, _load(path))
    return infer_config(path, tensors), tensors


def write(path: str | os.PathLike, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write tensors as `dtype` in their order; whole or not at all, see atomic_write."""
    # A view would bring its whole storage along, hence the clones; without need nothing is copied.
    plain = {name: _compact(cast(name, x.detach(), dtype, "cpu")) for name, x in tensors.items()}
    atomic_write(path, lambda file: torch.save(plain, file), "save_pretrained")


def infer_config(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> RWKVConfig:
    """Derive version, sizes and ranks from names and shapes; ValueError naming what else the file holds."""
    version = detect_version(path, tensors)
    first = "blocks.0."
    shapes = {
        "emb.weight": 2,
        f"{first}att.time_faaaa": 2,
        f"{first}att.key.weight": 2,
        f"{first}ffn.key.weight": 2,
    }
    if version == FINCH:
        shapes |= {f"{first}att.time_maa_w1": 2, f"{first}att.time_decay_w1": 2}
    wrong = [
        f"{name} with {dims} axes ({'missing' if name not in tensors else list(tensors[name].shape)})"
        for name, dims in shapes.items()
        if name not in tensors or tensors[name].dim() != dims
    ]
    if wrong:
        raise ValueError(f"from_pretrained: {path} must have the tensors that tell its sizes, lacks {', '.join(wrong)}")
    vocab_size, n_embd = tensors["emb.weight"].shape
    layers = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    ranks = {}
    if version == FINCH:
        ranks["mix_rank"] = tensors[f"{first}att.time_maa_w1"].shape[1] // 5
        ranks["decay_rank"] = tensors[f"{first}att.time_decay_w1"].shape[1]
    try:
        return RWKVConfig(
            version=version,
            vocab_size=vocab_size,
            n_layer=max(layers) + 1,
            n_embd=n_embd,
            head_size=tensors[f"{first}att.time_faaaa"].shape[1],
            dim_att=tensors[f"{first}att.key.weight"].shape[0],
            dim_ffn=tensors[f"{first}ffn.key.weight"].shape[0],
            **ranks,
        )
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path} must have the sizes of an Eagle or Finch model: {error}") from error


def detect_version(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> str:
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
        found = "a tuned initial state alone (time_state); merge it into its base model's file"
    elif has("lora_A") or has("lora_B"):
        found = "a LoRA adapter; merge it into its base model's file"
    elif has("embeddings.weight"):
        found = "a Hugging Face or FLA checkpoint (embeddings.weight); take the .pth it was made from"
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
    raise ValueError(f"from_pretrained: {path} must be an Eagle (5.2) or Finch (6.0) .pth, got {found}")


def check_names_and_shapes(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Compare with a model's own tensors; ValueError that lists every missing, extra and misshaped one."""
    problems = [f"missing {name} {list(x.shape)}" for name, x in expected.items() if name not in tensors]
    problems += [f"extra {name} {list(x.shape)}" for name, x in tensors.items() if name not in expected]
    problems += [
        f"{name} must be {list(x.shape)}, got {list(tensors[name].shape)}"
        for name, x in expected.items()
        if name in tensors and tensors[name].shape != x.shape
    ]
    problems += [
        f"{name} must be floating point, got {x.dtype}" for name, x in tensors.items() if not x.is_floating_point()
    ]
    if problems:
        raise ValueError(
            f"from_pretrained: {path} must hold exactly one model; {len(problems)} wrong tensors:\n  "
            + "\n  ".join(problems)
        )


def cast(name: str, x: Tensor, dtype: torch.dtype, device: torch.device | str, copy: bool = False) -> Tensor:
    """Return x in dtype on device; ValueError where a finite value would become infinite, as large ones do in fp16."""
    result = x.to(device=device, dtype=dtype, copy=copy)
    if dtype == torch.float16 and x.dtype != dtype and not result.isfinite().all() and x.isfinite().all():
        raise ValueError(
            f"{name} must stay below {torch.finfo(dtype).max:g} to fit float16, got {x.abs().max().item():g}; "
            "use bfloat16 or float32"
        )
    return result


def widest_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the narrowest dtype that holds all tensors exactly: bfloat16 for the released files."""
    widest = None
    for x in tensors.values():
        widest = x.dtype if widest is None else torch.promote_types(widest, x.dtype)
    return widest


def _load(path: str | os.PathLike) -> dict[str, Tensor]:
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise FileNotFoundError(f"from_pretrained: {path} {what}; give the path of a .pth file")
    try:
        # Only torch's zip format can be mapped; files from before 2020 are read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"from_pretrained: {path} must be a .pth file of tensors, got a file torch cannot read as one ({reason}); "
            "it may be truncated or hold something else: download or save it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"from_pretrained: {path} must hold a dict of name -> tensor, got {type(content).__name__}")
    others = [name for name, x in content.items() if not isinstance(name, str) or not isinstance(x, Tensor)]
    if others:
        raise ValueError(
            f"from_pretrained: {path} must hold a dict of name -> tensor alone, got other things under {others[:5]}; "
            "if it is a training checkpoint, save the model's state_dict() by itself"
        )
    return content


def _strip_prefixes(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stripped = {}
    for name, x in tensors.items():
        short = name
        while prefix := next((p for p in _PREFIXES if short.startswith(p)), None):
            short = short.removeprefix(prefix)
        if short in stripped:
            raise ValueError(f"from_pretrained: {path} must name every tensor once, got {short} twice (also as {name})")
        stripped[short] = x
    return stripped


def _compact(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()
