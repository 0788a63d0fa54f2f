"""The specification itself: the naive recurrence against closed forms and finite differences; and the test tools."""

import pytest
import torch

from rwkv_ext import reference
from rwkv_ext.testing import assert_close_ratio, decay_regimes, gradcheck_wkv, make_inputs, outputs_and_gradients

OPS = {"5.2": reference.wkv5, "6.0": reference.wkv6}


def closed_form(r, k, v, w, u, state):
    """y_t and the last state as explicit sums over earlier tokens; no recurrence."""
    tokens = r.shape[1]
    decay = torch.exp(-torch.exp(w.expand(r.shape)))

    def product(first, end):  # of the decays of tokens first to end - 1
        return decay[:, first:end].prod(1)

    y = torch.zeros_like(r)
    for t in range(tokens):
        seen = product(0, t)[..., None] * state
        for s in range(t):
            seen = seen + (product(s + 1, t) * k[:, s])[..., None] * v[:, s, :, None, :]
        seen = seen + (u * k[:, t])[..., None] * v[:, t, :, None, :]
        y[:, t] = torch.einsum("bhi,bhij->bhj", r[:, t], seen)
    last = product(0, tokens)[..., None] * state
    for s in range(tokens):
        last = last + (product(s + 1, tokens) * k[:, s])[..., None] * v[:, s, :, None, :]
    return y, last


@pytest.mark.parametrize("regime", decay_regimes)
@pytest.mark.parametrize("version", OPS)
def test_reference_closed_form(version, regime):
    inputs = make_inputs(version, batch=2, tokens=9, heads=3, size=5, regime=regime, dtype=torch.float64)
    y, state = OPS[version](*inputs)
    expected_y, expected_state = closed_form(*inputs[:6])
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("regime", ["mixed", "near_zero", "huge"])
@pytest.mark.parametrize("version", OPS)
def test_reference_finite_differences(version, regime):
    gradcheck_wkv(OPS[version], make_inputs(version, 2, 3, 2, 2, regime=regime, dtype=torch.float64))
    gradcheck_wkv(OPS[version], make_inputs(version, 1, 4, 1, 2, regime=regime, dtype=torch.float64, state=False))


def test_reference_written_out_by_hand():
    """N = 1, three tokens, numbers that can be followed on paper: e = exp(-exp(w)) = 1/2 with w = ln ln 2."""
    half = torch.log(torch.log(torch.tensor(2.0, dtype=torch.float64)))
    r, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in ([1, 2, 3], [1, 1, 2], [4, 6, 5]))
    u, state = torch.full((1, 1), 10.0, dtype=torch.float64), torch.full((1, 1, 1, 1), 8.0, dtype=torch.float64)
    y, last = reference.wkv5(r, k, v, half.view(1, 1), u, state)
    # S: 8 -> 8/2 + 4 = 8 -> 8/2 + 6 = 10 -> 10/2 + 10 = 15;  y = r (S + 10 k v)
    assert y.flatten().tolist() == pytest.approx([1 * (8 + 40), 2 * (8 + 60), 3 * (10 + 100)])
    assert last.item() == pytest.approx(15)


def test_reference_decay_axis_is_key():
    """The decay multiplies rows (keys) of the state, and the current token's decay acts on the next output first."""
    zeros = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    state = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    w = torch.tensor([float("inf"), -float("inf")], dtype=torch.float64).view(1, 1, 1, 2)
    y, last = reference.wkv6(zeros + 1, zeros, zeros, w, zeros[0, 0], state)
    assert y.flatten().tolist() == [2, 2] and last.view(2, 2).tolist() == [[0, 0], [1, 1]]


def test_reference_packed_equals_separate():
    lengths = [3, 0, 1, 4]
    inputs = make_inputs("6.0", heads=2, size=3, lengths=lengths, dtype=torch.float64)
    y, state = reference.wkv6(*inputs)
    first = 0
    for i, length in enumerate(lengths):
        part = [x[:, first : first + length] for x in inputs[:4]]
        part_y, part_state = reference.wkv6(*part, inputs.u, inputs.state[i : i + 1])
        assert torch.equal(y[:, first : first + length], part_y) and torch.equal(state[i : i + 1], part_state)
        first += length
    y5, state5 = reference.wkv5(*inputs[:3], inputs.w[0, 0], inputs.u, None, inputs.cu_seqlens)
    y6, state6 = reference.wkv6(*inputs[:3], inputs.w[:, :1].expand_as(inputs.r), inputs.u, None, inputs.cu_seqlens)
    assert torch.equal(y5, y6) and torch.equal(state5, state6)


def test_reference_dtypes():
    inputs = make_inputs("6.0", 1, 3, 2, 4, dtype=torch.bfloat16)
    results = outputs_and_gradients(reference.wkv6, inputs)
    assert {name: x.dtype for name, x in results.items()} == {
        "y": torch.bfloat16, "state_out": torch.float32, "dr": torch.bfloat16, "dk": torch.bfloat16,
        "dv": torch.bfloat16, "dw": torch.float32, "du": torch.float32, "dstate": torch.float32,
    }  # fmt: skip
    y, state = reference.wkv6(*(x[:, :0] for x in inputs[:4]), inputs.u)
    assert y.shape == (1, 0, 2, 4) and y.dtype == torch.bfloat16 and not state.any()


@pytest.mark.parametrize("w", [float("inf"), 1e4, 120.0, -1e4, -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_decay_limits(w, dtype):
    w = torch.tensor([w], dtype=dtype, requires_grad=True)
    decay = reference.decay_of(w)
    (gradient,) = torch.autograd.grad(decay, w)
    assert decay.item() == (0 if w > 0 else 1) and gradient.item() == 0


def test_assert_close_ratio_names_the_tensor():
    """The judge of all other tests must be able to say no."""
    good = {"y": torch.ones(4), "dk": torch.arange(4.0)}
    assert_close_ratio(good, good)
    with pytest.raises(AssertionError, match=r"too inexact: dk\ny: error ratio 0.00e\+00.*\ndk: error ratio 5.35e-01"):
        assert_close_ratio(good | {"dk": torch.tensor([0.0, 1, 2, 5])}, good)
    with pytest.raises(AssertionError, match="too inexact: y"):
        assert_close_ratio(good | {"y": torch.full((4,), float("nan"))}, good)
    infinite = {"y": torch.tensor([float("inf"), 1, float("nan")])}
    assert_close_ratio(infinite, infinite)
    for wrong in ([float("inf"), 1, 0], [float("nan"), 1, float("nan")], [float("inf"), float("inf"), float("nan")]):
        with pytest.raises(AssertionError, match="error ratio inf"):
            assert_close_ratio({"y": torch.tensor(wrong)}, infinite)
    with pytest.raises(AssertionError, match=r"expected tensors \['dk', 'y'\], got \['y'\]"):
        assert_close_ratio({"y": good["y"]}, good)
    with pytest.raises(ValueError, match=r"error_ratio: actual must have shape \[2\], got \[1\]"):
        assert_close_ratio({"y": torch.ones(1)}, {"y": torch.ones(2)})
    tiny = {"y": torch.full((4,), 1e-60, dtype=torch.float64)}
    assert_close_ratio({"y": torch.zeros(4)}, tiny, floor=0)  # underflow is no error in fp32, but is one in fp64
    with pytest.raises(AssertionError, match="error ratio 1.00e"):
        assert_close_ratio({"y": torch.zeros(4, dtype=torch.float64)}, tiny)
    loose = {"y": torch.tensor([1.0, 1, 1, 1.001])}
    assert_close_ratio({"y": torch.tensor([1.0, 1, 1, 1.0019])}, {"y": torch.ones(4)}, loose)
    with pytest.raises(AssertionError):
        assert_close_ratio({"y": torch.tensor([1.0, 1, 1, 1.0021])}, {"y": torch.ones(4)}, loose)
    with pytest.raises(AssertionError):  # a baseline that is itself wrong does not excuse anything
        assert_close_ratio({"y": torch.full((4,), 1.1)}, {"y": torch.ones(4)}, {"y": torch.full((4,), 1.1)})


@pytest.mark.parametrize("regime", decay_regimes)
def test_decay_regimes_hold_what_they_promise(regime):
    w = make_inputs("6.0", 2, 64, 2, 16, regime=regime).w
    decay = reference.decay_of(w)
    promise = {
        "typical": w.amin() < -6 and w.amax() > 1 and (decay > 0).all(),
        "mixed": decay.amin() < 1e-20 and decay.amax() > 0.999,
        "near_one": decay.amin() > 0.999,
        "near_zero": decay.amax() < 1e-8 and (decay == 0).any() and (decay > 0).any(),
        "resets": (decay < 0.1).double().mean().item() == pytest.approx(0.05, abs=0.02),
        "huge": torch.exp(w).isinf().any() and (w.exp().isfinite() & (w > 60)).any() and (w < 0).double().mean() > 0.9,
    }
    assert promise[regime]
    assert (make_inputs("5.2", 1, 1, 1, 3, regime=regime).w > 50).any() == (regime == "huge")


def test_make_inputs_is_reproducible_and_checked():
    a, b = (make_inputs("6.0", 1, 3, 2, 4, dtype=dtype, seed=3) for dtype in (torch.bfloat16, torch.float64))
    assert torch.equal(a.r, b.r.bfloat16()) and torch.equal(a.w, b.w.float())
    assert not torch.equal(a.r, make_inputs("6.0", 1, 3, 2, 4, dtype=torch.bfloat16, seed=4).r)
    with pytest.raises(ValueError, match="make_inputs: version must be one of 5.2, 6.0, got '7.0'"):
        make_inputs("7.0")
    with pytest.raises(ValueError, match="make_inputs: regime must be one of typical, .*huge, got 'odd'"):
        make_inputs("6.0", regime="odd")
    with pytest.raises(ValueError, match="make_inputs: layout must be one of contiguous, .*expanded, got 'odd'"):
        make_inputs("6.0", layout="odd")
    with pytest.raises(ValueError, match="gradcheck_wkv: inputs must be float64, got torch.float32; use"):
        gradcheck_wkv(reference.wkv6, make_inputs("6.0", 1, 3, 2, 4))
