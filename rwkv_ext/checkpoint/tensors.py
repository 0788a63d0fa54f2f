"""Tensors by name as checkpoints hand them around: mapped from files; renamed, rebuilt and cast one by one."""

import ctypes
import mmap
import os
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .large_pages import copy_in_large_pages


class MappedTensors(dict[str, Tensor]):
    """Tensors whose memory is the pages of the files they lie in; release() gives those pages back once read."""

    def __init__(self, tensors: Mapping[str, Tensor], paths: Iterable[str | os.PathLike]):
        super().__init__(tensors)
        self._ranges = _mapped_ranges(paths)

    def release(self, name: str) -> None:
        """Take the tensor's pages out of this process's memory; reading it again brings them back from the file."""
        storage = self[name].untyped_storage()
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        # Only what is proven to be the file's: the same call on other memory would erase it.
        if any(first <= start and end <= last for first, last in self._ranges):
            page = start - start % mmap.PAGESIZE
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(page), ctypes.c_size_t(end - page), mmap.MADV_DONTNEED)


class Recipe(NamedTuple):
    """How one tensor comes from others: make(*sources)."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor]


class Translated(Mapping[str, Tensor]):
    """Other names, and perhaps other layouts, for the tensors of a mapping; each is made when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], recipes: Mapping[str, Recipe]):
        self._tensors, self._recipes = tensors, recipes

    def __getitem__(self, name: str) -> Tensor:
        recipe = self._recipes[name]
        return recipe.make(*(self._tensors[source] for source in recipe.sources))

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def release(self, name: str) -> None:
        """See MappedTensors."""
        for source in self._recipes[name].sources:
            release(self._tensors, source)


class Joined(ChainMap[str, Tensor]):
    """The tensors of several mappings; where two have a name, the last one counts."""

    def __init__(self, *mappings: Mapping[str, Tensor]):
        super().__init__(*reversed(mappings))

    def release(self, name: str) -> None:
        """See MappedTensors."""
        release(next(tensors for tensors in self.maps if name in tensors), name)


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Translated:
    """Return the tensors under new names; names maps new to old."""
    return Translated(tensors, {new: Recipe((old,), lambda x: x) for new, old in names.items()})


def release(tensors: Mapping[str, Tensor], name: str) -> None:
    """Let go of a tensor's file pages, where it has any."""
    if isinstance(tensors, (MappedTensors, Translated, Joined)):
        tensors.release(name)


def cast(name: str, x: Tensor, dtype: torch.dtype, device: torch.device | str, copy: bool = False) -> Tensor:
    """Return x in dtype on device, row-major; ValueError where a finite value overflows, as large ones do in fp16."""
    x = x.detach()
    if copy and x.is_cpu and torch.device(device).type == "cpu":
        result = copy_in_large_pages(x, dtype)
    else:
        result = x.to(device=device, dtype=dtype, copy=copy, memory_format=torch.contiguous_format)
    if dtype == torch.float16 and x.dtype != dtype and result.numel() and not result.is_meta:
        # The extremes alone (NaN, if any): isfinite() would need twice the tensor's memory.
        if _has_infinity(result) and not _has_infinity(x):
            raise ValueError(
                f"{name} must stay below {torch.finfo(dtype).max:g} to fit float16, got {x.abs().max().item():g}; "
                "use bfloat16 or float32"
            )
    return result


def copied(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """Copy all, one by one, into memory of their own: no parameter may be pages of a file that someone overwrites."""
    copies = {}
    for name in tensors:
        copies[name] = cast(name, tensors[name], dtype, device, copy=True)
        release(tensors, name)
    return copies


def _has_infinity(x: Tensor) -> bool:
    return any(extreme.isinf().item() for extreme in x.aminmax())


def widest_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the narrowest dtype that holds all tensors exactly: bfloat16 for the released files."""
    widest = None
    for x in tensors.values():
        widest = x.dtype if widest is None else torch.promote_types(widest, x.dtype)
    return widest


def content(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> memoryview:
    """Return one tensor's bytes as a file holds them: cast, on the CPU, row-major."""
    x = cast(name, tensors[name], dtype, "cpu").contiguous()
    return memoryview(x.view(-1).view(torch.uint8).numpy())


def _mapped_ranges(paths: Iterable[str | os.PathLike]) -> list[tuple[int, int]]:
    """Return the address ranges at which the kernel says the files are mapped; none where it does not say."""
    wanted = {os.path.realpath(path) for path in paths}
    ranges = []
    try:
        with open("/proc/self/maps") as maps:
            for line in maps:
                addresses, *_, path = line.rstrip("\n").split(None, 5)
                if path in wanted:
                    first, last = (int(address, 16) for address in addresses.split("-"))
                    ranges.append((first, last))
    except OSError:
        return []
    return ranges
