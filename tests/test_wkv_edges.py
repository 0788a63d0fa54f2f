"""The ends of the number line: decays of exactly 0 and 1, infinities, NaN, denormals, sizes of zero."""

import pytest
import torch
from wkv_cases import ON_CUDA, OPS, REFERENCES, assert_accurate, head_size, make_inputs

from rwkv_ext import ops, reference
from rwkv_ext.testing import assert_close_ratio, outputs_and_gradients

INF = float("inf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", OPS)
def test_wkv_edges_infinite_w(version, dtype):
    """w = inf resets (decay 0), w = -inf keeps (decay 1), with w in fp32 and in r's dtype; no NaN, dw = 0."""
    inputs = make_inputs(version, 1, 40, 2, 6, dtype=dtype, parameter_dtype=dtype)
    w = inputs.w.clone()
    w[..., 0], w[..., 1] = INF, -INF
    w[..., 2] = torch.finfo(dtype).max
    w[..., 3] = torch.finfo(dtype).min
    inputs = inputs._replace(w=w)
    exact, plain = (outputs_and_gradients(REFERENCES[version], x) for x in (inputs.double(), inputs))
    actual = outputs_and_gradients(OPS[version], inputs)
    assert all(x.isfinite().all() for x in actual.values())
    assert not actual["dw"][..., :4].any()
    assert_accurate(actual, exact, plain, dtype, floor=1e-13 if dtype == torch.float64 else None)


def test_wkv_edges_reset_forgets_exactly():
    """After w = inf nothing earlier is left, not even a NaN's neighbour: bitwise a fresh start."""
    inputs = make_inputs("6.0", 1, 50, 2, 8)
    w = inputs.w.clone()
    w[:, 19] = INF
    y, state = ops.wkv6(*inputs._replace(w=w))
    fresh = [x[:, 20:] for x in (inputs.r, inputs.k, inputs.v, w)]
    last = inputs.k[:, 19, :, :, None] * inputs.v[:, 19, :, None, :]
    fresh_y, fresh_state = ops.wkv6(*fresh, inputs.u, last)
    assert torch.equal(y[:, 20:], fresh_y) and torch.equal(state, fresh_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wkv_edges_every_decay(dtype):
    """w from -200 to 200: the state's decay is exp(-exp(w)) to a few ulp, and 0 and 1 exactly at the ends."""
    w = torch.linspace(-200, 200, 40_001, dtype=dtype)
    w = torch.cat([w, torch.linspace(-110, -80, 301, dtype=dtype), torch.linspace(4, 5, 301, dtype=dtype)])
    tokens = torch.zeros(len(w), 1, 1, head_size(1), dtype=dtype)
    bonus = torch.zeros(1, head_size(1), dtype=dtype)
    state = torch.ones(len(w), 1, head_size(1), head_size(1), dtype=dtype)
    state = ops.wkv6(tokens, tokens, tokens, w.view(-1, 1, 1, 1).expand_as(tokens), bonus, state)[1].flatten(1)
    decay = state[:, 0]
    assert torch.equal(state, decay[:, None].expand_as(state))
    exact = torch.exp(-torch.exp(w.double()))
    # exp(-e) carries e's own rounding, e eps; a GPU's fast exponential errs by 2 ulp; what is denormal counts as 0
    tiny = torch.finfo(dtype).smallest_normal
    ulps = 8 if ON_CUDA else 2
    allowed = exact * (4 + ulps * torch.exp(w.double()).clamp(max=1e4)) * torch.finfo(dtype).eps + 2 * tiny
    assert ((decay.double() - exact).abs() <= allowed).all()
    assert (decay[w < -20] == 1).all() if dtype == torch.float32 else (decay[w < -40] == 1).all()
    assert (decay[w > 7] == 0).all() and not decay.isnan().any()
    assert ON_CUDA or dtype == torch.float64 or not ((decay > 0) & (decay < tiny)).any()


@pytest.mark.cpu
def test_wkv_edges_denormals_are_flushed_inside_alone():
    """A denormal state is none, in forward and in step; outside, on every thread, denormals are what they were."""
    inputs = make_inputs("6.0", 8, 20, 4, 32)
    tiny = torch.full_like(inputs.state, 1e-39)
    quiet = inputs._replace(k=inputs.k * 0, state=tiny)
    y, state = ops.wkv6(*quiet)
    assert (y == 0).all() and (state == 0).all()
    assert (ops.wkv6_step(*(x[:, 0] for x in quiet[:4]), quiet.u, tiny) == 0).all() and (tiny == 0).all()
    x = inputs._replace(r=inputs.r.clone().requires_grad_())
    ops.wkv6(*x)[0].sum().backward()
    denormals = torch.full((1 << 20,), 1e-39)
    assert ((denormals * 0.5) > 0).all()


@pytest.mark.cpu  # a GPU has no denormal decays
def test_wkv_edges_dw_where_decay_is_denormal():
    """exp(w) times the decay: small, finite and right, 0 once the decay is denormal or 0."""
    w = torch.linspace(4.0, 5.0, 64).view(64, 1, 1, 1).requires_grad_()
    one = torch.ones(64, 1, 1, 1)
    _, state = ops.wkv6(one, one * 0, one, w, torch.zeros(1, 1), one * 1e30)
    state.sum().backward()
    rate = w.detach().double().exp()
    exact, decay = -rate * torch.exp(-rate) * 1e30, torch.exp(-torch.exp(w.detach()))
    flushed = decay < torch.finfo(torch.float32).smallest_normal
    assert (w.grad[flushed] == 0).all() and (decay == 0).any() and (decay[flushed] > 0).any()
    normal = decay > 1e-37
    torch.testing.assert_close(w.grad[normal].double(), exact[normal], rtol=2e-5, atol=0)


@pytest.mark.parametrize("bad", ["r", "k", "v", "w"])
@pytest.mark.parametrize("value", [float("nan"), INF], ids=str)
def test_wkv_edges_nan_stays_where_it_belongs(bad, value):
    """A NaN or inf in one token and head leaves other rows, heads and earlier tokens bitwise alone."""
    clean = make_inputs("6.0", 2, 40, 3, 7)
    x = getattr(clean, bad).clone()
    x[1, 20, 2, 3] = value
    a, b = (outputs_and_gradients(ops.wkv6, i) for i in (clean, clean._replace(**{bad: x})))
    for key in ("y", "dr", "dk", "dv", "dw", "state_out", "dstate"):
        assert torch.equal(a[key][0], b[key][0]), key
        heads = 0 if key in ("state_out", "dstate") else 1
        assert torch.equal(a[key][1].narrow(heads, 0, 2), b[key][1].narrow(heads, 0, 2)), key
    assert torch.equal(a["y"][1, :20], b["y"][1, :20])
    assert torch.equal(a["du"][:2], b["du"][:2])
    if not (bad == "w" and value == INF):  # a legal decay
        assert not b["y"][1, 20:, 2].isfinite().all() or not b["state_out"][1, 2].isfinite().all()


@pytest.mark.parametrize("size", [7, 16, 33, 64])
def test_wkv_edges_nan_as_in_the_reference(size):
    """What is not finite is so in exactly the places where the reference has it: no padding lane makes 0 * inf."""
    for field, position, value in (
        ("k", (0, 5, 0, 1), float("nan")),
        ("v", (0, 5, 0, 2), float("nan")),
        ("r", (0, 5, 0, 3), float("nan")),
        ("w", (0, 5, 0, 0), float("nan")),
        ("v", (0, 9, 0, 6), INF),
        ("k", (0, 9, 0, 6), -INF),
    ):
        inputs = make_inputs("6.0", 1, 20, 1, size, dtype=torch.float64)
        x = getattr(inputs, field).clone()
        x[position] = value
        inputs = inputs._replace(**{field: x})
        for actual, expected in zip(ops.wkv6(*inputs), reference.wkv6(*inputs), strict=True):
            finite = expected.isfinite()  # inf or NaN depends on the order of a sum
            assert torch.equal(actual.isfinite(), finite), (field, value)
            torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-12, atol=1e-12)


@pytest.mark.cpu
@pytest.mark.parametrize("tokens", [5, 6, 7, 8])
def test_wkv_edges_nan_in_the_last_token_is_not_in_eagles_dw(tokens):
    """No decay acts on the last token's k and v, and the tokens that fill up a block have no share in a sum."""
    clean = make_inputs("5.2", 1, tokens, 2, 40)
    expected = outputs_and_gradients(ops.wkv5, clean)["dw"]
    for field in ("k", "v"):
        x = getattr(clean, field).clone()
        x[0, -1, 1, 3] = float("nan")
        assert torch.equal(outputs_and_gradients(ops.wkv5, clean._replace(**{field: x}))["dw"], expected), field


def test_wkv_edges_infinite_gradient():
    """An inf that arrives from above reaches what it multiplies and nothing else."""
    inputs = make_inputs("6.0", 1, 20, 2, 7, dtype=torch.float64)
    grads = []
    for op in (ops.wkv6, reference.wkv6):
        leaves = [x.clone().requires_grad_() for x in inputs[:6]]
        y, _ = op(*leaves)
        dy = torch.ones_like(y)
        dy[0, 10, 0, 2] = INF
        grads.append(torch.autograd.grad(y, leaves, dy))
    for field, actual, expected in zip(inputs._fields, *grads, strict=False):
        assert torch.equal(actual.isfinite(), expected.isfinite()), field
        both = expected.isfinite()
        torch.testing.assert_close(actual[both], expected[both], rtol=1e-12, atol=1e-12)


def test_wkv_edges_large_and_small_values():
    """1e18 and 1e-30 side by side in fp32: products near the largest number, no overflow on the way."""
    inputs = make_inputs("6.0", 1, 150, 1, 16, regime="mixed")
    scaled = inputs._replace(k=inputs.k * 1e18, v=inputs.v * 1e18, r=inputs.r * 1e-30, state=inputs.state * 1e30)
    exact, plain = (outputs_and_gradients(reference.wkv6, x) for x in (scaled.double(), scaled))
    assert_close_ratio(outputs_and_gradients(ops.wkv6, scaled), exact, plain)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "size"),
    [(0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4), (0, 0, 0, 1), (1, 1, 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("version", OPS)
def test_wkv_edges_zero_sizes(version, batch, tokens, heads, size):
    for state in (True, False):
        inputs = make_inputs(version, batch, tokens, heads, size, state=state)
        actual, expected = (outputs_and_gradients(op[version], inputs) for op in (OPS, REFERENCES))
        for key, x in expected.items():
            assert actual[key].shape == x.shape and actual[key].dtype == x.dtype
        assert_close_ratio(actual, expected, floor=2e-6 if ON_CUDA else 1e-6)


def test_wkv_edges_many_sequences_of_one_token():
    """As many sequences as tokens, and more (empty ones): first chunk states and offsets far apart."""
    lengths = [1, 0] * 150 + [130]
    inputs = make_inputs("6.0", heads=1, size=3, lengths=lengths, dtype=torch.float64)
    expected = outputs_and_gradients(reference.wkv6, inputs)
    assert_close_ratio(outputs_and_gradients(ops.wkv6, inputs), expected, floor=1e-13)


@pytest.mark.cpu
def test_wkv_edges_flush_denormal():
    """In torch's flush-denormal mode results stay within the denormals of the exact ones."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    for dtype in (torch.float32, torch.float16):
        inputs = make_inputs("6.0", 1, 150, 2, 16, regime="mixed", dtype=dtype)
        exact, plain = (outputs_and_gradients(reference.wkv6, x) for x in (inputs.double(), inputs))
        assert_close_ratio(outputs_and_gradients(ops.wkv6, inputs), exact, plain)
