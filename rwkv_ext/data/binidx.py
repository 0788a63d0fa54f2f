"""Token shards in the Megatron "binidx" format: PREFIX.bin holds the tokens, PREFIX.idx the documents.

PREFIX.bin is the ids of all documents back to back, uint16. PREFIX.idx has no padding; all is little-endian:
    9 bytes   magic `MMIDIDX` and two zeros         int32[N]  tokens of each document
    uint64    version, 1                            int64[N]  byte offset of each document in PREFIX.bin
    uint8     dtype code, 8 for uint16              int64[M]  0, 1, .. N
    uint64 N  documents      uint64 M = N + 1
Training samples address PREFIX.bin as one stream; the documents matter to packing, `document` and the checks.
"""

import bisect
import hashlib
import os
import re
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np

from rwkv_ext.checkpoint.atomic_file import sync_folder

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
UINT16 = 8
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", UINT16: "<u2"}
MAX_DOCUMENT = 2**31 - 1  # sizes are int32
BLOCK = 1 << 20  # documents or tokens looked at together
REPAIR = "copy both files again, or rebuild them with `rwkv-ext data build`"


def shard_files(prefix: str | os.PathLike) -> tuple[Path, Path]:
    """Return (PREFIX.bin, PREFIX.idx); either file's own name stands for its prefix as well."""
    name = os.fspath(prefix)
    name = name[:-4] if name.endswith((".bin", ".idx")) else name
    return Path(name + ".bin"), Path(name + ".idx")


def part_names(name: str, parts: int) -> list[str]:
    """Return NAME-00000-of-00003 and so on; sorted by name they are in their order, however many there are."""
    width = max(5, len(str(parts - 1)))
    return [f"{name}-{part:0{width}d}-of-{parts:05d}" for part in range(parts)]


def is_part(file_name: str, name: str) -> bool:
    """Return whether a file is NAME-00000-of-00003.bin or .idx, of whatever numbers."""
    return re.fullmatch(re.escape(name) + r"-\d{5,}-of-\d{5,}\.(bin|idx)", file_name) is not None


class BinidxReader:
    """Read one shard through memory maps: opening costs the same for a megabyte and a terabyte.

    Opening checks the header, the sizes of both files, and offsets and tokens (below vocab_size) in 16
    places; `check_documents` and `check_tokens` look at everything. FileNotFoundError for a missing file,
    ValueError for a damaged one, with the path, what was expected, what was found and what to do.

    Attributes: n_tokens, n_documents; tokens [n_tokens] (uint16, or the other integer type the shard holds);
    sizes int32 [n_documents] in tokens; offsets int64 [n_documents] in bytes.
    """

    def __init__(self, prefix: str | os.PathLike, vocab_size: int = 65536):
        self.bin_path, self.idx_path = shard_files(prefix)
        self.prefix = str(self.bin_path)[: -len(".bin")]
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                advice = "a shard is a .bin and an .idx of the same name, made by `rwkv-ext data build`"
                raise FileNotFoundError(f"{path}: no such file; {advice}")
        self.dtype, self.n_documents, n_starts = self._read_header()
        self.sizes = _map(self.idx_path, "<i4", HEADER.size, self.n_documents)
        self.offsets = _map(self.idx_path, "<i8", HEADER.size + 4 * self.n_documents, self.n_documents)
        self._starts = _map(self.idx_path, "<i8", HEADER.size + 12 * self.n_documents, n_starts)
        span, whole = f"{self._starts[0]} to {self._starts[-1]}", f"0 to {self.n_documents}"
        if span != whole:
            where = f"(entries at bytes {self._start_at(0)} and {self._start_at(n_starts - 1)})"
            raise self._damaged(self.idx_path, f"the document list must run from {whole}", f"{span} {where}")
        self.n_tokens = self._count_tokens()
        self.tokens = _map(self.bin_path, self.dtype, 0, self.n_tokens)
        for begin in np.linspace(0, max(0, self.n_documents - 256), 16, dtype=np.int64):
            self._check_offsets(int(begin), int(begin) + 256)
        known = np.ones(vocab_size, dtype=bool)
        for begin in np.linspace(0, max(0, self.n_tokens - 4096), 16, dtype=np.int64):
            self._check_tokens(int(begin), int(begin) + 4096, known)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document, a view of the file; IndexError outside 0 .. n_documents - 1."""
        if not 0 <= index < self.n_documents:
            raise IndexError(f"{self.prefix}: document must be 0 to {self.n_documents - 1}, got {index}")
        start = int(self.offsets[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[index])]

    def fingerprint(self) -> str:
        """Return a SHA-256 of both files' sizes and 64 blocks of each: cheap, whatever their size."""
        digest = hashlib.sha256()
        for path in (self.idx_path, self.bin_path):
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            with open(path, "rb") as file:
                for position in np.linspace(0, max(0, size - 4096), 64, dtype=np.int64):
                    file.seek(int(position))
                    digest.update(file.read(4096))
        return digest.hexdigest()

    def check_documents(self) -> None:
        """Check every size and offset; ValueError names the first document that is not where it should be."""
        for begin in range(0, self.n_documents, BLOCK):
            self._check_offsets(begin, begin + BLOCK)
        for begin in range(0, len(self._starts) - 1, BLOCK):
            block = self._starts[begin : begin + BLOCK + 1]
            if (descents := block[1:] < block[:-1]).any():
                at = begin + 1 + int(descents.argmax())
                least = f"entry {at} of the document list must be at least {self._starts[at - 1]}"
                raise self._damaged(self.idx_path, least, f"{self._starts[at]} (at byte {self._start_at(at)})")

    def check_tokens(self, known: np.ndarray) -> None:
        """Check every token against `known`, bool [vocabulary size]; ValueError names the first unknown."""
        for begin in range(0, self.n_tokens, BLOCK):
            self._check_tokens(begin, begin + BLOCK, known)

    def eod_share(self, sample: int = 4096) -> float:
        """Return the share of documents that end in token 0, from up to `sample` of them spread evenly."""
        count = min(sample, self.n_documents)
        if not count:
            return 0.0
        picked = np.unique(np.linspace(0, self.n_documents - 1, count, dtype=np.int64)).tolist()
        return sum(self.document(i)[-1:].tolist() == [0] for i in picked) / len(picked)

    def _read_header(self) -> tuple[np.dtype, int, int]:
        found = self.idx_path.stat().st_size
        if found < HEADER.size:
            need = f"must have a header of {HEADER.size} bytes"
            raise self._damaged(self.idx_path, need, f"{found} bytes")
        with open(self.idx_path, "rb") as file:
            magic, version, code, n_sizes, n_starts = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC:
            raise ValueError(
                f"{self.idx_path}: must start with {MAGIC!r}, got {magic!r}; this is no binidx index: "
                "give the name of a shard"
            )
        rebuild = "rebuild the shard with `rwkv-ext data build`"
        if version != 1:
            raise ValueError(f"{self.idx_path}: version must be 1, got {version} (at byte 9); {rebuild}")
        if code not in DTYPES:
            raise ValueError(
                f"{self.idx_path}: dtype code must be {UINT16} (uint16) or 1 to 5 (other integers), got "
                f"{code} (at byte 17); {rebuild} (6 and 7 mean other types in other programs)"
            )
        expected = HEADER.size + 12 * n_sizes + 8 * n_starts
        if found != expected or n_starts == 0:
            counts = f"{n_sizes} documents (at byte 18) and a list of {n_starts} (at byte 26, at least 1)"
            need = f"must have {expected} bytes for {counts}"
            cut = f": it is cut off at byte {found}" if found < expected else ""
            raise self._damaged(self.idx_path, need, f"{found} bytes{cut}")
        return np.dtype(DTYPES[code]), n_sizes, n_starts

    def _count_tokens(self) -> int:
        found, item = self.bin_path.stat().st_size, self.dtype.itemsize
        expected = int(self.offsets[-1]) + int(self.sizes[-1]) * item if self.n_documents else 0
        need = f"must have {expected} bytes, where the last document of {self.idx_path.name} ends"
        if found < expected:
            broken = bisect.bisect_right(self.offsets, found) - 1  # the first document that is not whole
            cut = f"it is cut off at byte {found}, in document {broken} of {self.n_documents}"
            raise self._damaged(self.bin_path, need, f"{found} bytes: {cut}")
        if found % item:
            raise self._damaged(self.bin_path, f"must hold whole tokens of {item} bytes", f"{found} bytes")
        if found != expected:
            raise self._damaged(self.bin_path, need, f"{found} bytes: the two files do not belong together")
        return found // item

    def _start_at(self, entry: int) -> int:
        return HEADER.size + 12 * self.n_documents + 8 * entry

    def _check_offsets(self, begin: int, end: int) -> None:
        begin = max(0, begin - 1)  # a document is checked against the one before it
        sizes, offsets = self.sizes[begin:end].astype(np.int64), self.offsets[begin:end]
        ends = offsets + sizes * self.dtype.itemsize
        expected = np.concatenate([offsets[:1] if begin else [0], ends[:-1]])[: len(offsets)]
        bad = (sizes < 0) | (offsets != expected)
        if bad.any():
            at = int(bad.argmax())
            size_at = HEADER.size + 4 * (begin + at)
            place = HEADER.size + 4 * self.n_documents + 8 * (begin + at)
            need = f"document {begin + at} must start at byte {expected[at]} and have a size of 0 or more"
            got = f"byte {offsets[at]} (entry at byte {place}), size {sizes[at]} (entry at byte {size_at})"
            raise self._damaged(self.idx_path, need, got)

    def _check_tokens(self, begin: int, end: int, known: np.ndarray) -> None:
        block = self.tokens[begin:end]
        bad = (block < 0) | (block >= len(known))
        bad |= ~known[np.where(bad, 0, block)]
        if bad.any():
            at = int(bad.argmax())
            place = (begin + at) * self.dtype.itemsize
            raise ValueError(
                f"{self.bin_path}: the token at byte {place} must be an id of the vocabulary, got "
                f"{block[at]}; the file is damaged or made with another vocabulary: {REPAIR}"
            )

    def _damaged(self, path: Path, expected: str, found: str) -> ValueError:
        return ValueError(f"{path}: {expected}, got {found}; the file is damaged: {REPAIR}")


def _map(path: Path, dtype, offset: int, count: int) -> np.ndarray:
    if count == 0:  # an empty range cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


class BinidxWriter:
    """Write one shard of uint16 tokens, document by document; however many there are, none is held in memory.

    Nothing appears under the final names before `close`, which forces the files to the disk and renames them,
    .idx last. Use it in a `with` block, which closes it: an exception inside, Ctrl-C included, removes the
    temporary files and leaves an older shard as it was. FileExistsError where the shard exists, unless
    `overwrite`; OSError where a file cannot be written, such as on a full disk.

    Example:
        >>> with BinidxWriter("corpus") as writer:
        ...     writer.add_document([33520, 4600, 0])
    """

    def __init__(self, prefix: str | os.PathLike, overwrite: bool = False):
        self.bin_path, self.idx_path = shard_files(prefix)
        self._overwrite = overwrite
        self._check_free()
        self.n_tokens = self.n_documents = 0
        # The process number keeps two writers of the same shard apart.
        names = [f"{path.name}.{os.getpid()}.tmp" for path in (self.bin_path, self.idx_path)]
        self._temporary = [self.bin_path.with_name(name) for name in names]
        try:
            self.bin_path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary[0], "wb", buffering=1 << 20)
            try:
                self._index = open(self._temporary[1], "wb", buffering=1 << 20)
            except OSError:
                self._file.close()
                self._temporary[0].unlink()
                raise
        except OSError as error:
            message = f"cannot create the shard: {error.strerror}; choose a name in a folder that you may write to"
            raise OSError(error.errno, message, str(self.bin_path)) from error
        self._index.write(bytes(HEADER.size))  # the sizes follow as they come; `close` writes the header and the rest

    def add_document(self, ids) -> None:
        """Append one document: integers 0 to 65535 in one dimension. Refused ids change nothing."""
        self._check_open("add_document")
        ids = _uint16(ids, "add_document", MAX_DOCUMENT)
        self._add(ids, [len(ids)])

    def add_documents(self, ids, sizes) -> None:
        """Append documents whose ids stand back to back, sizes [n] tokens each. What is refused changes nothing."""
        self._check_open("add_documents")
        ids, sizes = _uint16(ids, "add_documents"), np.asarray(sizes, dtype=np.int64)
        if sizes.ndim != 1 or sizes.sum() != len(ids) or ((sizes < 0) | (sizes > MAX_DOCUMENT)).any():
            need = f"one dimension, 0 to {MAX_DOCUMENT} each, that add up to the {len(ids)} ids"
            raise ValueError(f"add_documents: sizes must have {need}, got {sizes.sum()} in shape {sizes.shape}")
        self._add(ids, sizes)

    def _add(self, ids: np.ndarray, sizes) -> None:
        try:
            self._file.write(ids.data)
            self._index.write(np.asarray(sizes, dtype="<i4").data)
        except BaseException as error:
            self._abandon(error)
            raise
        self.n_documents += len(sizes)
        self.n_tokens += len(ids)

    def close(self) -> None:
        """Write the index, force both files to the disk and give them their names. Once only."""
        self._check_open("close")
        try:
            _sync_and_close(self._file)
            finish_index(self._index, self.n_documents)
            _sync_and_close(self._index)
            self._check_free()  # another writer may have been faster
            # Between the renames there is no index at all rather than one that belongs to other tokens.
            self.idx_path.unlink(missing_ok=True)
            for temporary, path in zip(self._temporary, (self.bin_path, self.idx_path), strict=True):
                os.replace(temporary, path)
            sync_folder(self.bin_path.parent)
        except BaseException as error:
            self._abandon(error)
            raise

    def abort(self) -> None:
        """Remove the temporary files; the shard is not written."""
        for file in (self._file, self._index):
            with suppress(OSError):  # a full disk refuses what is still in the buffer as well
                file.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def __enter__(self) -> "BinidxWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _check_free(self) -> None:
        for path in (self.bin_path, self.idx_path):
            if path.is_dir() or (path.exists() and not self._overwrite):
                advice = "choose another name, remove it or overwrite it"
                raise FileExistsError(f"{path}: already exists; {advice}")

    def _check_open(self, where: str) -> None:
        if self._file.closed:
            advice = "it was closed or it failed; open a new one"
            raise ValueError(f"{where}: the writer of {self.bin_path} must be open, but {advice}")

    def _abandon(self, error: BaseException) -> None:
        self.abort()
        if isinstance(error, OSError) and error.strerror:
            place = f"after {self.n_documents} documents and {self.n_tokens} tokens"
            advice = "nothing was kept: make room on the disk and run it again"
            message = f"cannot write {place}: {error.strerror}; {advice}"
            raise OSError(error.errno, message, str(self.bin_path)) from error


def finish_index(index, n_documents: int) -> None:
    """Make an index of a file, open to read and write, that ends behind the sizes: offsets, document numbers, header.

    All in pieces: the index of a large corpus has gigabytes.
    """
    offset = 0
    index.flush()
    with open(index.name, "rb") as written:
        written.seek(HEADER.size)
        for begin in range(0, n_documents, BLOCK):
            sizes = np.fromfile(written, "<i4", min(BLOCK, n_documents - begin))
            ends = offset + 2 * np.cumsum(sizes, dtype="<i8")
            index.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").data)
            offset = int(ends[-1])
    for begin in range(0, n_documents + 1, BLOCK):
        index.write(np.arange(begin, min(begin + BLOCK, n_documents + 1), dtype="<i8").data)
    index.seek(0)
    index.write(HEADER.pack(MAGIC, 1, UINT16, n_documents, n_documents + 1))


def _uint16(ids, where: str, most: int | None = None) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        ids = ids.astype(np.uint16)  # an empty list has no type
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TypeError(f"{where}: ids must be integers in one dimension, got {ids.dtype} of shape {ids.shape}")
    if most is not None and len(ids) > most:
        raise ValueError(f"{where}: ids must be at most {most} tokens, got {len(ids)}; split the document")
    if ids.dtype != np.uint16 and ids.size and (ids.min() < 0 or ids.max() > 65535):
        raise ValueError(f"{where}: ids must be 0 to 65535, got {ids.min()} to {ids.max()}")
    return np.ascontiguousarray(ids, dtype="<u2")


def _sync_and_close(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
