"""Checkpoints of every form: read() and write() go by what lies at the path, or by what the path says.

forms       pth, safetensors: one file with official names; hf: a folder with Hugging Face's names, config.json and
            .safetensors shards; fla: the same with flash-linear-attention's names (Finch alone)
containers  what read() finds holds any of the three namings, in any of: a .pth or .safetensors file, a folder with
            config.json and one such file or shards with an index (.safetensors, or .bin, which is .pth)
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.config import RWKVConfig
from . import fla, folder, huggingface, official, pth, safetensors
from .atomic_file import atomic_write
from .tensors import Joined, Translated, renamed

FORMS = ("pth", "safetensors", "hf", "fla")
SHARD_BYTES = 5_000_000_000

# Left on the names by DeepSpeed, by adapter trainers, and by torch's own wrappers.
_PREFIXES = ("_forward_module.", "_orig_mod.", "module.", "model.")
_NAMINGS = {"official": official, "hf": huggingface, "fla": fla}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SUFFIXES = {".pth": "pth", ".pt": "pth", ".bin": "pth", ".safetensors": "safetensors"}


class Checkpoint(NamedTuple):
    """A model as it lies in a file: sizes, tensors by official name (mapped, none copied yet), and what was found."""

    config: RWKVConfig
    tensors: Mapping[str, Tensor]
    container: str
    naming: str


class Written(NamedTuple):
    """What write() wrote."""

    naming: str
    files: int
    bytes: int


def read(path: str | os.PathLike) -> Checkpoint:
    """Open the model at `path`; names, shapes and config.json are checked, and no tensor is read yet.

    Raises FileNotFoundError, or ValueError that says what the file is, or names every wrong tensor or setting.
    """
    container, found, settings = _open(path)
    naming, tensors = _tidy(path, found)
    names = _NAMINGS[naming]
    config = names.infer_config(path, tensors)
    time_state = any(name.endswith(".time_state") for name in tensors)
    expected = _on_meta(config, time_state and naming != "fla")
    official.check_names_and_shapes(path, tensors, names.from_official(expected))
    if settings is not None and naming != "official":
        folder.check_settings(path, settings, {key: names.settings(config)[key] for key in names.CHECKED})
    ordered = names.to_official(tensors)
    return Checkpoint(config, renamed(ordered, {name: name for name in expected}), container, naming)


def read_time_state(path: str | os.PathLike, config: RWKVConfig) -> Translated:
    """Open a file of tuned initial states alone, blocks.N.att.time_state [H, N(value), N(key)] for every layer.

    Raises FileNotFoundError, or ValueError where the file holds anything else, or states for another size of model.
    """
    _, found, _ = _open(path)
    naming, tensors = _tidy(path, found)
    tensors = _NAMINGS[naming].to_official(tensors)
    shape = (config.n_head, config.head_size, config.head_size)
    names = [f"blocks.{layer}.att.time_state" for layer in range(config.n_layer)]
    expected = {name: torch.empty(shape, device="meta") for name in names}
    official.check_names_and_shapes(path, tensors, expected, "the tuned initial states of this model alone")
    return renamed(tensors, {name: name for name in names})


def write(
    path: str | os.PathLike,
    config: RWKVConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    form: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write a model, given by official names, as `form` (None: what the path says); dtype None keeps each tensor's.

    Tensors are cast and written one by one. Whole or not at all: OSError leaves what was at the path as it was.
    """
    form = form_of(path, form)
    if shard_bytes < 1:
        raise ValueError(f"save_pretrained: shard_bytes must be at least 1, got {shard_bytes}")
    if form in ("hf", "fla"):
        names = _NAMINGS[form]
        settings = names.settings(config)
        tensors = names.from_official(tensors)
        return Written(form, *folder.write(path, tensors, _dtypes(tensors, dtype), settings, shard_bytes))
    _write_file(path, tensors, dtype, form, "save_pretrained")
    return Written("official", 1, os.path.getsize(path))


def with_time_state(
    config: RWKVConfig, tensors: Mapping[str, Tensor], states: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return a model's tensors, in the official order, with these tuned initial states in place of any it has."""
    both = Joined(tensors, states)
    return renamed(both, {name: name for name in official.shapes(config, time_state=True)})


def write_time_state(path: str | os.PathLike, states: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write tuned initial states alone, as the path's suffix says; see write."""
    form = _SUFFIXES.get(Path(path).suffix)
    if form is None:
        raise ValueError(f"save_time_state: path must end in .pth or .safetensors, got {path}")
    _write_file(path, states, dtype, form, "save_time_state")


def form_of(path: str | os.PathLike, form: str | None = None) -> str:
    """Return the form in which to write to a path; ValueError where `form` is unknown or the path says another."""
    by_suffix = _SUFFIXES.get(Path(path).suffix)
    if form is None:
        form = by_suffix or "hf"
    elif form not in FORMS:
        raise ValueError(f"save_pretrained: format must be one of {', '.join(FORMS)}, got {form!r}")
    elif by_suffix not in (None, form):
        kind = "a folder" if form in ("hf", "fla") else f"a .{form} file"
        raise ValueError(f"save_pretrained: path must name {kind} for format {form}, got {path}")
    return form


def _write_file(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, form: str, where: str
) -> None:
    container, dtypes = (pth if form == "pth" else safetensors), _dtypes(tensors, dtype)
    atomic_write(path, lambda file: container.write(file, tensors, dtypes), where)


def _dtypes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    dtypes = {name: tensors[name].dtype if dtype is None else dtype for name in tensors}
    for name, kind in dtypes.items():
        if kind not in _DTYPES:
            raise ValueError(
                f"save_pretrained: dtype must be float64, float32, float16 or bfloat16, got {kind} for {name}"
            )
    return dtypes


def _on_meta(config: RWKVConfig, time_state: bool) -> dict[str, Tensor]:
    shapes = official.shapes(config, time_state)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _open(path: str | os.PathLike) -> tuple[str, Mapping[str, Tensor], dict[str, object] | None]:
    """Return the kind of container, the tensors as named in it, and config.json where there is one."""
    if os.path.isdir(path):
        return folder.load(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"from_pretrained: {path} does not exist; give the path of a .pth or .safetensors file, or of a folder"
        )
    if _is_safetensors(path):
        return ".safetensors", safetensors.load(path), None
    return ".pth", pth.load(path), None


def _is_safetensors(path: str | os.PathLike) -> bool:
    """Go by the name where it says something, else by the first bytes: a size, then a JSON table."""
    by_suffix = _SUFFIXES.get(Path(path).suffix)
    if by_suffix or zipfile.is_zipfile(path):
        return by_suffix == "safetensors"
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _tidy(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> tuple[str, Translated]:
    """Return whose names the tensors have, and the tensors without what wrappers put before the names."""
    short: dict[str, str] = {}
    for name in tensors:
        stripped = name
        while prefix := next((p for p in _PREFIXES if stripped.startswith(p)), None):
            stripped = stripped.removeprefix(prefix)
        if stripped in short:
            raise ValueError(
                f"from_pretrained: {path} must name every tensor once, got {stripped} twice (also as {name})"
            )
        short[stripped] = name
    if any(name.startswith("layers.") for name in short):
        # There, model. is part of the names.
        whole = {name if name.startswith("lm_head.") else f"model.{name}": old for name, old in short.items()}
        return "fla", renamed(tensors, whole)
    naming = "hf" if any(name.startswith(("rwkv.", "embeddings.")) for name in short) else "official"
    return naming, renamed(tensors, short)
