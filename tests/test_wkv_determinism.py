"""Bitwise equal from run to run and for any number of threads; every instruction set within the same tolerances."""

import os
import subprocess
import sys

import instruction_set_checks
import pytest
import torch
from wkv_cases import OPS, make_inputs

from rwkv_ext import _load, ops
from rwkv_ext.testing import outputs_and_gradients

# version, B, T, H, N, lengths: more pieces of work than threads, fewer, and uneven ones.
CASES = [
    ("6.0", 3, 140, 5, 32, None),
    ("6.0", 1, 300, 1, 64, None),
    ("5.2", 2, 129, 3, 40, None),
    ("5.2", 1, 140, 1, 128, None),
    ("6.0", 1, 140, 1, 100, None),
    ("6.0", 1, 0, 3, 16, [200, 0, 1, 64, 33]),
    ("5.2", 1, 0, 2, 64, [17, 130, 5]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_wkv_determinism_runs_and_threads(case):
    version, batch, tokens, heads, size, lengths = case
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(version, batch, tokens, heads, size, lengths=lengths, dtype=dtype)
        runs = []
        for threads in (1, 2, 3, 1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(outputs_and_gradients(OPS[version], inputs))
        for run in runs[1:]:
            assert all(torch.equal(run[key], runs[0][key]) for key in runs[0])


def test_wkv_determinism_memory_alignment():
    """Where the tensors lie, on cache-line boundaries or off them, changes no bit."""
    inputs = make_inputs("6.0", 2, 40, 2, 24)
    shifted = make_inputs("6.0", 2, 40, 2, 24, layout="offset")
    assert inputs.r.data_ptr() % 64 != shifted.r.data_ptr() % 64
    a, b = (outputs_and_gradients(ops.wkv6, x) for x in (inputs, shifted))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_wkv_determinism_batch_and_head_position():
    """A row's results do not depend on its neighbours or its place in the batch."""
    inputs = make_inputs("6.0", 3, 70, 3, 16)
    y, state = ops.wkv6(*inputs)
    for row, head in ((2, 0), (1, 2)):
        alone = [x[row : row + 1, :, head : head + 1] for x in inputs[:4]]
        y_alone, state_alone = ops.wkv6(*alone, inputs.u[head : head + 1], inputs.state[row : row + 1, head : head + 1])
        assert torch.equal(y_alone[0, :, 0], y[row, :, head]) and torch.equal(state_alone[0, 0], state[row, head])


def test_wkv_determinism_concurrent_callers():
    """Four Python threads at once, each with its own inputs, get what they get alone."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [make_inputs("6.0", 2, 130, 2, 16, seed=seed) for seed in range(4)]
    alone = [outputs_and_gradients(ops.wkv6, x) for x in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: outputs_and_gradients(ops.wkv6, x), cases * 3))
    for i, results in enumerate(together):
        assert all(torch.equal(results[key], alone[i % 4][key]) for key in results)


@pytest.mark.cpu
@pytest.mark.parametrize("limit", ["default", "avx2", "avx512"])
def test_wkv_determinism_instruction_sets(limit):
    """The kernels compiled for each width that this processor has, each in a process limited to it as torch is."""
    best, names = _load.build_info()["cpu_instruction_set"], {"default": "generic"}
    if names.get(limit, limit) == best:
        return instruction_set_checks.check_all()
    program = [sys.executable, instruction_set_checks.__file__]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": limit}
    result = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] in (names.get(limit, limit), best)  # best: the processor has no wider one
