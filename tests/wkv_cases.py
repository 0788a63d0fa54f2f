"""What the tests of the ops share: cases, and how the same tests run on a GPU (pytest --device cuda or emulated).

There every tensor that names no device is made on the GPU (torch's default device), head sizes are rounded up to those
that have kernels, and 16-bit activations run on tensor cores, whose error is bounded as kernel_cases.py says.
"""

import sys

import torch
from kernel_cases import floor_of

from rwkv_ext import ops, reference, testing
from rwkv_ext.testing import assert_close_ratio

DEVICE = torch.get_default_device()
ON_CUDA = DEVICE.type == "cuda" or "emulated_device" in sys.modules
CUDA_HEAD_SIZES = (32, 64, 128)

OPS = {"5.2": ops.wkv5, "6.0": ops.wkv6}
REFERENCES = {"5.2": reference.wkv5, "6.0": reference.wkv6}
# version, B, T, H, N, regime: a saved chunk is 128 tokens, a recomputed block 16.
SHAPES = [
    ("6.0", 1, 0, 2, 64, "typical"),
    ("5.2", 2, 1, 3, 64, "mixed"),
    ("6.0", 3, 15, 2, 3, "near_one"),
    ("5.2", 1, 16, 1, 40, "huge"),
    ("6.0", 2, 17, 3, 32, "huge"),
    ("6.0", 1, 31, 1, 1, "mixed"),
    ("5.2", 3, 33, 2, 1, "near_zero"),
    ("6.0", 1, 127, 2, 40, "resets"),
    ("6.0", 2, 128, 1, 16, "near_zero"),
    ("5.2", 1, 129, 1, 128, "typical"),
    ("6.0", 1, 129, 1, 128, "mixed"),
    ("5.2", 2, 200, 2, 32, "near_one"),
    ("6.0", 2, 257, 2, 64, "typical"),
    ("5.2", 1, 300, 2, 3, "resets"),
    ("6.0", 1, 300, 2, 5, "huge"),
    ("6.0", 0, 4, 2, 8, "typical"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def name(case):
    version, batch, tokens, heads, size, regime = case
    return f"v{version[0]}-B{batch}-T{tokens}-H{heads}-N{size}-{regime}"


def head_size(size):
    """Return size, or on CUDA the next size that has kernels."""
    return next(x for x in CUDA_HEAD_SIZES if size <= x) if ON_CUDA else size


def make_inputs(version, batch=1, tokens=0, heads=1, size=64, **options):
    return testing.make_inputs(version, batch, tokens, heads, head_size(size), **options)


def uses_tensor_cores(dtype):
    return ON_CUDA and dtype in (torch.bfloat16, torch.float16)


def assert_rounded(actual, exact):
    """Allow every tensor twice the error that tensor cores cannot avoid; twice that where few elements are judged."""
    assert set(actual) == set(exact)
    for name, x in actual.items():
        floor = 2 * floor_of(name, x.dtype) * (2 if x.numel() <= 128 else 1)
        assert_close_ratio({name: x}, {name: exact[name]}, floor=floor)


def assert_accurate(actual, exact, plain, dtype, **options):
    """Compare what an op gave for activations of a dtype with the fp64 truth and plain PyTorch in that dtype."""
    if uses_tensor_cores(dtype):
        assert_rounded(actual, exact)
    else:
        assert_close_ratio(actual, exact, plain, **options)
