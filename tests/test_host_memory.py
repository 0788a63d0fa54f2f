"""keep_freed_memory(): a tensor of the size of one that was freed costs no page faults."""

import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_ext import host_memory

PROGRAM = """
import resource, sys, torch
from rwkv_ext.host_memory import keep_freed_memory

def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
first = min(faults(64) for _ in range(4))
kept = keep_freed_memory()
print(kept, first, min(faults(64) for _ in range(10)))  # the heap grows to where it stays in a few steps
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_freed_memory_is_used_again():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=True
    )
    kept, before, after = result.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert int(before) > 64 * 4  # there are 256 pages in a MB; huge ones may serve most of it
    assert int(after) < int(before) / 8


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(host_memory.ctypes, "CDLL", None)
    assert host_memory.keep_freed_memory() is False
