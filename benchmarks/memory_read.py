"""How fast this machine reads memory: a plain streaming read of a buffer, in C, on one or more threads."""

import ctypes
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rwkv_ext.checkpoint.large_pages import copy_in_large_pages

_SOURCE = """
#include <string.h>
typedef long long Lanes __attribute__((vector_size(64)));
long long read_all(const char* from, long long bytes) {
  Lanes sum[4] = {};
  for (long long i = 0; i + 256 <= bytes; i += 256) {
    Lanes part[4];
    memcpy(part, from + i, sizeof part);
    for (int j = 0; j < 4; ++j) sum[j] += part[j];
  }
  long long total = 0;
  for (int j = 0; j < 4; ++j)
    for (int k = 0; k < 8; ++k) total += sum[j][k];
  return total;
}
"""


class MemoryRead:
    """A buffer much larger than the caches, in large pages as a loaded model's weights are; calling reads it once.

    bytes   what one call reads
    """

    def __init__(self, megabytes: int, threads: int):
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "read.c"), Path(folder, "read.so")
            source.write_text(_SOURCE)
            flags = ["-O3", "-march=native", "-Wno-psabi", "-shared", "-fPIC"]
            subprocess.run(["cc", *flags, "-o", library, source], check=True)
            self._read = ctypes.CDLL(str(library)).read_all
        self._read.argtypes, self._read.restype = (ctypes.c_void_p, ctypes.c_longlong), ctypes.c_longlong
        share = megabytes * 2**20 // threads // 256 * 256
        self.bytes = share * threads
        self._buffer = copy_in_large_pages(torch.ones(self.bytes // 8, dtype=torch.int64), torch.int64)
        self._expected = self.bytes // 8
        self._parts = [(self._buffer.data_ptr() + i * share, share) for i in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self) -> None:
        total = sum(self._pool.map(lambda part: self._read(*part), self._parts))
        if total != self._expected:
            raise RuntimeError(f"MemoryRead: the sum must be {self._expected}, got {total}")
