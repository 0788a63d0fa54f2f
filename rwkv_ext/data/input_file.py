"""Files that documents come from: plain, compressed (.gz, .zst) or standard input, read as one stream of bytes."""

import io
import sys
import zlib
from pathlib import Path

STANDARD_INPUT = Path("-")
COMPRESSED = (".gz", ".zst")
_CHUNK = 1 << 16


def inner_suffix(path: Path) -> str:
    """Return what the bytes are, in lower case: ".jsonl" for a.jsonl, a.jsonl.gz and standard input."""
    if path == STANDARD_INPUT:
        return ".jsonl"
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def optional_package(name: str, path: Path):
    """Import a package that only some kinds of files need; ImportError says how to get it."""
    try:
        return __import__(name)
    except ImportError as error:
        package = name.partition(".")[0]
        advice = f"pip install {package}, or rwkv_ext[data]"
        raise ImportError(
            f"{path}: reading it takes the package {package}, which is not installed; {advice}"
        ) from error


class InputFile(io.BufferedReader):
    """The decompressed bytes of one file, in binary mode.

    Reading raises ValueError, naming the file and how far it was read, where compressed data are damaged or cut off.
    """

    def __init__(self, path: Path):
        if path == STANDARD_INPUT and sys.stdin is None:
            raise ValueError("-: standard input must be open, but this process was started without; name a file")
        self._file = sys.stdin.buffer if path == STANDARD_INPUT else open(path, "rb")
        self.is_compressed = path.suffix.lower() in COMPRESSED
        raw = _Decompressed(self._file, path) if self.is_compressed else _Plain(self._file)
        super().__init__(raw, 1 << 20)

    def consumed(self) -> int:
        """Return how many bytes of the file itself have been read."""
        return self._file.tell()


class _Plain(io.RawIOBase):
    def __init__(self, file):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._file.readinto(buffer)

    def close(self) -> None:
        if self._file is not sys.stdin.buffer:
            self._file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """All members of a .gz or frames of a .zst file, one after the other."""

    def __init__(self, file, path: Path):
        self._file, self._path = file, path
        if path.suffix.lower() == ".gz":
            self._new, self._errors = lambda: zlib.decompressobj(31), (zlib.error,)
        else:
            zstandard = optional_package("zstandard", path)
            self._new = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._errors = (zstandard.ZstdError,)
        self._part = None  # the member or frame that is being read
        self._began = False  # any of them
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            chunk = self._file.read(_CHUNK)
            if not chunk:
                if self._part is not None or not self._began:
                    raise self._damaged("a file that is cut off")
                return 0
            self._ready = memoryview(self._decompress(chunk))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self, chunk: bytes) -> bytes:
        parts = []
        while chunk:
            if self._part is None:
                chunk = chunk.lstrip(b"\0") if self._began else chunk  # archives on tape are padded with zeros
                if not chunk:
                    break
                self._part, self._began = self._new(), True
            try:
                parts.append(self._part.decompress(chunk))
            except self._errors as error:
                raise self._damaged(str(error)) from error
            if not self._part.eof:
                break
            chunk, self._part = self._part.unused_data, None
        return b"".join(parts)

    def _damaged(self, got: str) -> ValueError:
        need = f"must be a whole {self._path.suffix} file"
        return ValueError(f"{self._path}: {need}, got {got} near byte {self._file.tell()}; copy it again")
