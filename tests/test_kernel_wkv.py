"""The CUDA kernels' own sources, run by the emulator, against the fp64 reference.

`make test` covers the main instance (bf16, N = 64); everything else has the marker kernels: `make test-kernels`.
"""

import pytest
import torch
from emulator.build import PLAIN, PLAIN_MAIN
from emulator.ops import Emulator
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

from rwkv_ext.testing import outputs_and_gradients

pytestmark = pytest.mark.cpu
MAIN_CASES = covering(MAIN_INSTANCES)
ALL_CASES = covering([*CHUNK_INSTANCES, *RECURRENT_INSTANCES])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the reference is thousands of small operations: threads only wait for each other


def check(case: Case, variant):
    inputs = inputs_of(case)
    op = REFERENCES[case.instance.version]
    exact = outputs_and_gradients(op, inputs.double(), cotangents=case.cotangents)
    plain = outputs_and_gradients(op, inputs, cotangents=case.cotangents)
    emulator = Emulator(variant, kernel=case.instance.kernel, segment_tokens=case.segment_tokens)
    actual = outputs_and_gradients(emulator.wkv6, inputs, cotangents=case.cotangents)
    assert not (wrong := complaints(case, inputs, actual, exact, plain)), "\n".join(wrong)


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_main_instances_match_the_reference(case):
    check(case, PLAIN_MAIN)


@pytest.mark.kernels
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_every_instance_matches_the_reference(case):
    check(case, PLAIN)
