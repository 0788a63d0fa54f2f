"""The one-token step for decoding: equal to the sequence op, in place, slots, and what autograd sees of it."""

import pytest
import torch
from wkv_cases import ON_CUDA, OPS, REFERENCES, assert_accurate, head_size, make_inputs

from rwkv_ext import ops
from rwkv_ext.testing import assert_close_ratio, decay_regimes, layouts

STEPS = {"5.2": ops.wkv5_step, "6.0": ops.wkv6_step}


def step_inputs(version, batch=2, heads=2, size=16, **options):
    """r, k, v, w, u, state of one token."""
    inputs = make_inputs(version, batch, 1, heads, size, **options)
    token = [x[:, 0] if x.dim() == 4 else x for x in inputs[:4]]
    return [*token, inputs.u, inputs.state]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", STEPS)
def test_wkv_step_equals_sequence(version, dtype):
    """Token by token the sequence op, bitwise if that is given one at a time, with N in and out of step with lanes."""
    for size in (1, 40, 64):
        inputs = make_inputs(version, 3, 20, 2, size, regime="huge", dtype=dtype)
        y, last = OPS[version](*inputs)
        state, tokens = inputs.state.clone(), []
        for t in range(20):
            w = inputs.w if version == "5.2" else inputs.w[:, t]
            tokens.append(STEPS[version](*(x[:, t] for x in inputs[:3]), w, inputs.u, state))
            assert tokens[t].dtype == dtype
        steps = torch.stack(tokens, 1)
        # Several tokens at once are another order of sums.
        exact, plain = (dict(zip("ys", REFERENCES[version](*x), strict=True)) for x in (inputs.double(), inputs))
        assert_accurate({"y": steps, "s": state}, exact, plain, dtype)
        assert_accurate({"y": y, "s": last}, exact, plain, dtype)
        if ON_CUDA:
            continue
        carried = inputs.state
        for t in range(20):
            w = inputs.w if version == "5.2" else inputs.w[:, t : t + 1]
            one, carried = OPS[version](*(x[:, t : t + 1] for x in inputs[:3]), w, inputs.u, carried)
            assert torch.equal(one[:, 0], tokens[t])
        assert torch.equal(carried, state)


@pytest.mark.parametrize("regime", decay_regimes)
@pytest.mark.parametrize("version", STEPS)
def test_wkv_step_fp64(version, regime):
    inputs = make_inputs(version, 2, 1, 3, 24, regime=regime, dtype=torch.float64)
    expected_y, expected_state = REFERENCES[version](*inputs)
    r, k, v, w, u, state = step_inputs(version, 2, 3, 24, regime=regime, dtype=torch.float64)
    y = STEPS[version](r, k, v, w, u, state)
    actual = {"y": y, "state": state}
    assert_close_ratio(actual, {"y": expected_y[:, 0], "state": expected_state}, floor=1e-14 if ON_CUDA else 1e-15)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("version", STEPS)
def test_wkv_step_layouts(version, layout):
    dense = step_inputs(version, 3, 2, 8)
    odd = [layouts[layout](x) for x in dense[:5]]
    a_state, b_state = dense[5].clone(), dense[5].clone()
    assert torch.equal(STEPS[version](*odd, a_state), STEPS[version](*dense[:5], b_state))
    assert torch.equal(a_state, b_state)


def test_wkv_step_updates_a_view_of_a_larger_state():
    """A layer's slice of the whole model's state, as decoding uses it; the other layers stay."""
    *token, state = step_inputs("6.0")
    layers = torch.stack([state, state, state])
    y = ops.wkv6_step(*token, layers[1])
    expected = ops.wkv6_step(*token, state)
    assert torch.equal(y, expected) and torch.equal(layers[1], state)
    assert torch.equal(layers[0], layers[2]) and not torch.equal(layers[0], layers[1])


@pytest.mark.parametrize("version", STEPS)
def test_wkv_step_slots(version):
    """Rows use the named slots in any order; -1 skips; slots that nobody names keep every bit."""
    *token, _ = step_inputs(version, 4)
    pool = torch.randn(6, 2, head_size(16), head_size(16))
    before = pool.clone()
    slots = torch.tensor([5, -1, 0, 3])
    y = STEPS[version](*token, pool, slots)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            assert not y[row].any()
            continue
        w = token[3] if version == "5.2" else token[3][row : row + 1]
        own = before[slot : slot + 1].clone()
        alone = STEPS[version](*(x[row : row + 1] for x in token[:3]), w, token[4], own)
        assert torch.equal(y[row : row + 1], alone) and torch.equal(pool[slot : slot + 1], own)
    for slot in (1, 2, 4):
        assert torch.equal(pool[slot], before[slot])
    skipped = STEPS[version](*token, pool.clone(), torch.full((4,), -1))
    assert not skipped.any()
    wide = torch.stack([slots, slots * 0 - 9], 1)[:, 0]  # a strided index tensor
    assert torch.equal(STEPS[version](*token, before.clone(), wide), y)


@pytest.mark.cpu  # a GPU cannot see the values of slots
def test_wkv_step_refused_slots_change_nothing():
    *token, _ = step_inputs("6.0", 3)
    for slots in ([0, 1, 1], [0, 1, 7], [0, 1, -2]):
        pool = torch.randn(5, 2, 16, 16)
        before = pool.clone()
        with pytest.raises((ValueError, IndexError)):
            ops.wkv6_step(*token, pool, torch.tensor(slots))
        assert torch.equal(pool, before)


def test_wkv_step_zero_sizes():
    for batch, heads in ((0, 2), (2, 0)):
        r, k, v, w, u, state = step_inputs("6.0", batch, heads, 4)
        assert ops.wkv6_step(r, k, v, w, u, state).shape == (batch, heads, head_size(4))
    r, k, v, w, u, _ = step_inputs("6.0", 0)
    pool = torch.randn(3, 2, head_size(16), head_size(16))
    before = pool.clone()
    ops.wkv6_step(r, k, v, w, u, pool, torch.zeros(0, dtype=torch.int64))
    assert torch.equal(pool, before)


def test_wkv_step_nan_stays_in_its_row():
    *token, state = step_inputs("6.0", 3)
    clean = state.clone()
    y = ops.wkv6_step(*token, clean)
    token[1] = token[1].clone()
    token[1][1, 0, 3] = float("nan")
    dirty = state.clone()
    y_dirty = ops.wkv6_step(*token, dirty)
    for row, head in ((0, 0), (0, 1), (1, 1), (2, 0), (2, 1)):
        assert torch.equal(y[row, head], y_dirty[row, head]) and torch.equal(clean[row, head], dirty[row, head])
    assert y_dirty[1, 0].isnan().all()


def test_wkv_step_bumps_the_version_counter():
    """Autograd notices that a tensor saved for backward has since been changed by the step."""
    *token, state = step_inputs("6.0")
    scale = torch.ones_like(state, requires_grad=True)
    product = (scale * state).sum()  # saves state
    version = state._version
    with torch.no_grad():
        ops.wkv6_step(*token, state)
    assert state._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("argument", range(6), ids="r k v w u state".split())
@pytest.mark.parametrize("version", STEPS)
def test_wkv_step_refuses_gradients(version, argument):
    inputs = step_inputs(version)
    inputs[argument].requires_grad_()
    name = "r k v w u state".split()[argument]
    op = f"wkv{version[0]}"
    message = (
        f"^{op}_step: {name} must not require a gradient, because this op has none; "
        rf"call it under torch.no_grad\(\), or use {op} to train$"
    )
    with pytest.raises(ValueError, match=message):
        STEPS[version](*inputs)
    with torch.no_grad():
        assert not STEPS[version](*inputs).requires_grad
    with torch.inference_mode():
        STEPS[version](*inputs[:5], inputs[5].detach().clone())


def test_wkv_step_inference_tensors():
    with torch.inference_mode():
        inputs = step_inputs("6.0")
    expected = [x.clone() for x in inputs]
    y = ops.wkv6_step(*inputs)  # outside the mode
    assert torch.equal(y, ops.wkv6_step(*expected)) and torch.equal(inputs[5], expected[5])


@pytest.mark.parametrize("version", STEPS)
def test_wkv_step_determinism(version):
    inputs = step_inputs(version, 5, 3, 64)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state = inputs[5].clone()
        runs.append((STEPS[version](*inputs[:5], state), state))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
