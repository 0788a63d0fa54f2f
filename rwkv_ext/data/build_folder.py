"""BuildFolder: where a shard is made before it appears, with a journal to go on from after a crash."""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

from rwkv_ext.checkpoint.atomic_file import sync_folder
from rwkv_ext.data.binidx import shard_files

JOURNAL, LOCK = "journal", "lock"


class BuildFolder:
    """The hidden folder .NAME.building beside the shard NAME, for one process at a time.

    Its journal is a line of JSON for each record, the first of which says what is built. Opened for the same again, the
    last whole record is there as `record`; opened for anything else, the folder is emptied first. Used in a `with`
    block, it is removed at the end, but stays where the block fails after a record, except with ValueError: then the
    input or an option is at fault.
    """

    def __init__(self, out: str | os.PathLike, identity: str):
        self.bin_path, _ = shard_files(out)
        self.name = self.bin_path.name[: -len(".bin")]
        self.path = self.bin_path.with_name(f".{self.name}.building")
        self.identity = identity
        self.record: dict | None = None  # the last one that was written
        self.replaced = False  # there was one of something else

    def __enter__(self) -> "BuildFolder":
        try:
            self.bin_path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        except OSError as error:
            message = f"cannot create the shard: {error.strerror}; choose a name in a folder that you may write to"
            raise OSError(error.errno, message, str(self.bin_path)) from error
        try:
            self._open_journal()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._journal.close()
        if kind is None or self.record is None or issubclass(kind, ValueError):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def write(self, record: dict) -> None:
        """Add a record; what it speaks of must be on the disk."""
        sync_folder(self.path)  # the names of those files
        line = json.dumps(record).encode() + b"\n"
        while line:
            line = line[self._journal.write(line) :]
        os.fsync(self._journal.fileno())
        self.record = record

    def _take_lock(self) -> int:
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path)
            try:
                descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                if self.path.is_symlink():  # to nothing
                    raise
                continue  # another process has just removed the folder
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(self.path / LOCK)):
                        return descriptor
            except BlockingIOError as error:
                os.close(descriptor)
                advice = "wait for it or choose another name"
                raise ValueError(f"{self.bin_path}: another process is building this shard; {advice}") from error
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _open_journal(self) -> None:
        path = self.path / JOURNAL
        records, end = _read_records(path)
        if not records or records[0] != {"identity": self.identity}:
            self.replaced = len(records) > 1
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != LOCK:
                    entry.unlink()
            path.write_bytes(json.dumps({"identity": self.identity}).encode() + b"\n")
            end = path.stat().st_size
        elif len(records) > 1:
            self.record = records[-1]
        self._journal = open(path, "r+b", buffering=0)
        self._journal.truncate(end)  # of a record that was not written to its end
        self._journal.seek(end)


def _read_records(path: Path) -> tuple[list[dict], int]:
    """Return the records up to the first that was not written to its end, and where that begins."""
    records, end = [], 0
    with contextlib.suppress(FileNotFoundError, ValueError), open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            records.append(json.loads(line))
            end += len(line)
    return records, end
