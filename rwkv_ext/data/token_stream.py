"""Many shards as one stream: token i of the stream is token i of the one file that `data merge` would write.

Shards are memory-mapped when a read first needs them, and the least recently used maps are closed again, so
thousands of shards take neither file descriptors nor addresses beyond a bound. A stream holds names and sizes alone:
it can be pickled, forked and shared by threads.
"""

import bisect
import hashlib
import mmap
import operator
import os
import resource
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from rwkv_ext.data.binidx import BinidxReader, shard_files

MOST_MAPS = 16384  # a process may have 65,530 maps
FINGERPRINT_BLOCK = 2048  # tokens
FINGERPRINT_BLOCKS = (256, 4096)  # at least, at most; between them one for each 2**28 tokens


@dataclass(frozen=True)
class Shard:
    """What a stream keeps of a shard; `first` is the place of its first token in the stream."""

    prefix: str
    dtype: np.dtype
    first: int
    n_tokens: int
    n_documents: int


def find_shards(entries: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Return the shards' prefixes: a folder stands for the *.idx files in it, by sorted name, others for themselves.

    FileNotFoundError for a folder without a shard; ValueError for a file that is neither .bin nor .idx.
    """
    entries = [entries] if isinstance(entries, str | os.PathLike) else entries
    prefixes: list[str] = []
    for entry in entries:
        entry = os.fspath(entry)
        bin_path, idx_path = shard_files(entry)
        if os.path.isdir(entry) and not idx_path.is_file():
            found = sorted(path.stem for path in Path(entry).glob("*.idx") if not path.name.startswith("."))
            if not found:
                advice = "name a folder of shards made by `rwkv-ext data build`, or the shards"
                raise FileNotFoundError(f"{entry}: the folder must hold *.idx and *.bin files, got none; {advice}")
            prefixes += [os.path.join(entry, name) for name in found]
        elif os.path.isfile(entry) and os.path.abspath(entry) not in map(os.path.abspath, (bin_path, idx_path)):
            raise ValueError(
                f"{entry}: must be a shard's name or a folder of shards, got another file; RWKV-LM's lists of shards "
                "are not read: put their prefixes in data.train and the steps of their last column in data.weights"
            )
        else:
            prefixes.append(str(bin_path)[: -len(".bin")])
    return prefixes


class TokenStream:
    """The tokens of shards back to back, addressed by 64-bit positions. Reads cross from one shard into the next.

    Args:
        shards: a shard's name, a folder, a BinidxReader, or a sequence of them; their order matters. Every shard is
            opened once and checked as BinidxReader does, which raises FileNotFoundError or ValueError.
        max_maps: how many shards are mapped at the same time at most; None takes `open_maps()`.

    Attributes: shards (a list of Shard); n_tokens, n_documents; dtype, of the shards, or where they differ the
    smallest integer type that holds them all.
    """

    def __init__(self, shards, max_maps: int | None = None):
        if max_maps is None:
            max_maps = open_maps()
        if max_maps < 1:
            raise ValueError(f"max_maps must be at least 1, got {max_maps}")
        self.shards: list[Shard] = []
        self.n_tokens = self.n_documents = 0
        for item in [shards] if isinstance(shards, str | os.PathLike | BinidxReader) else shards:
            for reader in [item] if isinstance(item, BinidxReader) else map(BinidxReader, find_shards(item)):
                self._append(reader)
        types = {shard.dtype for shard in self.shards} or {np.dtype("<u2")}
        self.dtype = np.result_type(*types)
        self.max_maps = max_maps
        self._prepare()

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens start .. start + count - 1 in a new array [count] of `dtype`; ValueError outside the stream."""
        pieces = self._pieces(start, count)
        out = np.empty(count, self.dtype)
        self._copy(pieces, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> np.ndarray:
        """Fill `out`, one dimension of any type that holds `dtype`, with the tokens from `start` on; return it.

        They are copied once, from the map to their place. ValueError outside the stream; TypeError for a type that
        is too small.
        """
        self._check_type(out.dtype)
        self._copy(self._pieces(start, len(out)), out)
        return out

    def will_read(self, start: int, count: int) -> None:
        """Ask the system to fetch these tokens from the disk; return at once. ValueError outside the stream."""
        self._fetch(self._pieces(start, count))

    def fingerprint(self) -> str:
        """Return a SHA-256 of the number of tokens and of blocks spread over all of them.

        It names the tokens and not the files: shards and the one shard merged from them have the same.
        """
        least, most = FINGERPRINT_BLOCKS
        count = min(max(least, self.n_tokens >> 28), most)
        size = min(FINGERPRINT_BLOCK, self.n_tokens)
        starts = [i * (self.n_tokens - size) // (count - 1) for i in range(count)]
        for start in starts:
            self.will_read(start, size)
        digest = hashlib.sha256(struct.pack("<Q", self.n_tokens))
        block = np.empty(size, "<i8")
        for start in starts:
            digest.update(self.read_into(start, block).data)
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_maps", "_ends")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._prepare()

    def _append(self, reader: BinidxReader) -> None:
        # A worker process may have another working directory.
        prefix = os.path.abspath(reader.prefix)
        self.shards.append(Shard(prefix, reader.dtype, self.n_tokens, reader.n_tokens, reader.n_documents))
        self.n_tokens += reader.n_tokens
        self.n_documents += reader.n_documents

    def _prepare(self) -> None:
        self._ends = [shard.first + shard.n_tokens for shard in self.shards]
        self._maps = lru_cache(self.max_maps)(partial(_open, self.shards))  # safe for threads and forks by itself

    def _check_type(self, dtype: np.dtype) -> None:
        if not np.can_cast(self.dtype, dtype):
            raise TypeError(f"the type of what is read must hold every {self.dtype}, got {dtype}; use int64")

    def _pieces(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """Return (shard, first and end in its tokens) of each shard that a range has tokens of, in order."""
        start, end = operator.index(start), operator.index(start) + operator.index(count)
        if not 0 <= start <= end <= self.n_tokens:
            raise ValueError(f"tokens must lie within 0 .. {self.n_tokens} of the stream, got {start} .. {end}")
        pieces = []
        index = bisect.bisect_right(self._ends, start)
        while start < end:
            first, stop = self.shards[index].first, min(end, self._ends[index])
            if start < stop:
                pieces.append((index, start - first, stop - first))
            start, index = stop, index + 1
        return pieces

    def _fetch(self, pieces: list[tuple[int, int, int]]) -> None:
        for shard, begin, end in pieces:
            mapped, tokens = self._maps(shard)
            first = begin * tokens.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, first, end * tokens.itemsize - first)

    def _copy(self, pieces: list[tuple[int, int, int]], out: np.ndarray) -> None:
        at = 0
        for shard, begin, end in pieces:
            mapped, tokens = self._maps(shard)
            if (size := mapped.size()) != tokens.nbytes:  # what was cut off is no memory any more: SIGBUS
                raise _changed(self.shards[shard], size)
            out[at : at + end - begin] = tokens[begin:end]
            at += end - begin


def read_windows(places: Sequence[tuple[TokenStream, int]], width: int, dtype=np.int64) -> np.ndarray:
    """Return `width` tokens from each (stream, start): [n, width]. The disk is asked for all before one is read.

    ValueError outside a stream; TypeError for a dtype that does not hold a stream's.
    """
    for stream in {id(stream): stream for stream, _ in places}.values():
        stream._check_type(dtype)
    pieces = [stream._pieces(start, width) for stream, start in places]
    for (stream, _), parts in zip(places, pieces, strict=True):
        stream._fetch(parts)
    out = np.empty((len(places), width), dtype)
    for (stream, _), parts, row in zip(places, pieces, out, strict=True):
        stream._copy(parts, row)
    return out


def open_maps() -> int:
    """Return how many shards may stay mapped: a quarter of the files that this process may open (usually 1024)."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_MAPS if files == resource.RLIM_INFINITY else min(max(1, files // 4), MOST_MAPS)


def _open(shards: Sequence[Shard], index: int) -> tuple[mmap.mmap, np.ndarray]:
    shard = shards[index]
    expected = shard.n_tokens * shard.dtype.itemsize
    with open(shard.prefix + ".bin", "rb", buffering=0) as file:
        found = os.fstat(file.fileno()).st_size
        if found != expected:
            raise _changed(shard, found)
        mapped = mmap.mmap(file.fileno(), expected, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)  # a sample has no neighbours: what the kernel would read ahead is wasted
    return mapped, np.frombuffer(mapped, shard.dtype)


def _changed(shard: Shard, size: int) -> ValueError:
    need = f"must still have {shard.n_tokens * shard.dtype.itemsize} bytes"
    advice = "a shard must stay as it is while it is read: start again"
    return ValueError(f"{shard.prefix}.bin: {need}, got {size}; {advice}")
