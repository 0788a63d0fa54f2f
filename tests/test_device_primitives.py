"""Every device primitive against the PTX ISA's tables: in the emulator everywhere, and on a GPU where there is one.

The kernels' emulated tests stand on the emulator's primitives; that they are what the hardware does is shown here.
"""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from device_primitives.primitive_cases import CASES, errors
from emulator.build import RUNTIME
from gpu_tools import device_program

ROOT = Path(__file__).parent.parent
EMULATOR = ROOT / "tests" / "emulator"
SOURCE = ROOT / "tests" / "device_primitives" / "main.cu"


def run(program, folder):
    """Give fresh inputs to every case of the program; return name -> (input, output bytes)."""
    listed = subprocess.run([program, "list"], capture_output=True, text=True, check=True).stdout.split()
    names, sizes = listed[::3], [int(x) for x in listed[2::3]]
    assert names == list(CASES)
    random = np.random.default_rng(0)
    given = {name: case.make(random) for name, case in CASES.items()}
    assert [x.nbytes for x in given.values()] == [int(x) for x in listed[1::3]]
    (folder / "in").write_bytes(b"".join(x.tobytes() for x in given.values()))
    done = subprocess.run([program, "run", folder / "in", folder / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = np.split(np.fromfile(folder / "out", np.uint8), np.cumsum(sizes)[:-1])
    return {name: (given[name], output.tobytes()) for name, output in zip(names, outputs, strict=True)}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    program = folder / "device_primitives"
    includes = ["-I", EMULATOR, "-I", ROOT / "csrc"]
    sources = [*(EMULATOR / f"{name}.cpp" for name in RUNTIME), "-x", "c++", SOURCE]
    subprocess.run(["g++", "-std=c++20", "-O1", *includes, *sources, "-o", program], check=True)
    return run(program, folder)


@pytest.fixture(scope="module")
def on_device(tmp_path_factory):
    return run(device_program("device_primitives"), tmp_path_factory.mktemp("device"))


@pytest.mark.parametrize("name", CASES)
def test_device_primitives_emulated(emulated, name):
    assert not (wrong := errors(CASES[name], *emulated[name])), wrong


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_device_primitives_on_the_device(on_device, emulated, name):
    """The same answers, and where nothing rounds the very bits of the emulator."""
    assert not (wrong := errors(CASES[name], *on_device[name])), wrong
    if CASES[name].allowed is None and "pack" not in name:  # a NaN has many names
        assert on_device[name][1] == emulated[name][1]


@pytest.mark.parametrize("name", ["indices", "copies", "product_bf16", "product_tf32", "exponentials", "packs_fp16"])
def test_device_primitives_wrong_answers_are_noticed(emulated, name):
    given, output = emulated[name]
    value = CASES[name].answer(given).reshape(-1)[9]
    changed = bytearray(output)
    size = value.dtype.itemsize if not CASES[name].bf16 else 2
    changed[9 * size + size - 1] ^= 1  # the lowest bit of the exponent, or of the last byte
    assert "1 of" in errors(CASES[name], given, bytes(changed))


def test_device_primitives_all_have_a_case():
    """A primitive added to the header needs a case here."""
    header = (ROOT / "csrc" / "cuda" / "device_primitives.h").read_text()
    names = set(re.findall(r"__device__ __forceinline__ [\w<>*:& ]+?[*& ](\w+)(?:<\w+>)?\(", header))
    assert {"mma_tf32", "load_matrices", "wait_copies", "unpack", "exp2_fast"} <= names
    used = (SOURCE.parent / "cases.cuh").read_text()
    address = {"shared_address"}  # how the header's own PTX names shared memory
    assert not {name for name in names - address if not re.search(rf"\b{name}\b", used)}
