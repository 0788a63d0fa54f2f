"""The build: what setup.py and make refuse and how they say so, and what lies in the libraries they made."""

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_ext import _C, _load

ROOT = Path(__file__).parent.parent


def setup_py(**environment):
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RWKV_EXT_CUDA": "yes"}, "RWKV_EXT_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"RWKV_EXT_CUDA": "1", "CUDA_HOME": "/no"}, "RWKV_EXT_CUDA=1 but there is no nvcc; install the CUDA toolkit"),
        ({"RWKV_EXT_CUDA": "1", "CUDA_HOME": "FAKE"}, "does not answer like nvcc; set CUDA_HOME"),
    ],
    ids=["bad-switch", "no-nvcc", "not-nvcc"],
)
def test_setup_refuses_with_a_sentence(environment, message, tmp_path):
    if environment.get("CUDA_HOME") == "FAKE":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho nothing of use\n")
        (tmp_path / "bin" / "nvcc").chmod(0o755)
        environment = {**environment, "CUDA_HOME": str(tmp_path)}
    result = setup_py(**environment)
    assert result.returncode == 1
    assert message in result.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine: CUDA code is not built here")
@pytest.mark.parametrize("arch", ["7.5", "hopper"])
def test_setup_refuses_architectures_below_8(arch):
    result = setup_py(RWKV_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST=arch)
    assert result.returncode == 1
    assert f"TORCH_CUDA_ARCH_LIST: '{arch}' must look like 9.0 or 9.0+PTX and be 8.0 or newer" in result.stderr


def cubin_architectures(library: bytes) -> set[int]:
    """The architectures, such as 90, of the binary device code in a library: the fat binary's headers say them."""
    found = set()
    for match in re.finditer(b"\x50\xed\x55\xba", library):
        version, header, size = struct.unpack_from("<HHQ", library, match.start() + 4)
        entry, end = match.start() + header, match.start() + header + size
        while version == 1 and entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", library, entry)
            if kind == 2:  # 1 is PTX
                found.add(struct.unpack_from("<I", library, entry + 28)[0])
            entry += entry_header + entry_size
    return found


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine: CUDA code is not built here")
def test_the_library_holds_code_for_every_architecture_it_names():
    info = _load.build_info()
    assert info["cuda_version"], "nvcc is here but the CUDA code is not built: `make test` builds it"
    named = {int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", info["cuda_archs"])}
    assert cubin_architectures(Path(_C.__file__).read_bytes()) == named


def test_make_names_a_missing_python():
    result = subprocess.run(
        ["make", "prerequisites", "PYTHON=/nowhere/python3"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "rwkv_ext needs Python 3.10 or newer: /nowhere/python3 is not there" in result.stdout


def test_make_names_a_missing_compiler():
    result = subprocess.run(
        ["make", "prerequisites", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env={**os.environ, "CXX": "/nowhere/g++"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "rwkv_ext needs a C++20 compiler" in result.stdout


def test_only_torch_api_includes_torch():
    pattern = re.compile(r'#include [<"](torch|ATen|c10)/')
    found = [p.name for p in ROOT.glob("csrc/**/*") if p.is_file() and pattern.search(p.read_text())]
    assert found == ["torch_api.h"]
