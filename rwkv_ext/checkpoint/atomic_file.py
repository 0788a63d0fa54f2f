"""atomic_write, atomic_folder: a file or folder appears whole or not at all, and what was there survives a failure."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: str | os.PathLike, write: Callable[[BinaryIO], object], where: str) -> None:
    """Call write(file) on a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    Raises OSError that begins with `where` and names the path; the temporary file is removed then.
    """
    path = Path(path)
    temporary = _beside(path, "tmp")
    try:
        durable_write(temporary, write)
        os.replace(temporary, path)
    except OSError as error:
        raise _named(error, path, where) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def atomic_folder(
    path: str | os.PathLike, fill: Callable[[Path], object], replaceable: Callable[[str], object], where: str
) -> None:
    """Call fill(folder) on a temporary folder beside `path`, then put it in the place of `path`.

    A folder that is there already is replaced if replaceable(name) holds for everything in it; FileExistsError
    otherwise, and where `path` is a file. Raises OSError that begins with `where` and names the path; what was there
    is there again then. A power cut between the last two renames leaves it beside, as .NAME.(numbers).old.
    """
    path = Path(os.path.realpath(path))
    if path.exists():
        _refuse_to_replace(path, replaceable, where)
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    try:
        temporary.mkdir()
        fill(temporary)
        sync_folder(temporary)
        try:
            if path.exists():
                path.rename(old)
            temporary.rename(path)
        except BaseException:  # Ctrl-C too
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    except OSError as error:
        raise _named(error, path, where) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def durable_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) on a new file and wait until it is on the disk."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; the files themselves are on the disk already."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.{suffix}")


def _named(error: OSError, path: Path, where: str) -> OSError:
    message = (
        f"{where}: {path} could not be written ({error.strerror or error}); free space or choose another path, "
        "nothing that existed was changed"
    )
    return OSError(message) if error.errno is None else OSError(error.errno, message)


def _refuse_to_replace(path: Path, replaceable: Callable[[str], object], where: str) -> None:
    if not path.is_dir():
        raise FileExistsError(f"{where}: {path} must be a folder or not exist, is a file; choose another path")
    others = sorted(entry.name for entry in path.iterdir() if not replaceable(entry.name))
    if others:
        raise FileExistsError(
            f"{where}: {path} must hold nothing but what is to be replaced, has also {', '.join(others[:5])}"
            f"{' ...' if len(others) > 5 else ''}; choose another path"
        )
