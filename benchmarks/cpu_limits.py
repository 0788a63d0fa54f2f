"""The limits of this processor, probed by a small program that is compiled for the purpose (cpu_limits.cpp)."""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_suffix(".cpp")
LANES = {  # instruction set as rwkv_ext names it: bytes of a vector, compiler flags
    "avx512": (64, ("-mavx512f", "-mfma")),
    "avx2": (32, ("-mavx2", "-mfma")),
    "generic": (16, ()),
}


class Limits(NamedTuple):
    multiply_adds: float  # of single numbers per second, one thread
    update_bytes: float  # per second, read and written, all threads


def probe(instruction_set: str, threads: int = 1, seconds: float = 1.0, mebibytes: int = 512) -> Limits:
    """Return the limits with vectors of that instruction set, the best of what fits into `seconds` each."""
    lane_bytes, flags = LANES[instruction_set]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "cpu_limits"
        compiler = os.environ.get("CXX", "g++")
        flags = ["-O3", "-std=c++20", "-Wno-psabi", f"-DLANE_BYTES={lane_bytes}", *flags, "-pthread"]
        subprocess.run([compiler, *flags, "-o", program, SOURCE], check=True)
        arguments = [str(seconds), str(mebibytes), str(threads)]
        lines = subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout.split()
    return Limits(*map(float, lines))
