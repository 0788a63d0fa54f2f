"""largest_file: a full disk for tests, made by the kernel's own limit on the size of a file."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size: int):
    """Let every write beyond `size` bytes of a file fail with OSError, as on a full disk (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
