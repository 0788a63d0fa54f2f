"""A seeded order of documents that needs neither them nor their numbers in memory.

Documents are ordered by a 64-bit hash of (seed, epoch, number of the document), which no two documents of an epoch
share. So the order depends on nothing else: not on memory, threads or pieces. They are dealt to buckets by the first
bits of the hash, and one bucket after the other is put in order.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rwkv_ext._load import native

BUCKET_BYTES = 1 << 28  # of ids, about; 4096 buckets at most
MOST_BUCKETS = 4096
BLOCK_TOKENS = 1 << 25  # gathered together, or one document
ENTRY = np.dtype([("key", "<u8"), ("size", "<i4")])


def keys(numbers: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return uint64 keys of documents: for one seed and epoch, all different."""
    start = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))
    return _mix(_mix(numbers.astype(np.uint64) + start) ^ start)


def _mix(x: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers that leaves no pattern: splitmix64's."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Buckets:
    """Files bucket-00000.ids, .entries .. of a folder."""

    def __init__(self, folder: Path, n_tokens: int):
        self._folder = folder
        self.bits = min(max(0, (2 * n_tokens - 1) // BUCKET_BYTES), MOST_BUCKETS - 1).bit_length()
        self.count = 1 << self.bits

    def clear(self) -> None:
        """Remove what an earlier run dealt."""
        for number in range(self.count):
            self.remove(number)

    def remove(self, number: int) -> None:
        for path in self._paths(number):
            path.unlink(missing_ok=True)

    def deal(self, ids: np.ndarray, sizes: np.ndarray, document_keys: np.ndarray, kept: np.ndarray) -> None:
        """Append documents that stand back to back, but for those that are not kept, each to its bucket."""
        begins = np.cumsum(sizes, dtype=np.int64) - sizes
        numbers = document_keys >> np.uint64(64 - self.bits) if self.bits else np.zeros(len(sizes), np.uint64)
        order = np.flatnonzero(kept)
        order = order[np.argsort(numbers[order], kind="stable")]
        numbers, sizes = numbers[order], sizes[order]
        gathered = native().gather(ids, begins[order], sizes)
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        entries = np.empty(len(order), ENTRY)
        entries["key"], entries["size"] = document_keys[order], sizes
        cuts = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(order)] if len(order) else []
        for first, last in zip(cuts, cuts[1:]):
            paths = self._paths(int(numbers[first]))
            for path, part in zip(paths, (gathered[ends[first] : ends[last]], entries[first:last]), strict=True):
                with open(path, "ab") as file:
                    file.write(part.data)

    def sync(self) -> None:
        """Wait until all is on the disk."""
        for number in range(self.count):
            for path in self._paths(number):
                with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
                    os.fsync(file.fileno())

    def ordered(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (ids, sizes) of a bucket's documents by their keys, about BLOCK_TOKENS at once."""
        ids_path, entries_path = self._paths(number)
        if not entries_path.exists():
            return
        entries = np.fromfile(entries_path, ENTRY)
        sizes = np.ascontiguousarray(entries["size"])
        begins = np.cumsum(sizes, dtype=np.int64) - sizes
        order = np.argsort(entries["key"], kind="stable")
        begins, sizes = begins[order], sizes[order]
        ends = np.cumsum(sizes, dtype=np.int64)
        ids = np.memmap(ids_path, "<u2", "r") if ends[-1] else np.zeros(0, np.uint16)
        first = 0
        while first < len(order):
            done = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + BLOCK_TOKENS, "right")))
            yield native().gather(ids, begins[first:last], sizes[first:last]), sizes[first:last]
            first = last

    def _paths(self, number: int) -> tuple[Path, Path]:
        stem = f"bucket-{number:05d}"
        return self._folder / f"{stem}.ids", self._folder / f"{stem}.entries"
