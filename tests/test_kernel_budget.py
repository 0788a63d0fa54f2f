"""What the chunk kernels may cost, held against a recorded budget (golden/kernel_budget.json): no GPU is needed.

Recorded of every instance and architecture: registers, spilled bytes, and blocks that a multiprocessor holds by
registers and shared memory. For head size 64 on sm_90 also machine instructions per token-channel: what a token of one
channel costs in issue slots, which is what bounds these kernels.

    instructions per token-channel = instructions of one warp per iteration * 32 lanes * warps / (tokens * N)

An iteration is one of the main loop, from the branch's target to the branch back. Everything between counts, executed
or not (saving for backward, the ends of sequences), but loops within count as often as they run when a sequence is
long: see TRIPS. All warps run the whole body. Where the compiler made other loops of it (some instances of backward),
the count is left out.

A budget may rise with a reason only, which is recorded with it:
    python tests/test_kernel_budget.py --record [--reason "what was bought with it"]
"""

import argparse
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulator.build import PLAIN, build, run
from kernel_code import ROOT, kernels_of, nvcc_release, nvdisasm

BUDGET = ROOT / "tests" / "golden" / "kernel_budget.json"
KERNELS = ("forward", "backward", "summary")
SIZES = (32, 64, 128)
# fp16 differs from bf16 in few instructions; one architecture shows whether that holds.
DTYPES = {"sm_90": ("bf16", "fp16"), "sm_80": ("bf16",), "sm_100": ("bf16",)}
MAIN = "BFloat16, BFloat16, 64, false"
INSTANCES = [
    (arch, kernel, dtype, size)
    for arch, dtypes in DTYPES.items()
    for kernel in KERNELS
    for dtype in dtypes
    for size in SIZES
]
SLACK = 0.95  # a budget that is beaten by more must be lowered

# How often the loops within the main loop run in one iteration (see Loop.weighted). Loops that copy single rows at the
# end of a sequence run 0 times and are left out.
TRIPS = {
    "wkv_forward_kernel": [0],  # saving scores
    "wkv_backward_kernel": [
        0.5,  # copies of the tokens since a kept state: none for the first 64 after it, one round for the next 64
        1,  # pairs of chunks to bring the state over these: 0 or 2
        (2, [0.5]),  # pairs of chunks; within, pairs to bring the state to the pair: 0 or 1
    ],
    "wkv_summary_kernel": [],
}
END_COPY = 25  # instructions: a loop with asynchronous copies and no more of them copies single rows

# Shared memory and registers of a multiprocessor; every block costs 1 KiB of shared memory beside its own.
SHARED_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}


@pytest.fixture(scope="module")
def budget():
    return json.loads(BUDGET.read_text())


@pytest.fixture(autouse=True)
def tools(budget):
    if nvcc_release() is None:
        pytest.skip("no nvcc here: nothing compiles the kernels")
    if nvdisasm() is None:
        pytest.skip("no nvdisasm here: pip install nvidia-cuda-nvdisasm")
    if nvcc_release() != budget["nvcc"]:
        pytest.skip(f"the budget is for nvcc {budget['nvcc']}, not {nvcc_release()}: another compiler, other counts")


def layouts():
    """Return kernel name -> (tokens per iteration, threads, bytes of shared memory)."""
    text = run(PLAIN, build(PLAIN, "layouts", sources=[])).stdout
    words = [line.rsplit(" ", 3) for line in text.splitlines()]
    return {name: tuple(map(int, numbers)) for name, *numbers in words}


def blocks_held(arch, registers, threads, shared_bytes):
    warps = threads // 32
    registers_each = warps * math.ceil(registers * 32 / 256) * 256
    by_shared = SHARED_KIB[arch] * 1024 // (math.ceil(shared_bytes / 128) * 128 + 1024)
    return min(65536 // registers_each, by_shared, 2048 // threads)


def loop_within(kernel):
    """Return the main loop without the loops that copy single rows at the end of a sequence."""
    loop = kernel.main_loop()
    code = kernel.instructions

    def drop(loop):
        kept = []
        for inner in loop.loops:
            copies = any("LDGSTS" in x for x in code[inner.first : inner.last + 1])
            if not (copies and not inner.loops and inner.instructions <= END_COPY):
                drop(inner)
                kept.append(inner)
        loop.loops = kept

    drop(loop)
    return loop


def measure(source, arch, known_layouts):
    """Return kernel name -> what the budget records."""
    found = {}
    for name, kernel in kernels_of(source, arch).items():
        tokens, threads, shared_bytes = known_layouts[name]
        costs = {
            "registers": kernel.registers,
            "spilled_bytes": kernel.spilled_bytes,
            "blocks": blocks_held(arch, kernel.registers, threads, shared_bytes),
        }
        if arch == "sm_90" and ", 64, " in name:
            loop = loop_within(kernel)
            trips = TRIPS[name.split("<")[0]]
            shape = [[] if not isinstance(x, tuple) else [[]] * len(x[1]) for x in trips]
            assert loop.shape() == shape or MAIN not in name, f"{name} has other loops than TRIPS says: {loop.shape()}"
            if loop.shape() == shape:
                costs["instructions_per_token_channel"] = round(loop.weighted(trips) * threads / (tokens * 64), 1)
        found[name] = costs
    return found


def instance(kernel, dtype, size):
    return ROOT / f"csrc/cuda/instances/wkv_{kernel}_{dtype}_{size}.cu"


def worse(what, new, old):
    return new < old if what == "blocks" else new > old


def check(source, arch, budget):
    lines = []
    for name, costs in measure(source, arch, layouts()).items():
        recorded = budget[arch].get(name)
        if recorded is None:
            lines.append(f"{arch} {name}: not in the budget")
            continue
        if lost := recorded.keys() - costs.keys():
            lines.append(f"{arch} {name}: {', '.join(lost)} cannot be counted any more: other loops than TRIPS says")
        for what, value in costs.items():
            limit = recorded.get(what, value)
            if worse(what, value, limit):
                lines.append(f"{arch} {name}: {what} {value}, budget {limit}")
            elif what != "blocks" and value < SLACK * limit:
                lines.append(f"{arch} {name}: {what} {value} beats the budget {limit}: lower it")
    again = "python tests/test_kernel_budget.py --record"
    assert not lines, "\n".join([*lines, f"after a change that is worth it: {again} --reason '...'; to lower: {again}"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_main_instances_keep_their_budget(kernel, budget):
    check(instance(kernel, "bf16", 64), "sm_90", budget)


@pytest.mark.kernels
@pytest.mark.parametrize("arch, kernel, dtype, size", INSTANCES)
def test_every_instance_keeps_its_budget(arch, kernel, dtype, size, budget):
    check(instance(kernel, dtype, size), arch, budget)


def test_the_main_instance_is_as_designed(budget):
    """Finch, bf16, N = 64, sm_90: nothing spilled, few instructions, enough blocks to hide latency."""
    forward, backward = (budget["sm_90"][f"wkv_{x}_kernel<{MAIN}>"] for x in KERNELS[:2])
    assert forward["spilled_bytes"] == backward["spilled_bytes"] == 0
    assert forward["instructions_per_token_channel"] <= 65 and forward["blocks"] >= 4
    assert backward["instructions_per_token_channel"] <= 150 and backward["blocks"] >= 2


def record(reason):
    """Write what is measured now; refuse to raise anything without a reason."""
    known = layouts()
    old = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    same_compiler = old.get("nvcc") == nvcc_release()
    new = {"nvcc": nvcc_release(), "raised": old.get("raised", [])}
    raised = []
    with ThreadPoolExecutor(2) as pool:
        measured = pool.map(lambda x: (x[0], measure(instance(*x[1:]), x[0], known)), INSTANCES)
        for arch, costs in measured:
            new[arch] = new.get(arch, {}) | costs
    for arch in DTYPES:
        for name, costs in new[arch].items():
            before = old.get(arch, {}).get(name, {}) if same_compiler else {}
            raised += [
                f"{arch} {name}: {what} {before[what]} -> {value}"
                for what, value in costs.items()
                if what in before and worse(what, value, before[what])
            ]
    if raised and not reason:
        sys.exit("\n".join([*raised, "rises need --reason"]))
    if raised:
        new["raised"].append({"reason": reason, "what": raised})
    BUDGET.write_text(json.dumps(new, indent=1) + "\n")
    print(f"{BUDGET.relative_to(ROOT)} written, {len(raised)} raised")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Record what the CUDA kernels cost.")
    parser.add_argument("--record", action="store_true", required=True)
    parser.add_argument("--reason", help="why something may cost more than before")
    sys.path.insert(0, str(Path(__file__).parent))
    record(parser.parse_args().reason)
