"""The crew of threads behind the whole-model step (csrc/cpu/crew.h): an exception in an item reaches every member."""

import os
import subprocess
from pathlib import Path

TESTS = Path(__file__).parent


def test_an_exception_in_an_item_ends_every_members_work(tmp_path):
    """Nobody waits for ever for the item, and no thread dies of it."""
    csrc, program = TESTS.parent / "csrc", tmp_path / "crew_checks"
    sources = [TESTS / "crew_checks.cpp", csrc / "cpu" / "crew.cpp"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-std=c++20", "-O1", "-pthread", f"-I{csrc}", *sources, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
