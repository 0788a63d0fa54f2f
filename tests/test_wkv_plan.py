"""How a CUDA op is planned: kernel, segments, workspace (csrc/cuda/wkv_plan.h), for any shape and any GPU."""

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
CHUNK, RECURRENT = 0, 1
FP32, FP64, BF16, FP16 = range(4)
FORWARD, BACKWARD, SUMMARY = range(3)
H200_FORWARD, H200_BACKWARD = 132 * 4, 132 * 2  # slots: multiprocessors times blocks on each
WORK_ITEM_BYTES = 32


class Plan(NamedTuple):
    kernel: int
    segment_tokens: int
    items: int
    segmented: int
    bytes: int
    list: int
    states: int
    decays: int
    du: int
    dw: int


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    program = tmp_path_factory.mktemp("plan") / "wkv_plan"
    source = ROOT / "tests" / "wkv_plan.cpp"
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Werror", "-I", ROOT / "csrc", source, "-o", program]
    subprocess.run(command, check=True)

    def answer(*questions):
        text = "\n".join(" ".join(map(str, question)) for question in questions)
        output = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout
        answers = [Plan(*map(int, line.split())) for line in output.splitlines()]
        assert len(answers) == len(questions)
        return answers

    return answer


@pytest.fixture
def plan(plans):
    def one(
        batch, tokens, heads, *, size=64, packed=0, eagle=0, dtype=BF16, direction=FORWARD, slots=H200_FORWARD, cut=0
    ):
        return plans((batch, tokens, heads, size, packed, eagle, dtype, direction, slots, cut))[0]

    return one


def test_plan_fills_an_h200_in_one_pass(plan):
    """The paper's large batch: 512 heads of 4096 tokens need no cut, forward or backward."""
    found = plan(8, 4096, 64)
    assert found == Plan(CHUNK, 4224, 8, 0, 0, -1, -1, -1, -1, -1)
    found = plan(8, 4096, 64, direction=BACKWARD, slots=H200_BACKWARD)
    assert (found.segmented, found.items, found.du, found.states) == (0, 8, 0, -1)


def test_plan_cuts_one_long_sequence(plan):
    """The paper's long context: 32 heads would use 32 of 132 multiprocessors."""
    found = plan(1, 65536, 32)
    assert found.segmented and found.segment_tokens == 4096 and found.items == 16
    assert 0.95 * H200_FORWARD < found.items * 32 <= H200_FORWARD  # one wave
    found = plan(1, 65536, 32, direction=BACKWARD, slots=H200_BACKWARD)
    assert found.segment_tokens == 8192 and found.items == 8


@pytest.mark.parametrize("heads", [1, 5, 32, 48, 100, 200, 265, 300, 369])
def test_plan_waves_are_full(plan, heads):
    """Where a sequence is long enough, the last wave of segments leaves less than a third of the slots idle."""
    found = plan(1, 2**20, heads)
    waves = -(-found.items * heads // H200_FORWARD)
    assert waves <= 3 and found.items * heads > 0.67 * waves * H200_FORWARD


def test_plan_cuts_while_that_gains_more_than_it_costs(plan):
    """Cut below 70 % of the slots, and never into segments shorter than 512 tokens."""
    assert plan(1, 65536, 370).items == 1  # 70.1 %
    assert plan(1, 65536, 369).items == 4  # 69.9 %; three waves, 93 % full
    assert plan(1, 1023, 1).items == 1 and not plan(1, 1023, 1).segmented
    assert plan(1, 1024, 1).items == 2 and plan(1, 1024, 1).segment_tokens == 512
    assert plan(1, 195 * 512, 1).segment_tokens == 512  # 792 segments would be shorter
    assert plan(3, 5000, 2).items == 3 * 8 and plan(3, 5000, 2).segment_tokens == 640


@pytest.mark.parametrize("heads", [1, 2, 12, 32, 64, 369])
def test_plan_rows_are_covered(plans, heads):
    """Segments are whole chunks, as even as chunks allow, and together exactly the row."""
    lengths = [*range(0, 300, 7), 511, 512, 1000, 1024, 4095, 4096, 4097, 16384, 65536, 2**20 + 1]
    for tokens, found in zip(lengths, plans(*((1, t, heads, 64, 0, 0, BF16, 0, 528, 0) for t in lengths)), strict=True):
        assert found.segment_tokens % 128 == 0
        assert (found.items - 1) * found.segment_tokens < max(tokens, 1) <= found.items * found.segment_tokens
        assert found.segmented == (found.items > 1)
        if found.segmented:
            assert found.segment_tokens >= 512 and found.items * heads <= 3 * 528


def test_plan_packed_bounds_the_longest_block(plan):
    """From one sequence to 64k of them, no block gets more than two thirds of a slot's share of all tokens."""
    for sequences in (1, 2, 3, 16, 100, 1000, 65536):
        found = plan(1, 65536, 32, packed=sequences)
        assert found.segmented and found.segment_tokens == 2688
        assert found.items == 65536 // 2688 + sequences
    share = 65536 * 32 / H200_FORWARD
    assert share / 1.5 < 2688 < share / 1.5 + 128
    assert not plan(1, 65536, 370, packed=9).segmented  # the heads alone fill the slots
    assert not plan(1, 512, 2, packed=3).segmented  # too short to cut
    assert plan(1, 2000, 2, packed=3).segment_tokens == 512


def test_plan_packed_without_cuts_has_a_slot_per_sequence(plan):
    for tokens in (0, 1, 127, 128, 500):
        found = plan(1, tokens, 4, packed=7)
        assert found.items == 7 and found.segment_tokens > tokens
        assert found.bytes == 256 and found.list == 0  # 7 items of 32 bytes


def test_plan_forced_segments(plan):
    for cut in (128, 256, 1280):
        found = plan(2, 1300, 64, cut=cut)
        assert found.segment_tokens == cut and found.items == 2 * -(-1300 // cut) and found.segmented
        assert plan(1, 1300, 64, packed=5, cut=cut).items == 1300 // cut + 5
    for cut in (1300, 1408, 12800):  # as long as everything: no cut, however it is asked for
        assert plan(2, 1300, 64, cut=cut).items == 2 and not plan(2, 1300, 64, cut=cut).segmented
        assert plan(1, 1300, 64, packed=5, cut=cut).items == 5


def test_plan_empty_calls(plan):
    for direction in (FORWARD, BACKWARD, SUMMARY):
        assert plan(0, 4096, 64, direction=direction).items == 0
        assert plan(0, 4096, 64, direction=direction).bytes == 0
        nothing = plan(3, 0, 2, direction=direction, slots=528)
        assert nothing.items == 3 and not nothing.segmented  # the state passes through
        assert plan(1, 65536, 0, direction=direction).segmented == 0
        assert plan(3, 4096, 2, direction=direction, slots=0).items == 3


def test_plan_kernels(plan):
    assert plan(1, 32, 4).kernel == plan(1, 32, 4, dtype=FP16).kernel == CHUNK
    assert plan(1, 31, 4).kernel == plan(1, 0, 4).kernel == RECURRENT
    assert plan(1, 4096, 4, dtype=FP32).kernel == plan(1, 4096, 4, dtype=FP64).kernel == RECURRENT
    assert plan(1, 4096, 4, slots=0).kernel == RECURRENT  # no room for a chunk kernel on this GPU
    assert plan(1, 31, 4, direction=BACKWARD).kernel == RECURRENT  # as its forward was


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
@pytest.mark.parametrize("eagle", [0, 1])
@pytest.mark.parametrize("packed", [0, 6])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, SUMMARY])
def test_plan_workspace_pieces_do_not_overlap(plans, direction, packed, eagle, dtype):
    """Every piece is aligned, as large as its users need, and absent where nobody does."""
    real, heads, size = (8 if dtype == FP64 else 4), 3, 32
    for tokens, cut in ((5000, 0), (5000, 128), (300, 256), (100, 0), (0, 0)):
        (found,) = plans((1, tokens, heads, size, packed, eagle, dtype, direction, 528, cut))
        channels = found.items * heads * size * real
        needs = {
            "list": found.items * WORK_ITEM_BYTES if packed else 0,
            "states": channels * size if found.segmented else 0,
            "decays": channels if found.segmented else 0,
            "du": channels if direction == BACKWARD else 0,
            "dw": channels if direction == BACKWARD and eagle else 0,
        }
        end = 0
        for name, needed in needs.items():
            offset = getattr(found, name)
            assert (offset >= 0) == (needed > 0), name
            if needed:
                assert offset == end and offset % 256 == 0
                end = -(-(offset + needed) // 256) * 256
        assert found.bytes == end
