"""DocumentStore: shards that are being written, in files that only grow."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rwkv_ext.data.binidx import BLOCK, HEADER, finish_index


class DocumentStore:
    """Documents in NAME-00000.bin and .idx, NAME-00001.. of a folder; an .idx is whole once its .bin takes no more.

    A file takes documents until the next would make it longer than `limit` tokens; one alone may be longer than that.
    `state` is enough to go on after a crash: what lies behind it in the files is cut off. Memory does not grow with the
    number of documents.
    """

    def __init__(self, folder: Path, name: str, limit: int | None = None, state: dict | None = None):
        self._folder, self._name, self.limit = folder, name, limit
        state = state or {"file": 0, "file_tokens": 0, "file_documents": 0, "tokens": 0, "documents": 0}
        self.n_tokens, self.n_documents = state["tokens"], state["documents"]
        self._number, self._tokens, self._documents = state["file"], state["file_tokens"], state["file_documents"]
        self._open()

    def state(self) -> dict:
        return {
            "file": self._number,
            "file_tokens": self._tokens,
            "file_documents": self._documents,
            "tokens": self.n_tokens,
            "documents": self.n_documents,
        }

    def add(self, ids: Sequence[np.ndarray], sizes: Sequence[np.ndarray]) -> None:
        """Append documents: uint16 arrays that each hold whole ones, and int32 arrays of their sizes in tokens."""
        for part, part_sizes in zip(ids, sizes, strict=True):
            ends = np.cumsum(part_sizes, dtype=np.int64)
            begin, first, count = 0, 0, len(part_sizes)
            while begin < count:
                end = count if self.limit is None else self._last_that_fits(ends, begin, first)
                if end == begin:
                    self._next_file()
                    continue
                last = int(ends[end - 1])
                self._write(part[first:last], part_sizes[begin:end])
                begin, first = end, last

    def _last_that_fits(self, ends: np.ndarray, begin: int, first: int) -> int:
        end = int(np.searchsorted(ends, first + self.limit - self._tokens, "right"))
        return max(end, begin, begin if self._documents else begin + 1)

    def _write(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        # counted first, so that the message about a full disk says what there was to write
        self._tokens += len(ids)
        self.n_tokens += len(ids)
        self._documents += len(sizes)
        self.n_documents += len(sizes)
        self._bin.write(ids.astype("<u2", copy=False).data)
        self._idx.write(sizes.astype("<i4", copy=False).data)

    def sync(self) -> None:
        """Wait until all is on the disk."""
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Make the last index whole and wait until all is on the disk; nothing can be added behind that."""
        finish_index(self._idx, self._documents)
        self.sync()

    def close(self) -> None:
        abandon(self._bin)
        abandon(self._idx)

    def files(self) -> list[tuple[Path, Path]]:
        """Return (.bin, .idx) of every shard, in order."""
        return [self._paths(number) for number in range(self._number + 1)]

    def _paths(self, number: int) -> tuple[Path, Path]:
        stem = f"{self._name}-{number:05d}"
        return self._folder / f"{stem}.bin", self._folder / f"{stem}.idx"

    def _open(self) -> None:
        bin_path, idx_path = self._paths(self._number)
        self._bin = open_at(bin_path, 2 * self._tokens)
        self._idx = open_at(idx_path, HEADER.size + 4 * self._documents if self._documents else 0)
        if not self._documents:
            self._idx.write(bytes(HEADER.size))  # the sizes follow as they come, the header at the end

    def _next_file(self) -> None:
        self.finish()
        self.close()
        self._number, self._tokens, self._documents = self._number + 1, 0, 0
        self._open()


def open_at(path: Path, length: int):
    """Open a file to append behind its first `length` bytes."""
    file = open(path, "r+b" if length else "wb", buffering=1 << 20)
    try:
        if os.fstat(file.fileno()).st_size < length:
            raise ValueError(f"{path}: must have {length} bytes or more, has fewer: it is damaged; run it again")
        file.truncate(length)
        file.seek(length)
    except BaseException:
        file.close()
        raise
    return file


def abandon(file) -> None:
    """Close a file of which all that counts was synced; a full disk refuses what is still in the buffer as well."""
    with contextlib.suppress(OSError):
        file.close()


def read_blocks(
    bin_path: Path, idx_path: Path, documents: int, most: int, first: int = 0, begin: int = 0
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (number of the first, ids, sizes) of consecutive documents of a store, at most `most` tokens at once.

    `first` is the document to start with, which begins at token `begin`. Only one document may have more tokens.
    """
    with open(bin_path, "rb") as ids, open(idx_path, "rb") as index:
        ids.seek(2 * begin)
        index.seek(HEADER.size + 4 * first)
        sizes = np.zeros(0, "<i4")
        read = first
        while first < documents:
            if not len(sizes):
                sizes = np.fromfile(index, "<i4", min(BLOCK, documents - read))
                read += len(sizes)
            ends = np.cumsum(sizes, dtype=np.int64)
            count = max(1, int(np.searchsorted(ends, most, "right")))
            yield first, np.fromfile(ids, "<u2", int(ends[count - 1])), sizes[:count]
            first, sizes = first + count, sizes[count:]
