"""y and the last state of the ops against the reference: fp64 equality, accuracy in every dtype, memory layouts."""

import pytest
import torch
from wkv_cases import (
    DTYPES,
    OPS,
    REFERENCES,
    SHAPES,
    assert_accurate,
    head_size,
    make_inputs,
    name,
    uses_tensor_cores,
)

from rwkv_ext import ops, reference
from rwkv_ext.testing import assert_close_ratio, decay_regimes, error_ratio, layouts, outputs_and_gradients


def forward(op, inputs):
    return outputs_and_gradients(op, inputs, gradients=())


@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_wkv_forward_fp64(case):
    version, *shape, regime = case
    for state in (True, False):
        inputs = make_inputs(version, *shape, regime=regime, dtype=torch.float64, state=state)
        assert_close_ratio(forward(OPS[version], inputs), forward(REFERENCES[version], inputs), floor=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", decay_regimes)
def test_wkv_forward_accuracy(regime, dtype):
    for version, size in (("6.0", 64), ("5.2", 40)):
        inputs = make_inputs(version, 2, 150, 2, size, regime=regime, dtype=dtype)
        exact, plain = (forward(REFERENCES[version], x) for x in (inputs.double(), inputs))
        assert_accurate(forward(OPS[version], inputs), exact, plain, dtype)


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wkv_forward_parameter_dtypes(parameter_dtype):
    """w and u each in fp32 or in r's dtype, also mixed."""
    inputs = make_inputs("6.0", 1, 40, 2, 32, dtype=torch.bfloat16, parameter_dtype=parameter_dtype)
    for mixed in (inputs, inputs._replace(u=inputs.u.float()), inputs._replace(w=inputs.w.float())):
        exact = forward(reference.wkv6, mixed.double())
        assert_accurate(forward(ops.wkv6, mixed), exact, forward(reference.wkv6, mixed), torch.bfloat16)
        # fp32 arithmetic (tf32 on tensor cores) whatever the activations: the state is nowhere rounded to bf16
        bound = 5e-4 if uses_tensor_cores(torch.bfloat16) else 1e-6
        assert error_ratio(ops.wkv6(*mixed)[1], exact["state_out"]) < bound


@pytest.mark.parametrize("layout", [name for name in layouts if name != "contiguous"])
@pytest.mark.parametrize("version", OPS)
def test_wkv_forward_layouts(version, layout):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(version, 2, 19, 3, 24, dtype=dtype, layout=layout)
        assert layout == "offset" or not (inputs.r.is_contiguous() or inputs.state.is_contiguous())
        dense = [x if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs]
        for actual, expected in zip(OPS[version](*inputs), OPS[version](*dense), strict=True):
            assert torch.equal(actual, expected) and actual.is_contiguous()


def test_wkv_forward_odd_strides():
    """Every tensor its own layout: slices of a fused projection, a last stride of 0, odd strides of size-1 axes."""
    size = head_size(16)
    fused = torch.randn(2, 20, 3, 4 * size)  # [B, T, H, (r k v w)]
    r, k, v, w = fused.split(size, -1)
    u = torch.randn(size, 3).t()
    state = torch.randn(2, 3, size, size).mT
    dense = [x.contiguous() for x in (r, k, v, w, u, state)]
    for a, b in zip(ops.wkv6(r, k, v, w, u, state), ops.wkv6(*dense), strict=True):
        assert torch.equal(a, b)
    constant = r[..., :1].expand_as(r)
    assert torch.equal(ops.wkv6(constant, k, v, w, u)[0], ops.wkv6(constant.contiguous(), *dense[1:5])[0])
    scalar = r.sum() * torch.ones(()).expand(2, 20, 3, size)
    assert torch.equal(ops.wkv6(scalar.expand_as(r), k, v, w, u)[0], ops.wkv6(scalar.contiguous(), *dense[1:5])[0])
    one = torch.randn(head_size(5)).as_strided((1, 1, 1, head_size(5)), (99, 98, 97, 1))
    assert torch.equal(
        ops.wkv5(one, one, one, one[0, 0], one[0, 0])[0], ops.wkv5(*[one.clone()] * 3, *[one[0, 0]] * 2)[0]
    )
    thin = torch.randn(2, 3, head_size(1), 6).permute(0, 3, 1, 2)  # N = 1 (on the CPU) with a last stride of 6
    bonus = torch.randn(3, head_size(1))
    assert torch.equal(ops.wkv6(*[thin] * 4, bonus)[0], ops.wkv6(*[thin.contiguous()] * 4, bonus)[0])


def test_wkv_forward_lazy_views():
    """Views that torch resolves before a kernel sees them: a negative bit, a broadcast from a 0-d tensor."""
    size = head_size(4)
    x = torch.randn(1, 5, 2, size, dtype=torch.complex64)
    r = x.conj().imag
    assert r.is_neg()
    others = [torch.randn(1, 5, 2, size) for _ in range(3)]
    u = torch.randn(2, size)
    assert torch.equal(ops.wkv6(r, *others, u)[0], ops.wkv6(-x.imag.clone(), *others, u)[0])


def without_denormals(x):
    """Return x [fp32] as the kernels see it: denormal numbers are flushed to zero."""
    return x.masked_fill(x.abs() < torch.finfo(torch.float32).smallest_normal, 0)


@pytest.mark.cpu  # N = 1
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wkv_forward_reads_every_half(dtype):
    """y = r u k v with N = 1 and r = u = k = 1 must hand back every 16-bit number, but fp32 denormals."""
    v = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).view(-1, 1, 1, 1)
    one = torch.ones_like(v)
    y, state = ops.wkv5(one, one, v, torch.zeros(1, 1), torch.ones(1, 1))
    assert torch.equal(y.isnan(), v.isnan())
    numbers = ~v.isnan()
    expected = without_denormals(v[numbers].float())
    assert torch.equal(y[numbers], expected.to(dtype))
    assert torch.equal(state[numbers], expected)


@pytest.mark.cpu  # N = 1
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wkv_forward_rounds_halves_as_torch(dtype):
    """fp32 numbers of every exponent, and every tie, to nearest even: overflow, fp16's denormals and zeros included."""
    bits = torch.randint(-(2**31), 2**31, (40_000,)).to(torch.int32)
    edges = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    ties = (edges.nan_to_num() + edges.roll(-1).nan_to_num()) / 2
    u = torch.cat([bits.view(torch.float32), edges, ties, torch.tensor([65519.996, 65520, 3.4e38])]).nan_to_num(nan=0.0)
    one = torch.ones(1, 1, len(u), 1, dtype=dtype)
    y, _ = ops.wkv5(one, one, one, torch.zeros(len(u), 1), u[:, None])
    assert torch.equal(y.flatten(), without_denormals(u).to(dtype)) and y.isinf().any()


def test_wkv_forward_eagle_is_finch_with_one_decay():
    inputs = make_inputs("5.2", 2, 40, 3, 24)
    w = inputs.w.expand_as(inputs.r)
    for a, b in zip(ops.wkv5(*inputs), ops.wkv6(*inputs._replace(w=w)), strict=True):
        assert torch.equal(a, b)


def test_wkv_forward_leaves_inputs_alone():
    inputs = make_inputs("6.0", 2, 20, 2, 16)
    copies = [x if x is None else x.clone() for x in inputs]
    y, state = ops.wkv6(*inputs)
    assert all(a is None or torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert y.dtype == inputs.r.dtype and state.data_ptr() != inputs.state.data_ptr()
    empty = ops.wkv6(*(x[:, :0] for x in inputs[:4]), inputs.u, inputs.state)
    assert torch.equal(empty[1], inputs.state) and empty[1].data_ptr() != inputs.state.data_ptr()
    assert not ops.wkv6(*(x[:, :0] for x in inputs[:4]), inputs.u)[1].any()
