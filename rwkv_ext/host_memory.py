"""keep_freed_memory(): large tensors on the CPU without a page fault for every 4 KB, every time they are made."""

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1
_LARGEST_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for the next allocation, up to 1 GB a piece, instead of returning it.

    By default glibc gives a freed tensor of some MB back to the system, and the next one of its size is made of fresh
    pages, which the kernel clears one by one: an eighth of a small model's training step. The process keeps its peak
    memory in exchange. For a program's start, because it holds for the whole process: train/pretrain.py calls it on the
    CPU. Returns False, and changes nothing, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and library.mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
