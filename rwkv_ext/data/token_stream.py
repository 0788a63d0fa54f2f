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
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from rwkv_ext.data.binidx import BinidxReader, shard_files

OPEN_MAPS = 256  # a process may usually open 1024 files
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
        max_maps: how many shards are mapped at the same time at most.

    Attributes: shards (a list of Shard); n_tokens, n_documents; dtype, of the shards, or where they differ the
    smallest integer type that holds them all.
    """

    def __init__(self, shards, max_maps: int = OPEN_MAPS):
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
        out = np.empty(max(0, operator.index(count)), self.dtype)
        if count < 0:
            raise ValueError(f"read: count must be 0 or more, got {count}")
        return self.read_into(start, out)

    def read_into(self, start: int, out: np.ndarray) -> np.ndarray:
        """Fill `out`, one dimension of any type that holds `dtype`, with the tokens from `start` on; return it.

        They are copied once, from the map to their place. ValueError outside the stream; TypeError for a type that
        is too small.
        """
        start = operator.index(start)
        if not np.can_cast(self.dtype, out.dtype):
            raise TypeError(f"read_into: out must hold every {self.dtype}, got {out.dtype}; use int64")
        for shard, begin, end, at in self._pieces(start, len(out)):
            out[at : at + end - begin] = self._tokens(shard)[begin:end]
        return out

    def will_read(self, start: int, count: int) -> None:
        """Ask the system to fetch these tokens from the disk; return at once. ValueError outside the stream."""
        for shard, begin, end, _ in self._pieces(operator.index(start), count):
            item = self.shards[shard].dtype.itemsize
            first = begin * item // mmap.PAGESIZE * mmap.PAGESIZE
            self._maps(shard)[0].madvise(mmap.MADV_WILLNEED, first, end * item - first)

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

    def _tokens(self, shard: int) -> np.ndarray:
        return self._maps(shard)[1]

    def _pieces(self, start: int, count: int):
        """Yield (shard, first and end in its tokens, place in what is read) for each shard that a range touches."""
        end = start + count
        if not 0 <= start <= end <= self.n_tokens:
            raise ValueError(f"tokens must lie within 0 .. {self.n_tokens} of the stream, got {start} .. {end}")
        index, at = bisect.bisect_right(self._ends, start), start
        while at < end:
            shard = self.shards[index]
            stop = min(end, shard.first + shard.n_tokens)
            if stop > at:
                yield index, at - shard.first, stop - shard.first, at - start
            at, index = stop, index + 1


def _open(shards: Sequence[Shard], index: int) -> tuple[mmap.mmap, np.ndarray]:
    shard = shards[index]
    path = shard.prefix + ".bin"
    expected = shard.n_tokens * shard.dtype.itemsize
    with open(path, "rb", buffering=0) as file:
        found = os.fstat(file.fileno()).st_size
        if found != expected:
            advice = "a shard must stay as it is while it is read: start again"
            raise ValueError(f"{path}: must still have {expected} bytes, got {found}; {advice}")
        mapped = mmap.mmap(file.fileno(), expected, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)  # a sample has no neighbours: what the kernel would read ahead is wasted
    return mapped, np.frombuffer(mapped, shard.dtype)
