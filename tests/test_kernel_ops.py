"""The ops' own tests with the CUDA half under them: its host code and kernels, on the emulated device.

The first checks of `make test-gpu`, without a GPU: `make test-kernels` runs them.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OTHERS = {
    "cpu_sanitizers",
    "cuda_messages",
    "cuda_step",
    "missing_library",
    "plan",
    "segments",
    "stable_abi",
}  # not about the ops
FILES = [
    *sorted(path.name for path in TESTS.glob("test_wkv_*.py") if path.stem.removeprefix("test_wkv_") not in OTHERS),
    "test_gpu_wkv.py",
]
FEW_TESTS = {"test_wkv_cuda_errors.py", "test_wkv_memory.py"}  # most of what they hold is about the CPU or a real GPU

pytestmark = [pytest.mark.cpu, pytest.mark.kernels]


@pytest.mark.parametrize("name", FILES)
def test_ops_on_the_emulated_device(name):
    # -s: what the emulator writes before it ends the process must not be lost
    command = [sys.executable, "-m", "pytest", "-s", "--device", "emulated", TESTS / name]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > (1 if name in FEW_TESTS else 5)


def test_files_are_there():
    assert {"test_wkv_forward.py", "test_wkv_backward.py", "test_wkv_state.py", "test_wkv_opcheck.py"} <= set(FILES)
