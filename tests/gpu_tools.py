"""What the tests on a GPU share: the device, their programs, and the tensor cores' bound on errors."""

from pathlib import Path

import pytest
import torch
from wkv_cases import OPS, REFERENCES, assert_rounded

from rwkv_ext import _load, testing

# The CPU stands in where a test of the tests runs without a GPU; pytest skips these tests there otherwise.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROGRAMS = Path(__file__).parent.parent / "build" / "gpu"
NEEDED = [f"wkv{version}_{kind}" for version in (5, 6) for kind in ("forward", "backward", "step")]

needs_kernels = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not _load.has_cuda_kernels(*NEEDED),
        reason="this build of rwkv_ext has no CUDA kernels; RWKV_EXT_CUDA=1 make build",
    ),
]


def device_program(name: str) -> Path:
    """Return the program's path, or fail with what builds it."""
    if not (path := PROGRAMS / name).exists():
        pytest.fail(f"{path} is missing: `make gpu-programs` builds it (nvcc needed, a GPU is not)")
    return path


def make_inputs(version, batch=1, tokens=0, heads=1, size=64, *, dtype=torch.bfloat16, **options):
    """As testing.make_inputs, on the device and in bf16 unless told."""
    return testing.make_inputs(version, batch, tokens, heads, size, dtype=dtype, device=DEVICE, **options)


def run(version, inputs, **options):
    return testing.outputs_and_gradients(OPS[version], inputs, **options)


def exact(version, inputs, **options):
    return testing.outputs_and_gradients(REFERENCES[version], inputs.double(), **options)


def check(version, inputs, **options):
    """Compare every output and gradient with the fp64 loop."""
    actual = run(version, inputs, **options)
    assert_rounded(actual, exact(version, inputs, **options))
    return actual


def same_bits(a, b, but=()):
    return all(torch.equal(a[name], b[name]) for name in set(a) - set(but))
