"""compute-sanitizer's memcheck and racecheck over the smallest case of every kernel and over every primitive."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from device_primitives.primitive_cases import CASES
from gpu_tools import device_program, needs_kernels

PROGRAM = Path(__file__).parent / "gpu_sanitized.py"
ERROR = 97  # what compute-sanitizer answers when it found something


def watch(tool, *command):
    if not (sanitizer := shutil.which("compute-sanitizer")):
        pytest.skip("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR), *map(str, command)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device or its driver")
    assert result.returncode == 0, output[-8000:]
    return output


@pytest.mark.cuda
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_gpu_sanitizer_primitives(tool, tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "in").write_bytes(b"".join(case.make(random).tobytes() for case in CASES.values()))
    watch(tool, device_program("device_primitives"), "run", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("tool", [pytest.param(tool, marks=needs_kernels) for tool in ("memcheck", "racecheck")])
def test_gpu_sanitizer_kernels(tool):
    assert "18 cases ran" in watch(tool, sys.executable, PROGRAM)


def test_gpu_sanitizer_program_runs_on_the_cpu():
    result = subprocess.run([sys.executable, PROGRAM, "--device", "cpu"], capture_output=True, text=True)
    assert result.returncode == 0 and "18 cases ran" in result.stdout, result.stderr
