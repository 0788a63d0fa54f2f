"""State in and out: carried over cuts, packed sequences, gradients through both."""

import pytest
import torch
from wkv_cases import ON_CUDA, OPS, REFERENCES, assert_rounded, make_inputs, uses_tensor_cores

from rwkv_ext import ops, reference
from rwkv_ext.testing import (
    GRADIENTS,
    WkvInputs,
    assert_close_ratio,
    outputs_and_gradients,
)

PER_TOKEN = ("y", "dr", "dk", "dv", "dw")
SUM_FLOOR = 5e-6 if ON_CUDA else None  # sums over tokens: fp32 on a GPU, fp64 on the CPU
SHORT = 32  # tokens below which a GPU runs another kernel
# Each has an empty sequence, one of one token and lengths around blocks of 16 and chunks of 128.
LENGTHS = [[0, 5, 0, 0, 17], [1, 128, 0, 129], [260, 1, 0], [16, 127, 3, 0, 1, 33], [0], [0, 0], [7]]


def in_two_parts(op, version, cut):
    """op run on the tokens before and after a cut, the state carried over."""

    def run(r, k, v, w, u, state, cu_seqlens):
        first, second = ([x[:, part] for x in (r, k, v)] for part in (slice(0, cut), slice(cut, None)))
        w_first, w_second = (w, w) if version == "5.2" else (w[:, :cut], w[:, cut:])
        y_first, state = op(*first, w_first, u, state)
        y_second, state = op(*second, w_second, u, state)
        return torch.cat([y_first, y_second], 1), state

    return run


@pytest.mark.parametrize(
    ("version", "tokens", "size", "dtype", "cut"),
    [
        ("6.0", 300, 64, torch.float32, 16),
        ("6.0", 300, 40, torch.float32, 144),
        ("6.0", 260, 32, torch.bfloat16, 128),
        ("6.0", 150, 3, torch.float32, 112),
        ("6.0", 100, 128, torch.float32, 48),
        ("6.0", 200, 20, torch.float64, 192),
        ("6.0", 129, 17, torch.float16, 128),
        ("5.2", 300, 64, torch.float32, 16),
        ("5.2", 200, 24, torch.bfloat16, 144),
        ("5.2", 140, 5, torch.float64, 128),
        ("6.0", 33, 64, torch.float32, 0),
        ("6.0", 48, 64, torch.float32, 48),
    ],
    ids=str,
)
def test_wkv_state_carried_over_a_cut(version, tokens, size, dtype, cut):
    """Bitwise at multiples of 16, forward and backward; only the sums over tokens may round differently."""
    inputs = make_inputs(version, 2, tokens, 2, size, regime="mixed", dtype=dtype)
    whole = outputs_and_gradients(OPS[version], inputs)
    parts = outputs_and_gradients(in_two_parts(OPS[version], version, cut), inputs)
    sums = {"du"} if version == "6.0" else {"du", "dw"}
    if uses_tensor_cores(dtype) and (cut % 128 or min(cut, tokens - cut) < SHORT):
        # backward rebuilds states from those at multiples of 128, and few tokens run another kernel
        assert cut < SHORT or tokens - cut < SHORT or all(torch.equal(whole[x], parts[x]) for x in ("y", "state_out"))
        return assert_rounded(parts, whole)
    for key in {"y", "state_out", *GRADIENTS} - sums:
        assert torch.equal(whole[key], parts[key]), key
    assert_close_ratio({key: parts[key] for key in sums}, {key: whole[key] for key in sums}, floor=SUM_FLOOR, limit=0)


@pytest.mark.parametrize("cut", [1, 7, 131, 199])
def test_wkv_state_carried_over_an_odd_cut(cut):
    """Anywhere else: equal within rounding."""
    inputs = make_inputs("6.0", 2, 200, 2, 16, regime="resets")
    whole = outputs_and_gradients(ops.wkv6, inputs)
    assert_close_ratio(outputs_and_gradients(in_two_parts(ops.wkv6, "6.0", cut), inputs), whole, floor=1e-6)


def test_wkv_state_none_is_zeros():
    inputs = make_inputs("6.0", 2, 40, 2, 16)
    zeros = outputs_and_gradients(ops.wkv6, inputs._replace(state=torch.zeros_like(inputs.state)))
    none = outputs_and_gradients(ops.wkv6, inputs._replace(state=None))
    assert zeros.pop("dstate").any()
    assert all(torch.equal(none[key], zeros[key]) for key in zeros) and set(none) == set(zeros)


def test_wkv_state_gradient_alone():
    """State tuning: only the state is trained, from y or from the last state alone."""
    for cotangents in (("y",), ("state_out",)):
        for tokens in (0, 1, 140):
            inputs = make_inputs("6.0", 2, tokens, 2, 8, regime="near_one", dtype=torch.float64)
            actual, expected = (
                outputs_and_gradients(op, inputs, gradients=("dstate",), cotangents=cotangents)
                for op in (ops.wkv6, reference.wkv6)
            )
            assert_close_ratio(actual, expected, floor=1e-13)
            assert actual["dstate"].any() == (cotangents == ("state_out",) or tokens > 0)


def test_wkv_state_gradient_flows_over_many_segments():
    """Truncation-free training in segments: the same gradient as one long sequence."""
    inputs = make_inputs("6.0", 1, 160, 2, 8, dtype=torch.float64)

    def segments(r, k, v, w, u, state, cu_seqlens):
        y = []
        for first in range(0, 160, 40):
            part, state = ops.wkv6(*(x[:, first : first + 40] for x in (r, k, v, w)), u, state)
            y.append(part)
        return torch.cat(y, 1), state

    assert_close_ratio(outputs_and_gradients(segments, inputs), outputs_and_gradients(ops.wkv6, inputs), floor=1e-13)


def separate(op, version, lengths):
    """Every sequence of a packed row run by itself."""

    def run(r, k, v, w, u, state, cu_seqlens):
        y, states, first = [], [], 0
        for i, length in enumerate(lengths):
            here = slice(first, first + length)
            own_w = w if version == "5.2" else w[:, here]
            own_state = None if state is None else state[i : i + 1]
            part, last = op(r[:, here], k[:, here], v[:, here], own_w, u, own_state)
            y.append(part)
            states.append(last)
            first += length
        return torch.cat(y, 1), torch.cat(states)

    return run


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("version", OPS)
def test_wkv_state_packed_equals_separate(version, lengths):
    """Bitwise, but for the sums over sequences."""
    for state, index_dtype in ((True, torch.int64), (False, torch.int32)):
        inputs = make_inputs(version, heads=2, size=12, lengths=lengths, regime="mixed", state=state)
        inputs = inputs._replace(cu_seqlens=inputs.cu_seqlens.to(index_dtype))
        packed = outputs_and_gradients(OPS[version], inputs)
        alone = outputs_and_gradients(separate(OPS[version], version, lengths), inputs)
        sums = {"du"} if version == "6.0" else {"du", "dw"}
        for key in set(packed) - sums:
            assert torch.equal(packed[key], alone[key]), key
        packed, alone = ({key: x[key] for key in sums} for x in (packed, alone))
        assert_close_ratio(packed, alone, floor=SUM_FLOOR, limit=0)


@pytest.mark.parametrize("version", OPS)
def test_wkv_state_packed_fp64(version):
    inputs = make_inputs(version, heads=2, size=6, lengths=[3, 0, 150, 16], regime="resets", dtype=torch.float64)
    expected = outputs_and_gradients(REFERENCES[version], inputs)
    assert_close_ratio(outputs_and_gradients(OPS[version], inputs), expected, floor=1e-13)


def test_wkv_state_packed_cu_seqlens_layouts():
    """A strided slice of a larger index tensor works."""
    inputs = make_inputs("6.0", heads=2, size=8, lengths=[4, 9, 2])
    wide = torch.stack([inputs.cu_seqlens, torch.full((4,), -7)], 1)[:, 0]
    assert not wide.is_contiguous()
    for a, b in zip(ops.wkv6(*inputs), ops.wkv6(*inputs._replace(cu_seqlens=wide)), strict=True):
        assert torch.equal(a, b)


def test_wkv_state_packed_does_not_leak():
    """NaN and a huge state in one sequence leave its neighbours bitwise alone, forward and backward."""
    lengths = [20, 30, 25]
    clean = make_inputs("6.0", heads=2, size=8, lengths=lengths)
    dirty = WkvInputs(*(None if x is None else x.clone() for x in clean))
    for x in (dirty.r, dirty.k, dirty.v, dirty.w):
        x[:, 20:50] = float("nan")
    dirty.state[1] = 1e30
    a, b = (outputs_and_gradients(ops.wkv6, x) for x in (clean, dirty))
    outside = torch.cat([torch.arange(20), torch.arange(50, 75)])
    for key in PER_TOKEN:
        assert torch.equal(a[key][:, outside], b[key][:, outside]), key
        assert b[key][:, 20:50].isnan().any()
    for key in ("state_out", "dstate"):
        assert torch.equal(a[key][::2], b[key][::2]), key
