"""The emulator keeps its own promises: it runs what is right and names what is wrong, at the kernel's line.

Each case is a small kernel of tests/emulator/promises.cpp that keeps or breaks one rule.
"""

import re
import struct
import subprocess

import numpy as np
import pytest
import torch
from emulator.build import ASAN, PLAIN, ROOT, TSAN, build, run

pytestmark = pytest.mark.cpu
ERROR_EXIT, TSAN_EXIT, ASAN_EXIT = 70, 66, 67
VARIANTS = {"plain": PLAIN, "tsan": TSAN, "asan": ASAN}


@pytest.fixture(scope="module")
def promise():
    programs = {}

    def call(variant, name, order="ascending"):
        if variant not in programs:
            programs[variant] = build(VARIANTS[variant], "promises", sources=[])
        return run(VARIANTS[variant], programs[variant], name, order, timeout=60)

    return call


def values(done):
    return np.array([float(line) for line in done.stdout.splitlines() if not line.startswith("launch")])


def line_of(text, kernel):
    """Return the line of promises.cpp, from 1, where text first stands after the kernel's name."""
    lines = (ROOT / "tests/emulator/promises.cpp").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if f" {kernel}(" in line)
    return next(i for i in range(start, len(lines)) if text in lines[i]) + 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", ["ascending", "descending", "1", "2"])
def test_right_kernels_run_in_every_order(promise, variant, order):
    done = promise(variant, "copies", order)
    assert done.returncode == 0, done.stderr
    other = 63 - np.arange(64)
    first = 16 * (other % 32) + 6
    second = np.where(other % 2 == 0, first + 512, 0)
    assert (values(done) == first + 1000 * second).all()
    assert "copy_kernel" in done.stdout and "read 1536 bytes, written 256 bytes" in done.stdout

    done = promise(variant, "warp-barrier", order)
    assert done.returncode == 0, done.stderr
    assert (values(done) == 1 + (np.arange(64) ^ 5)).all()

    done = promise(variant, "matrix-barrier", order)
    assert done.returncode == 0, done.stderr
    assert (values(done) == 4 * ((np.arange(64) % 32 // 4) ^ 1) + np.arange(64) % 4).all()

    done = promise(variant, "own-places", order)
    assert done.returncode == 0, done.stderr
    assert (values(done) == np.arange(64) // 32).all()


def test_a_missing_wait_shows_poison(promise):
    done = promise("plain", "missing-wait")
    assert done.returncode == 0 and np.isnan(values(done)).sum() >= 32


def test_copies_that_nobody_waits_for_are_named(promise):
    for name, state in (("missing-commit", "never committed"), ("missing-last-wait", "committed")):
        done = promise("plain", name)
        assert done.returncode == ERROR_EXIT
        assert re.search(f"never waited for; the first, {state}, is from .*promises.cpp:", done.stderr), done.stderr


RACES = ["missing-barrier", "missing-warp-barrier", "missing-matrix-barrier", "missing-wait", "late-reader"]


@pytest.mark.parametrize("name", [*RACES, "two-blocks"])
def test_thread_sanitizer_sees_the_race(promise, name):
    done = promise("tsan", name)
    assert done.returncode == TSAN_EXIT
    assert "WARNING: ThreadSanitizer: data race" in done.stderr and "promises.cpp" in done.stderr


def test_shuffles_order_nothing_though_the_result_looks_right(promise):
    assert (values(promise("plain", "missing-warp-barrier")) == 1 + (np.arange(64) ^ 5)).all()


@pytest.mark.parametrize(
    "name, what",
    [
        ("overrun", "use-after-poison"),
        ("overread", "use-after-poison"),
        ("global-overread", "heap-buffer-overflow"),
        ("copy-overread", "heap-buffer-overflow"),
        ("matrix-overread", "use-after-poison"),
    ],
)
def test_address_sanitizer_sees_the_overrun(promise, name, what):
    done = promise("asan", name)
    assert done.returncode == ASAN_EXIT
    assert f"ERROR: AddressSanitizer: {what}" in done.stderr and "promises.cpp" in done.stderr


def test_shared_memory_starts_as_nan(promise):
    assert np.isnan(values(promise("plain", "uninitialised"))).all()


@pytest.mark.parametrize(
    "name, kernel, text, message",
    [
        ("overrun", "overrun_kernel", "shared_array", "overrun: the block wrote outside the shared buffer"),
        ("overlap", "overlap_kernel", "(128", "shared buffers overlap: offset 128 of 256 bytes"),
        ("too-much", "too_much_kernel", "2048", "ends after the 2048 bytes"),
        ("two-counts", "two_counts_kernel", "shared_array", "has 8 bytes"),
        ("misaligned-shared", "misaligned_shared_kernel", "load_shared", "misaligned: load_shared"),
        ("misaligned-offset", "misaligned_offset_kernel", "load_shared", "misaligned: load_shared"),
        ("misaligned-global", "misaligned_global_kernel", "load_global", "misaligned: load_global"),
        ("misaligned-copy", "misaligned_copy_kernel", "copy_async", "misaligned: copy_async"),
        ("wrong-memory", "wrong_memory_kernel", "load_shared", "wrong memory: load_shared"),
        ("divergent", "divergent_kernel", "2.0f", "divergence: comes to shuffle_xor"),
        ("divergent-kinds", "divergent_kinds_kernel", "warp_barrier", "divergence: comes to warp_barrier"),
        ("early-end", "early_end_kernel", "block_barrier", "threads 0-4, 6-63 wait in block_barrier"),
        ("two-barriers", "two_barriers_kernel", "warp_barrier", "threads 1-31, 33-63 wait in warp_barrier"),
    ],
)
def test_a_broken_rule_is_named_with_its_line(promise, name, kernel, text, message):
    done = promise("plain", name)
    assert done.returncode == ERROR_EXIT
    assert message in done.stderr, done.stderr
    assert f"promises.cpp:{line_of(text, kernel)}" in done.stderr, done.stderr


def test_a_deadlock_says_who_has_ended(promise):
    error = promise("plain", "early-end").stderr
    assert "deadlock in block 0: nobody can go on" in error and "threads 5 have ended" in error


def test_number_formats_are_exact():
    """Against torch: every 16-bit number unpacked; packing at, between and beside all of them, and special ones."""
    program = build(PLAIN, "formats", sources=[])
    halves = np.arange(65536, dtype=np.uint16)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        exact = torch.from_numpy(halves.view(np.int16)).view(dtype)
        around = exact.double()
        finite = around[around.isfinite()].sort().values.unique()
        between = (finite[1:] + finite[:-1]) / 2  # ties
        doubles = torch.cat([finite, between, between * (1 + 2**-20), between * (1 - 2**-20), finite * (1 + 2**-22)])
        special = [float("inf"), -float("inf"), 65519.0, 65520.0, 65521.0, 3.4e38, 1e-45, -1e-45, 0.0, -0.0]
        floats = torch.cat([doubles.float(), torch.tensor(special)])
        unpacked, packed = run_formats(program, name, halves, floats)
        same = torch.from_numpy(unpacked.view(np.int32)) == exact.float().view(torch.int32)
        assert (same | exact.isnan()).all() and np.isnan(unpacked[exact.isnan().numpy()]).all()
        expected = floats.to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert (packed == expected).all()
    nans = torch.tensor([float("nan")])
    assert run_formats(program, "bfloat16", halves[:1], nans)[1][0] == 0x7FFF
    assert run_formats(program, "float16", halves[:1], nans)[1][0] == 0x7FFF


def run_formats(program, name, halves, floats):
    """Return the halves as floats and the floats as halves."""
    floats = floats.numpy().astype(np.float32)
    data = struct.pack("<qq", len(halves), len(floats)) + halves.tobytes() + floats.tobytes()
    out = subprocess.run([str(program), name], input=data, capture_output=True, check=True).stdout
    return np.frombuffer(out[: 4 * len(halves)], np.float32).copy(), np.frombuffer(out[4 * len(halves) :], np.uint16)
