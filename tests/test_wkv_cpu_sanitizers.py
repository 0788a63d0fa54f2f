"""The CPU kernels under AddressSanitizer, without torch (wkv_cpu_guarded.cpp); what is built is kept.

Not optimised: that compiles in a third of the time, and every access in the source is one.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulator.build import ROOT, compile_object, compiler

from rwkv_ext import _load

pytestmark = pytest.mark.cpu
FOLDER = ROOT / "build" / "wkv_cpu_guarded"
FLAGS = ["-std=c++20", "-O0", "-g1", "-Wall", "-Wno-psabi", "-fsanitize=address", "-Icsrc", "-Itests"]
SETS = ["generic", "avx2", "avx512"]


def test_wkv_cpu_kernels_stay_inside_their_memory():
    """Every kernel of every instruction set here: nothing outside a row is touched, nothing unset is used."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / "tests/wkv_cpu_guarded.cpp", *(ROOT / f"csrc/cpu/wkv_{name}.cpp" for name in SETS)]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compile_object(source, FLAGS, FOLDER), sources))
    program = FOLDER / "guarded"
    subprocess.run([compiler(), "-fsanitize=address", *map(str, objects), "-o", str(program), "-pthread"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == 0, done.stderr
    cases = dict(re.findall(r"(\w+) (\d+)", done.stdout))
    assert list(cases) == SETS[: SETS.index(_load.build_info()["cpu_instruction_set"]) + 1]
    assert all(int(count) > 100 for count in cases.values())
