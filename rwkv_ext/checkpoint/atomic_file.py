"""atomic_write: a file appears whole or not at all, and what was there before survives every failure; sync_folder."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: str | os.PathLike, write: Callable[[BinaryIO], object], where: str) -> None:
    """Call write(file) on a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    Raises OSError that begins with `where` and names the path; the temporary file is removed then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    # torch.save reports a failed write as RuntimeError; nothing else in `write` touches the outside world.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        message = (
            f"{where}: {path} could not be written ({reason}); free space or choose another path, "
            "nothing that existed was changed"
        )
        number = getattr(error, "errno", None)
        raise (OSError(message) if number is None else OSError(number, message)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; the files themselves are on the disk already."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
