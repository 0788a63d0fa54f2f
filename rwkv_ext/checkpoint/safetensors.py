"""The .safetensors container: a JSON table of names, dtypes and places, then the bytes of all tensors."""

import json
import os
from collections.abc import Mapping
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import strict_json
from .tensors import MappedTensors, content, release

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


def load(path: str | os.PathLike) -> MappedTensors:
    """Return the tensors of a file by name, memory-mapped, as they are in it.

    Raises FileNotFoundError, or ValueError where the file is damaged or names a tensor twice.
    """
    _refuse_duplicates(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return MappedTensors({name: file.get_tensor(name) for name in file.keys()}, [path])
    except (SafetensorError, RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"from_pretrained: {path} must be a complete .safetensors file of tensors that torch has, got one that "
            f"cannot be read ({error}); it may be truncated: download or save it again"
        ) from error


def write(file: BinaryIO, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Write a .safetensors file, one tensor at a time."""
    # Wide types first, so that every tensor lies at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: -dtypes[name].itemsize)
    table, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        shape = list(tensors[name].shape)
        start, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        table[name] = {"dtype": _NAMES[dtypes[name]], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for name in names:
        file.write(content(tensors, name, dtypes[name]))
        release(tensors, name)


def _refuse_duplicates(path: str | os.PathLike) -> None:
    """Raise ValueError if the table has a name twice, which safe_open does not see."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= _LARGEST_HEADER else b""

    try:
        strict_json.parse(header)
    except strict_json.DuplicateName as error:
        raise ValueError(f"from_pretrained: {path} must name every tensor once, got {error.name} twice") from error
    except ValueError:
        return  # no JSON at all: safe_open says what is wrong
