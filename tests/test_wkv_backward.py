"""Every gradient of the ops against autograd through the reference, finite differences and each subset of inputs."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from wkv_cases import DTYPES, ON_CUDA, OPS, REFERENCES, SHAPES, assert_accurate, head_size, make_inputs, name

from rwkv_ext import ops, reference
from rwkv_ext.testing import (
    GRADIENTS,
    assert_close_ratio,
    decay_bins,
    decay_regimes,
    error_ratio,
    gradcheck_wkv,
    layouts,
    outputs_and_gradients,
)


@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_wkv_backward_fp64(case):
    version, *shape, regime = case
    inputs = make_inputs(version, *shape, regime=regime, dtype=torch.float64)
    expected = outputs_and_gradients(REFERENCES[version], inputs)
    assert_close_ratio(outputs_and_gradients(OPS[version], inputs), expected, floor=1e-13)
    assert {"y", "state_out", *GRADIENTS} == set(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", decay_regimes)
def test_wkv_backward_accuracy(regime, dtype):
    """Over two chunks in fp32, where dw by the usual identity loses all its digits, and with halves."""
    for version, size in (("6.0", 32), ("5.2", 16)):
        inputs = make_inputs(version, 1, 145, 2, size, regime=regime, dtype=dtype)
        exact, plain = (outputs_and_gradients(REFERENCES[version], x) for x in (inputs.double(), inputs))
        assert_accurate(outputs_and_gradients(OPS[version], inputs), exact, plain, dtype, inputs=inputs)


def test_wkv_backward_dw_by_decay():
    """dw stays exact in every bin of decays: a ratio over all of w is blind to the small ones."""
    inputs = make_inputs("6.0", 1, 200, 2, 32, regime="mixed", dtype=torch.float32)
    exact = outputs_and_gradients(reference.wkv6, inputs.double())["dw"]
    actual = outputs_and_gradients(ops.wkv6, inputs)["dw"]
    for _, here in list(decay_bins(inputs.w))[:5]:
        assert here.sum() > 100 and error_ratio(actual[here], exact[here]) < 2e-6


@pytest.mark.parametrize("cotangents", [("y",), ("state_out",)], ids=["y-alone", "state_out-alone"])
@pytest.mark.parametrize("version", OPS)
def test_wkv_backward_one_output(version, cotangents):
    """dy or dstate_out is absent in the op, not zeros."""
    for state in (True, False):
        inputs = make_inputs(version, 2, 140, 2, 8, regime="mixed", dtype=torch.float64, state=state)
        expected = outputs_and_gradients(REFERENCES[version], inputs, cotangents=cotangents)
        actual = outputs_and_gradients(OPS[version], inputs, cotangents=cotangents)
        assert_close_ratio(actual, expected, floor=1e-13)


@pytest.mark.parametrize("version", OPS)
def test_wkv_backward_requires_grad_subsets(version):
    """Each of the 63 non-empty subsets gives bitwise the gradients of the full set, and no others."""
    inputs = make_inputs(version, 1, 18, 2, 8, dtype=torch.float32)
    full = outputs_and_gradients(OPS[version], inputs)
    for count in range(len(GRADIENTS) + 1):
        for subset in itertools.combinations(GRADIENTS, count):
            results = outputs_and_gradients(OPS[version], inputs, gradients=subset)
            assert set(results) == {"y", "state_out", *subset}
            assert all(torch.equal(x, full[key]) for key, x in results.items()), subset


@pytest.mark.parametrize("layout", [name for name in layouts if name != "contiguous"])
@pytest.mark.parametrize("version", OPS)
def test_wkv_backward_layouts(version, layout):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(version, 2, 19, 3, 24, dtype=dtype, layout=layout)
        dense = type(inputs)(*(x if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs))
        actual, expected = (outputs_and_gradients(OPS[version], x) for x in (inputs, dense))
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_wkv_backward_cotangent_layouts():
    """Gradients arrive in whatever layout the layer above left them: expanded from a sum, transposed, strided."""
    size = head_size(8)
    inputs = make_inputs("6.0", 2, 20, 2, size)
    leaves = [x.requires_grad_() for x in inputs[:6]]
    y, state = ops.wkv6(*leaves)
    backward = lambda dy, ds: torch.autograd.grad((y, state), leaves, (dy, ds), retain_graph=True)  # noqa: E731
    for dy, ds in (
        (torch.tensor(2.0).expand_as(y), torch.tensor(3.0).expand_as(state)),
        (torch.randn(20, 2, 2, size).transpose(0, 1), torch.randn_like(state).mT),
        (torch.randn(2, 20, 2, 2 * size)[..., ::2], torch.randn(2, 4, size, size)[:, ::2]),
    ):
        for a, b in zip(backward(dy, ds), backward(dy.contiguous(), ds.contiguous()), strict=True):
            assert torch.equal(a, b) and a.is_contiguous()


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wkv_backward_dtypes(parameter_dtype):
    """Every gradient in its own input's dtype."""
    for version in OPS:
        inputs = make_inputs(version, 2, 30, 2, 16, dtype=torch.bfloat16, parameter_dtype=parameter_dtype)
        results = outputs_and_gradients(OPS[version], inputs)
        for field, x in zip(inputs._fields[:6], inputs[:6], strict=True):
            assert results[f"d{field}"].dtype == x.dtype and results[f"d{field}"].shape == x.shape
        exact, plain = (outputs_and_gradients(REFERENCES[version], x) for x in (inputs.double(), inputs))
        assert_accurate(results, exact, plain, torch.bfloat16)


@pytest.mark.parametrize("version", OPS)
def test_wkv_backward_gradcheck(version):
    """Finite differences, every element: within a block, over blocks, and over chunks of 128 with one channel."""
    for batch, tokens, heads, size in ((2, 5, 2, 3), (1, 35, 1, 2), (1, 131, 1, 1)):
        inputs = make_inputs(version, batch, tokens, heads, size, regime="mixed", dtype=torch.float64)
        gradcheck_wkv(OPS[version], inputs, fast_mode=ON_CUDA)  # N = 32 there: too many elements


@pytest.mark.parametrize("regime", decay_regimes)
def test_wkv_backward_gradcheck_regimes(regime):
    """Three chunks by random projections, in every regime."""
    for version in OPS:
        inputs = make_inputs(version, 2, 270, 2, 5, regime=regime, dtype=torch.float64, state=version == "6.0")
        gradcheck_wkv(OPS[version], inputs, fast_mode=True)


def test_wkv_backward_accumulates_in_fp64_over_sequences():
    """du and Eagle's dw add up B x T terms: 40 rows of 300 tokens lose no digits of fp32."""
    inputs = make_inputs("5.2", 40, 300, 1, 2, regime="near_one")
    actual = outputs_and_gradients(ops.wkv5, inputs, gradients=("dw", "du"))
    exact = outputs_and_gradients(ops.wkv5, inputs.double(), gradients=("dw", "du"))
    assert error_ratio(actual["du"], exact["du"]) < (5e-6 if ON_CUDA else 5e-7)
    assert error_ratio(actual["dw"], exact["dw"]) < 5e-6


def test_wkv_backward_twice_with_retain_graph():
    inputs = [x.requires_grad_() for x in make_inputs("6.0", 1, 20, 2, 8)[:6]]
    y, state = ops.wkv6(*inputs)
    loss = y.square().sum() + state.sum()
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("argument", range(6), ids="r k v w u state".split())
def test_wkv_backward_notices_changed_inputs(argument):
    """An input that is overwritten between forward and backward: autograd's error, never a wrong gradient."""
    inputs = list(make_inputs("6.0", 1, 20, 2, 8)[:6])
    leaf = inputs[0].clone().requires_grad_()
    tensors = [leaf * 1, *inputs[1:]]
    y, _ = ops.wkv6(*tensors)
    with torch.no_grad():
        tensors[argument].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_wkv_backward_shared_input():
    """One tensor as r, k and v: autograd adds the three gradients."""
    x = torch.randn(1, 20, 2, head_size(8), dtype=torch.float64, requires_grad=True)
    w, u = torch.randn(2, 2, head_size(8), dtype=torch.float64)
    (actual,), (expected,) = (torch.autograd.grad(op(x, x, x, w, u)[0].sum(), x) for op in (ops.wkv5, reference.wkv5))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_wkv_backward_saves_nothing_without_need():
    """Chunk states are made where a backward may follow, and neither under no_grad nor without leaves."""

    class Saved(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), options=None):
            result = op(*arguments, **(options or {}))
            if op is torch.ops.rwkv_ext.wkv6_forward.default:
                sizes.append(result[2].numel())
            return result

    size = head_size(8)
    inputs = make_inputs("6.0", 1, 20, 2, size)
    sizes = []
    with Saved():
        assert ops.wkv6(*inputs)[0].grad_fn is None
        inputs.r.requires_grad_()
        assert ops.wkv6(*inputs)[0].requires_grad
        with torch.no_grad():
            assert not ops.wkv6(*inputs)[0].requires_grad
        with torch.inference_mode():
            assert ops.wkv6(*inputs)[0].is_inference()
    assert sizes == [0, 2 * size * size, 0, 0]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        ops.wkv6(*inputs)
    assert len(kept) == 8 and torch.Size([1, 1, 2, size, size]) in kept  # six inputs, chunk states, scores


def test_wkv_backward_under_activation_checkpointing():
    inputs = make_inputs("6.0", 1, 150, 2, 8)

    def checkpointed(*arguments):
        return torch.utils.checkpoint.checkpoint(ops.wkv6, *arguments, use_reentrant=False)

    actual, expected = (outputs_and_gradients(op, inputs) for op in (checkpointed, ops.wkv6))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
