"""Without the compiled op library the package imports, and an op says how to build it."""

import subprocess
import sys

PROGRAM = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "rwkv_ext._C":
            raise ImportError("hidden by the test")

sys.meta_path.insert(0, Hide())
import torch, rwkv_ext
from rwkv_ext import _load, ops, reference, testing
inputs = testing.make_inputs("6.0", 1, 3, 2, 4)
assert reference.wkv6(*inputs)[0].shape == (1, 3, 2, 4)
assert not _load.has_cuda_kernels("wkv6_step")
token = [x[:, 0] for x in inputs[:4]]
step = lambda: rwkv_ext.wkv6_step(*token, inputs.u, inputs.state)
for call in (lambda: rwkv_ext.wkv6(*inputs), step, _load.build_info):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


def test_wkv_missing_library():
    """import rwkv_ext works, and so does the reference; an op says how to build the library."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text = (
        "rwkv_ext: the op library rwkv_ext._C is not built or does not load (hidden by the test); build it with "
        "`make build` in a checkout or `pip install --no-build-isolation -e .`, and see `rwkv-ext doctor`"
    )
    assert result.stdout.splitlines() == [text] * 3


OUTDATED = """
from pathlib import Path
import torch

read_text, old, new = Path.read_text, 'm.def("wkv6_step(', 'm.def("wkv9_step(Tensor x)"); '
Path.read_text = lambda *arguments, **options: read_text(*arguments, **options).replace(old, new + old)
import rwkv_ext
from rwkv_ext import testing
try:
    rwkv_ext.wkv6(*testing.make_inputs("6.0", 1, 3, 2, 4))
except RuntimeError as error:
    print(error)
"""


def test_wkv_outdated_library():
    """A checkout whose library is older than its sources imports, and an op says what to do."""
    result = subprocess.run([sys.executable, "-c", OUTDATED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text = (
        "rwkv_ext: the op library rwkv_ext._C is not built or does not load (it is older than csrc/ops.cpp: no "
        "wkv9_step); build it with `make build` in a checkout or "
    )
    assert result.stdout.startswith(text)
