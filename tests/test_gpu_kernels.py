"""The kernels on a GPU without torch: the program that runs them in the emulator, built for the device.

Here a test chooses kernel and segment length, which the ops decide by themselves; compute-sanitizer sees arrays that
end with their last byte and nobody else's kernels.
"""

import dataclasses
import shutil

import pytest
import torch
from emulator.build import PLAIN, Variant
from emulator.ops import Emulator, EmulatorError
from gpu_tools import device_program
from kernel_cases import (
    CHUNK_INSTANCES,
    MAIN_INSTANCES,
    RECURRENT_INSTANCES,
    REFERENCES,
    Case,
    complaints,
    covering,
    inputs_of,
)

from rwkv_ext.testing import GRADIENTS, outputs_and_gradients

pytestmark = pytest.mark.cuda
INSTANCES = [
    Case(instance, "resets", 300, "no", 128 * (i % 3), True, ("y", "state_out"), "contiguous")
    for i, instance in enumerate([*CHUNK_INSTANCES, *RECURRENT_INSTANCES])
]
SMALL = [  # a block of 16 and one token; a chunk of 128 and one; packed with an empty sequence; segments
    Case(MAIN_INSTANCES[0], "mixed", 17, "no", 0, True, ("y", "state_out"), "contiguous"),
    Case(MAIN_INSTANCES[0], "mixed", 129, "no", 128, True, ("y", "state_out"), "contiguous"),
    Case(MAIN_INSTANCES[0], "mixed", 65, "int64", 0, False, ("y",), "contiguous"),
    Case(MAIN_INSTANCES[2], "mixed", 33, "no", 0, True, ("y", "state_out"), "contiguous"),
    *(Case(x, "mixed", 33, "no", 0, True, ("y", "state_out"), "contiguous") for x in CHUNK_INSTANCES[::5]),
    *(Case(x, "mixed", 9, "no", 0, True, ("y", "state_out"), "contiguous") for x in RECURRENT_INSTANCES[:6]),
]


def on_device(case, **settings):
    return Emulator(
        program=device_program("run"), kernel=case.instance.kernel, segment_tokens=case.segment_tokens, **settings
    )


@pytest.mark.parametrize("case", [*covering(MAIN_INSTANCES), *INSTANCES], ids=str)
def test_gpu_kernels_match_the_reference(case):
    inputs = inputs_of(case)
    op = REFERENCES[case.instance.version]
    exact = outputs_and_gradients(op, inputs.double(), cotangents=case.cotangents)
    plain = outputs_and_gradients(op, inputs, cotangents=case.cotangents)
    actual = outputs_and_gradients(on_device(case).wkv6, inputs, cotangents=case.cotangents)
    assert not (wrong := complaints(case, inputs, actual, exact, plain)), "\n".join(wrong)


@pytest.mark.parametrize("instance", MAIN_INSTANCES, ids=str)
def test_gpu_kernels_equal_the_emulator(instance):
    """Up to the order of sums, the exponential and roundings that these tip: what the emulator proves is about them."""
    case = Case(instance, "resets", 300, "no", 128, True, ("y", "state_out"), "contiguous")
    inputs = inputs_of(case)
    few = dataclasses.replace(PLAIN, main_instances_only=True)
    emulator = Emulator(variant=few, kernel=case.instance.kernel, segment_tokens=case.segment_tokens)
    expected = outputs_and_gradients(emulator.wkv6, inputs)
    actual = outputs_and_gradients(on_device(case).wkv6, inputs)
    for name in ("y", "state_out", *GRADIENTS):
        x = expected[name].double()
        digits = 2.0**-7 if expected[name].dtype == torch.bfloat16 else 2.0**-11
        far = (actual[name].double() - x).abs() > 2 * digits * x.abs().amax()
        assert far.double().mean() < 0.001, name


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_gpu_kernels_sanitized(tool):
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    watched = Variant(tool, (), command=("compute-sanitizer", "--tool", tool, "--error-exitcode", "97"))
    for case in SMALL if tool == "memcheck" else SMALL[:6]:
        try:
            outputs_and_gradients(on_device(case, variant=watched).wkv6, inputs_of(case), cotangents=case.cotangents)
        except EmulatorError as error:
            if "Device not supported" in str(error):
                pytest.skip("compute-sanitizer does not support this device or its driver")
            raise AssertionError(f"{case}: {error}") from None
