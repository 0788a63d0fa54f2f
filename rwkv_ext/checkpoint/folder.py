"""Checkpoint folders: config.json beside one file of tensors, or beside shards and the index of where each is."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import pth, safetensors, strict_json
from .atomic_file import atomic_folder, durable_write
from .tensors import MappedTensors, renamed

_CONFIG = "config.json"
_SINGLE = {"model.safetensors": safetensors, "pytorch_model.bin": pth}
_OURS = re.compile(r"config\.json|(model|pytorch_model)([-.].*)?\.(safetensors|bin|index\.json)")


def load(path: str | os.PathLike) -> tuple[str, MappedTensors, dict[str, object] | None]:
    """Return the kind of container, its tensors (mapped) and config.json, None where there is none.

    Raises FileNotFoundError naming every absent file, or ValueError naming what is damaged or contradicts itself.
    """
    path = Path(path)
    names = sorted(file.name for file in path.iterdir())
    settings = _json(path / _CONFIG) if _CONFIG in names else None
    for single, container in _SINGLE.items():
        index = f"{single}.index.json"
        if single in names and index in names:
            raise ValueError(f"from_pretrained: {path} must hold {single} or {index}, has both; remove the stale one")
        if single in names:
            return f"folder with {single}", container.load(path / single), settings
        if index in names:
            tensors, count = _load_shards(path / index, container)
            return f"folder with {count} shards", tensors, settings
    raise FileNotFoundError(
        f"from_pretrained: {path} must hold one of {', '.join(_SINGLE)} or its .index.json, has "
        f"{', '.join(names[:8]) or 'nothing'}{' ...' if len(names) > 8 else ''}; "
        "give the path of the model's own file or folder"
    )


def _load_shards(index: Path, container) -> tuple[MappedTensors, int]:
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"from_pretrained: {index} must map tensors to files under weight_map; download it again")
    files = sorted(set(places.values()))
    outside = [file for file in files if os.path.basename(file) != file or file in ("", ".", "..")]
    if outside:
        raise ValueError(f"from_pretrained: {index} must name files of its own folder, got {outside[0]!r}")
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise FileNotFoundError(
            f"from_pretrained: {index} names files that are not there: {', '.join(absent)}; download them"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        shard = container.load(index.parent / file)
        wrong = [f"lacks {name}" for name, place in places.items() if place == file and name not in shard]
        wrong += [f"also has {name}" for name in shard if places.get(name) != file]
        if wrong:
            raise ValueError(
                f"from_pretrained: {index.parent / file} must hold what {index.name} says, "
                f"{', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}; download both again"
            )
        tensors |= shard
    return MappedTensors(tensors, [index.parent / file for file in files]), len(files)


def check_settings(path: str | os.PathLike, settings: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Compare config.json with the tensors' sizes and the equations' constants; ValueError listing every difference.

    A key that is absent or null says nothing.
    """
    wrong = [
        f"{key} {settings[key]!r} (must be {value!r})"
        for key, value in expected.items()
        if settings.get(key) is not None and settings[key] != value
    ]
    if wrong:
        raise ValueError(
            f"from_pretrained: {Path(path) / _CONFIG} must describe the tensors beside it, got {', '.join(wrong)}; "
            "correct the file, or download both again"
        )


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    settings: Mapping[str, object],
    shard_bytes: int,
) -> tuple[int, int]:
    """Write config.json and .safetensors shards of at most shard_bytes each (one tensor at least); whole or not at all.

    Returns the number of shards and the bytes of all files.
    """
    sizes = {name: tensors[name].numel() * dtypes[name].itemsize for name in tensors}
    shards = _split(sizes, shard_bytes)
    kinds = {str(dtype).removeprefix("torch.") for dtype in dtypes.values()}
    settings = dict(settings) | ({"torch_dtype": kinds.pop()} if len(kinds) == 1 else {})
    total = 0

    def fill(folder: Path) -> None:
        nonlocal total
        places = {}
        for number, names in enumerate(shards, 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            part = renamed(tensors, {name: name for name in names})
            durable_write(folder / file, lambda out, part=part: safetensors.write(out, part, dtypes))
            places |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
            _write_json(folder / "model.safetensors.index.json", index)
        _write_json(folder / _CONFIG, settings)
        total = sum(file.stat().st_size for file in folder.iterdir())

    atomic_folder(path, fill, _OURS.fullmatch, "save_pretrained")
    return len(shards), total


def _split(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Cut the names, in order, into runs of at most shard_bytes; a tensor larger than that is a shard of its own."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _json(path: Path) -> dict[str, object]:
    try:
        value = strict_json.parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"from_pretrained: {path} must be JSON with every name once ({error}); download it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"from_pretrained: {path} must be a JSON object, got {type(value).__name__}")
    return value


def _write_json(path: Path, value: object) -> None:
    durable_write(path, lambda file: file.write(json.dumps(value, indent=2).encode() + b"\n"))
