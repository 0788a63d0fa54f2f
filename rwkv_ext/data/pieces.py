"""Inputs cut into pieces that threads encode at once: the same pieces whatever the number of threads.

A plain .jsonl file is cut at line ends near every PIECE_BYTES, a decompressed one or standard input into blocks of
whole lines, a table by its batches of rows; text files go together until they have PIECE_BYTES. A piece is numbered
within its source (one file, or one row of text files), so that a source can be entered at any piece.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_ext._load import native
from rwkv_ext.data.documents import read_column
from rwkv_ext.data.input_file import COMPRESSED, STANDARD_INPUT, InputFile, inner_suffix

PIECE_BYTES = 16 << 20
TEXT_FILES = 256  # in one piece, at most
_BLOCK_BYTES = 128 << 10  # of lines, read together: they stay in a core's cache until they are encoded
_SEARCHED = 1 << 16  # bytes read together in search of a line end


@dataclass
class Lines:
    """Whole lines of a .jsonl file, in memory."""

    path: Path
    data: bytes
    offset: int  # of the data in the file, or in what it decompresses to
    end: int  # how far the file itself has been read
    is_compressed: bool

    @contextmanager
    def open(self) -> Iterator:
        yield native().LineReader(self.data)


@dataclass
class LineRange:
    """The lines of a plain .jsonl file that begin in `begin` .. `end`; the last may end anywhere."""

    path: Path
    begin: int
    end: int
    offset = 0
    is_compressed = False

    @contextmanager
    def open(self) -> Iterator:
        """Give a reader of them; `got_shorter` if it ends before `end`. OSError where the file cannot be read."""
        with open(self.path, "rb", buffering=0) as file:
            yield native().LineReader(file.fileno(), self._first_line(file), self.end, _BLOCK_BYTES)

    def _first_line(self, file) -> int:
        """Return where the first line begins that begins at or behind `begin`: `end` if none does before it."""
        at = self.begin - 1
        file.seek(max(0, at))
        while 0 <= at < self.end:
            block = file.read(_SEARCHED)
            if not block:
                raise got_shorter(self.path)
            found = block.find(b"\n")
            if found >= 0:
                return min(at + found + 1, self.end)
            at += len(block)
        return max(0, min(at, self.end))


@dataclass
class Texts:
    """Whole files, each one document."""

    paths: list[Path]
    ends: list[int]  # bytes of the source read with each


@dataclass
class Rows:
    """Some rows of a table: row i is data[offsets[i] : offsets[i + 1]]."""

    path: Path
    data: memoryview | bytes
    offsets: np.ndarray  # int64
    nulls: np.ndarray  # rows, counted from 0, without a text
    first: int  # number of row 0 in the table, counted from 1
    n_rows: int  # of the table
    size: int  # of the table's file


@dataclass
class Source:
    """Files whose pieces are numbered together; `size` bytes of them lie on the disk."""

    paths: list[Path]
    size: int

    def pieces(self, text_key: str, first: int = 0) -> Iterator:
        """Yield the pieces from number `first` on. ValueError for a damaged file and as `read_column`."""
        path = self.paths[0]
        if _is_text(path):
            ends = np.cumsum([file_size(path) for path in self.paths]).tolist()
            yield from [Texts(self.paths, ends)][first:]
        elif inner_suffix(path) == ".parquet":
            yield from _row_batches(path, text_key, first)
        elif path == STANDARD_INPUT or path.suffix.lower() in COMPRESSED:
            yield from _line_blocks(path, first)
        else:
            for begin in range(first * PIECE_BYTES, self.size, PIECE_BYTES):
                yield LineRange(path, begin, min(begin + PIECE_BYTES, self.size))


def find_sources(files: Sequence[Path]) -> list[Source]:
    """Return the sources of files, in their order."""
    sources: list[Source] = []
    for path in files:
        size = file_size(path)
        last = sources[-1] if sources else None
        if last and _is_text(path) and _is_text(last.paths[0]):
            if len(last.paths) < TEXT_FILES and last.size + size <= PIECE_BYTES:
                last.paths.append(path)
                last.size += size
                continue
        sources.append(Source([path], size))
    return sources


def file_size(path: Path) -> int:
    return 0 if path == STANDARD_INPUT else os.stat(path).st_size


def file_state(path: Path) -> tuple[str, int, int]:
    """Return what tells a file from another and from itself before it was changed: its place, size and time."""
    status = os.stat(path)
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def got_shorter(path: Path) -> ValueError:
    return ValueError(f"{path}: must not change while it is read, got shorter; run it again")


def _is_text(path: Path) -> bool:
    return inner_suffix(path) not in (".jsonl", ".parquet")


def _line_blocks(path: Path, first: int) -> Iterator[Lines]:
    with InputFile(path) as file:
        parts, offset, number = [], 0, 0  # parts: what no line end was found behind yet
        more = True
        while more:
            block = file.read(PIECE_BYTES)
            more = bool(block)
            cut = block.rfind(b"\n") + 1 if more else 0
            parts.append(block[:cut] if cut else block)
            if more and not cut:
                continue
            data = b"".join(parts)
            if data and number >= first:
                end = file.consumed() if file.is_compressed else offset + len(data)
                yield Lines(path, data, offset, end, file.is_compressed)
            parts, offset, number = [block[cut:]], offset + len(data), number + 1


def _row_batches(path: Path, text_key: str, first: int) -> Iterator[Rows]:
    row = 1
    for number, (texts, n_rows) in enumerate(read_column(path, text_key)):
        if number >= first:
            _, offsets, data = texts.buffers()
            offsets = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
            nulls = np.flatnonzero(texts.is_null().to_numpy(zero_copy_only=False)) if texts.null_count else np.zeros(0)
            yield Rows(path, data or b"", offsets, nulls.astype(np.int64), row, n_rows, file_size(path))
        row += len(texts)
