"""PieceEncoder: a piece of the input to the ids of its documents. Many threads may use one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rwkv_ext._load import native
from rwkv_ext.data.binidx import MAX_DOCUMENT
from rwkv_ext.data.documents import Document, offset_name, read_line, read_row, read_text
from rwkv_ext.data.duplicates import digests
from rwkv_ext.data.input_file import COMPRESSED, InputFile
from rwkv_ext.data.pieces import LineRange, Lines, Rows, Texts, got_shorter
from rwkv_ext.tokenizer import WorldTokenizer

NO_IDS = np.zeros(0, np.uint16)


@dataclass
class Encoded:
    """The documents of a piece, and what became of the others."""

    ids: list[np.ndarray] = field(default_factory=list)  # uint16, of documents back to back
    sizes: list[np.ndarray] = field(default_factory=list)  # int32, of the documents, in tokens
    digests: list[np.ndarray] = field(default_factory=list)  # of the documents, if asked for
    text_bytes: int = 0
    skipped: int = 0  # documents left out because they were not UTF-8
    repaired: int = 0  # documents with U+FFFD in the place of what was not UTF-8
    blank: int = 0  # documents of white space alone that were to be dropped
    lines: int = 0
    end: int = 0  # bytes of the source read with this piece
    fail: Callable[[int], object] | None = None  # raises the error of the piece, given the lines before it


@dataclass
class PieceEncoder:
    """How documents are read and encoded.

    What the C++ reader does not take, a broken line as well as a harmless one that it leaves alone, is read by
    `rwkv_ext.data.documents`, one at a time, and its errors are the errors here. A tokenizer of a class with its own
    encode_array or decode_bytes gets every document so.
    """

    tokenizer: WorldTokenizer
    text_key: str = "text"
    eod: bool = True
    invalid_utf8: str = "error"
    drop_empty: bool = False
    make_digests: bool = False

    def __post_init__(self):
        kind = type(self.tokenizer)
        self.is_native = (kind.encode_array, kind.decode_bytes) == (
            WorldTokenizer.encode_array,
            WorldTokenizer.decode_bytes,
        )

    def encode(self, piece) -> Encoded:
        """Read and encode a piece. OSError and ValueError where it cannot be read; for what is wrong with a line see
        `Encoded.fail`."""
        encoded = Encoded()
        if isinstance(piece, Lines | LineRange):
            self._add_lines(piece, encoded)
        elif isinstance(piece, Rows):
            self._add_rows(piece, encoded)
        else:
            self._add_files(piece, encoded)
        if self.make_digests:
            encoded.digests = [digests(*documents) for documents in zip(encoded.ids, encoded.sizes, strict=True)]
        return encoded

    def _add_lines(self, piece: Lines | LineRange, encoded: Encoded) -> None:
        with piece.open() as reader:
            first = piece.offset + reader.position
            while True:
                if self.is_native:
                    options = (self.text_key, self.eod, self.drop_empty)
                    self._take(encoded, reader.encode(self.tokenizer._native, *options))
                offset = piece.offset + reader.position
                encoded.end = piece.end if piece.is_compressed else offset
                line = reader.next_line()
                if not line:
                    if reader.position < reader.end:
                        raise got_shorter(piece.path)
                    return
                end = piece.end if piece.is_compressed else offset + len(line)
                index = encoded.lines

                def read(before: int, line=line, offset=offset, end=end, index=index) -> Document | None:
                    number = before + index + 1
                    where = f"{piece.path}: line {number}, {offset_name(piece.is_compressed)}"
                    return read_line(line, number, offset, end, where, self.text_key, self.invalid_utf8)

                try:
                    document = read(1 if first else 0)  # only a file's first line may have a byte order mark
                except ValueError:
                    encoded.fail = read
                    return
                if document is not None:
                    self._add(document, piece.path, encoded)
                encoded.lines += 1

    def _add_rows(self, piece: Rows, encoded: Encoded) -> None:
        row, n_rows = 0, len(piece.offsets) - 1
        present = int(piece.nulls[0]) if len(piece.nulls) else n_rows
        encoded.end = piece.size * (piece.first + n_rows - 1) // piece.n_rows
        while row < n_rows:
            if self.is_native:
                self._take(encoded, self._encode_texts(piece.data, piece.offsets[: present + 1], row))
                row = encoded.lines
                if row == n_rows:
                    break
            data = bytes(piece.data[piece.offsets[row] : piece.offsets[row + 1]]) if row < present else None
            number = piece.first + row
            end = piece.size * number // piece.n_rows
            document = read_row(data, piece.path, number, end, self.text_key, self.invalid_utf8)
            self._add(document, piece.path, encoded)
            row = encoded.lines = row + 1
        encoded.lines = 0  # rows have their own numbers

    def _add_files(self, piece: Texts, encoded: Encoded) -> None:
        for path, end in zip(piece.paths, piece.ends, strict=True):
            data, consumed = _read_whole(path)
            encoded.end = end
            if self.is_native:
                taken = self._encode_texts(data, np.array([0, len(data)]), 0)
                self._take(encoded, taken)
                if taken[4]:
                    continue
            is_compressed = path.suffix.lower() in COMPRESSED
            self._add(read_text(data, path, is_compressed, consumed, self.invalid_utf8), path, encoded)
        encoded.lines = 0

    def _encode_texts(self, data, offsets: np.ndarray, first: int) -> tuple:
        return native().encode_texts(self.tokenizer._native, data, offsets, first, self.eod, self.drop_empty)

    def _take(self, encoded: Encoded, batch: tuple) -> None:
        """Add what the C++ reader gave."""
        ids, sizes, text_bytes, blank, lines = batch
        encoded.ids.append(ids)
        encoded.sizes.append(sizes)
        encoded.text_bytes += text_bytes
        encoded.blank += blank
        encoded.lines += lines

    def _add(self, document: Document, path: Path, encoded: Encoded) -> None:
        if document.data is None:
            encoded.skipped += 1
            return
        encoded.repaired += not document.valid
        if self.drop_empty and not document.data.decode().strip():
            encoded.blank += 1
            return
        ids = self.tokenizer.encode_array(document.data)
        if self.tokenizer.decode_bytes(ids) != document.data:
            what = f"the document that ends at byte {document.end}"
            raise ValueError(f"{path}: {what} must decode to itself, but it does not; report this")
        if self.eod:
            ids = np.append(ids, np.uint16(0))
        if len(ids) > MAX_DOCUMENT:
            what = f"the document that ends at byte {document.end}"
            raise ValueError(f"{path}: {what} must have at most {MAX_DOCUMENT} tokens, got {len(ids)}; split it")
        encoded.ids.append(ids)
        encoded.sizes.append(np.array([len(ids)], np.int32))
        encoded.text_bytes += len(document.data)


def _read_whole(path: Path) -> tuple[bytes | bytearray, int]:
    """Return the decompressed bytes of a file, held once however many they are, and its size."""
    if path.suffix.lower() not in COMPRESSED:
        data = path.read_bytes()
        return data, len(data)
    data = bytearray()
    with InputFile(path) as file:
        while block := file.read(1 << 20):
            data += block
        return data, file.consumed()
