"""The .pth container: a zip file with a pickled dict of tensors and the bytes of each, as torch.save makes it."""

import errno
import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from .tensors import MappedTensors, content, release

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_LARGE = 1 << 30  # bytes; from here on a record has the zip64 fields, which 4 GB need
# What reading a damaged file has been seen to raise, in torch and in the pickle machine below it.
_DAMAGE = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError)
_DAMAGE += (AssertionError, OverflowError, zipfile.BadZipFile, NotImplementedError)


def load(path: str | os.PathLike) -> MappedTensors:
    """Return the tensors of a file by name, memory-mapped, as they are in it; nothing in the file is executed.

    Raises OSError, or ValueError where the file holds anything but a dict of name -> tensor.
    """
    try:
        # Only torch's zip format can be mapped; files from before 2020 are read whole.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (*_DAMAGE, OSError) as error:
        # A place outside the file is damage too, and comes as EINVAL; other system errors speak for themselves.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"from_pretrained: {path} must be a .pth file of tensors, got a file torch cannot read as one ({reason}); "
            "it may be truncated or hold something else: download or save it again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"from_pretrained: {path} must hold a dict of name -> tensor, got {type(found).__name__}")
    others = [name for name, x in found.items() if not isinstance(name, str) or not _plain(x)]
    if others:
        raise ValueError(
            f"from_pretrained: {path} must hold a dict of name -> dense tensor alone, got other things under "
            f"{others[:5]}; if it is a training checkpoint, save the model's state_dict() by itself"
        )
    return MappedTensors(found, [path])


def _plain(x: object) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_quantized


def write(file: BinaryIO, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Write a .pth file that torch.load reads, one tensor at a time: torch.save would want all of them cast at once."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, "data.pkl", _pickled(tensors, dtypes))
        _record(archive, "byteorder", b"little")
        for key, name in enumerate(tensors):
            _record(archive, f"data/{key}", content(tensors, name, dtypes[name]))
            release(tensors, name)
        _record(archive, "version", b"3\n")


class _Stored:
    """Stands for a tensor while the dict is pickled; its bytes are the record data/KEY."""

    def __init__(self, key: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.key, self.shape, self.dtype = str(key), shape, dtype


class _Storage:
    """Stands for that tensor's storage, which torch pickles as a persistent id."""

    def __init__(self, stored: _Stored):
        self.id = ("storage", _STORAGES[stored.dtype], stored.key, "cpu", math.prod(stored.shape))


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing):
        return thing.id if isinstance(thing, _Storage) else None

    def reducer_override(self, thing):
        if not isinstance(thing, _Stored):
            return NotImplemented
        strides = torch.empty(thing.shape, device="meta").stride()
        hooks = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (_Storage(thing), 0, thing.shape, strides, False, hooks)


def _pickled(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> bytes:
    pickled = io.BytesIO()
    stored = {name: _Stored(key, tuple(tensors[name].shape), dtypes[name]) for key, name in enumerate(tensors)}
    _Pickler(pickled, protocol=2).dump(stored)
    return pickled.getvalue()


def _record(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Add one record, its data at a multiple of 64 bytes as torch maps it."""
    info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
    large = len(data) >= _LARGE
    zip64 = 20 if large else 0
    start = archive.fp.tell() + 30 + len(info.filename) + 4 + zip64
    padding = -start % 64
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    info.file_size = len(data)
    with archive.open(info, "w", force_zip64=large) as record:
        record.write(data)
