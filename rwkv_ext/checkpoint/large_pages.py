"""Memory for weights in pages of 2 MiB: reading each of them once, as a decoded token does, takes fewer page walks."""

import ctypes
import mmap

import torch
from torch import Tensor

_LARGE_PAGE = 1 << 21
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone


def copy_in_large_pages(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a row-major copy of x on the CPU, in large pages where the system has some to give, in others if not."""
    result = torch.empty(x.shape, dtype=dtype, device="cpu")
    _advise(result)
    return result.copy_(x)


def _advise(x: Tensor) -> None:
    """Ask for large pages; before anything is written, because it is for memory that has no pages yet."""
    if _ADVICE is None or x.nbytes < _LARGE_PAGE:
        return
    start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (x.data_ptr() + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    # A refusal, as of a kernel that was built without them, changes nothing but the speed.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _ADVICE)
