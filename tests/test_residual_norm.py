"""ResidualNorm, with the op and without it: values, gradients and dtypes, under autocast as well."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_ext import _layer_registration, _load
from rwkv_ext.models.residual_norm import ResidualNorm

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
BOUNDS = {FP64: 1e-13, FP32: 2e-6, BF16: 3e-3, FP16: 4e-4}
built = pytest.mark.skipif(_load.error is not None, reason="the op library is not built")


def norm_of(width, dtype):
    norm = ResidualNorm(width).to(dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def inputs_of(x_dtype, delta_dtype, shape=(2, 70, 37)):
    torch.manual_seed(1)
    x, delta = (torch.randn(shape, dtype=FP64) for _ in range(2))
    return (3 + x).to(x_dtype).requires_grad_(), delta.to(delta_dtype).requires_grad_()


def assert_close(actual, expected, bound):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= bound, f"relative RMS error {error:.1e} > {bound:.0e}"


# Autocast's dtype, x's, delta's, and the norm's that comes out.
DTYPES = [
    *((None, dtype, dtype, dtype) for dtype in (FP64, FP32, BF16, FP16)),
    *((half, FP32, half, half) for half in (BF16, FP16)),
    (BF16, BF16, BF16, BF16),
    (BF16, FP32, FP32, BF16),
    (FP16, BF16, BF16, FP16),
]


@pytest.mark.parametrize("with_ops", [pytest.param(True, marks=built), False], ids=["op", "plain"])
@pytest.mark.parametrize("autocast, x_dtype, delta_dtype, dtype", DTYPES, ids=str)
def test_values_gradients_and_dtypes(autocast, x_dtype, delta_dtype, dtype, with_ops, monkeypatch):
    monkeypatch.setattr(_layer_registration, "_built", with_ops)
    norm, (x, delta) = norm_of(37, x_dtype), inputs_of(x_dtype, delta_dtype)
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        total, normal = norm(x, delta)
    assert (total.dtype, normal.dtype) == (torch.promote_types(x_dtype, delta_dtype), dtype)
    assert torch.equal(total, x + delta)
    dtotal, dnormal = torch.randn(x.shape).to(total.dtype), torch.randn(x.shape).to(dtype)
    leaves = (x, delta, norm.weight, norm.bias)
    gradients = torch.autograd.grad((total, normal), leaves, (dtotal, dnormal))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    sum_ = exact[0] + exact[1]
    wanted = F.layer_norm(sum_ + (total.detach().double() - sum_.detach()), (37,), *exact[2:], norm.eps)
    wanted_gradients = torch.autograd.grad((sum_, wanted), exact, (dtotal.double(), dnormal.double()))
    fused = with_ops and dtype == delta_dtype
    bound = max(BOUNDS[x_dtype], BOUNDS[dtype]) * (1 if fused else 10)  # torch's sums over rows are less exact
    for got, want in zip((normal, *gradients), (wanted, *wanted_gradients), strict=True):
        assert_close(got, want, bound)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("with_ops", [pytest.param(True, marks=built), False], ids=["op", "plain"])
def test_no_delta_leaves_the_stream_as_it_is(with_ops, monkeypatch):
    monkeypatch.setattr(_layer_registration, "_built", with_ops)
    norm, (x, _) = norm_of(37, FP32), inputs_of(FP32, FP32)
    total, normal = norm(x)
    assert total is x
    torch.testing.assert_close(normal, F.layer_norm(x, (37,), norm.weight, norm.bias, norm.eps))
    plain = F.layer_norm(x, (37,), norm.weight, norm.bias, norm.eps)
    (got,) = torch.autograd.grad(total.square().sum() + normal.square().sum(), x)
    (want,) = torch.autograd.grad(x.square().sum() + plain.square().sum(), x)
    torch.testing.assert_close(got, want)


@built
@pytest.mark.parametrize("part", [0, 1], ids=["sum", "norm"])
def test_one_of_the_outputs_alone_has_a_gradient(part):
    norm, (x, delta) = norm_of(37, FP64), inputs_of(FP64, FP64)
    dy = torch.randn(x.shape, dtype=FP64)
    got = torch.autograd.grad(norm(x, delta)[part], (x, delta), dy)
    plain = (x + delta, F.layer_norm(x + delta, (37,), norm.weight, norm.bias, norm.eps))[part]
    for a, b in zip(got, torch.autograd.grad(plain, (x, delta), dy), strict=True):
        torch.testing.assert_close(a, b)


@built
def test_rows_are_apart():
    norm, (x, delta) = norm_of(37, FP32), inputs_of(FP32, BF16)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        clean = norm(x, delta)[1]
        x[1, 3, 5] = float("nan")
        dirty = norm(x, delta)[1]
    assert dirty[1, 3].isnan().all()
    dirty[1, 3] = clean[1, 3]
    assert torch.equal(dirty, clean)


@built
def test_rows_of_one():
    norm, (x, delta) = norm_of(1, FP32), inputs_of(FP32, FP32, (5, 1))
    total, normal = norm(x, delta)
    assert torch.equal(total, x + delta) and (normal == norm.bias).all()
    dx, dweight = torch.autograd.grad(normal.sum(), (x, norm.weight))
    assert not dx.any() and not dweight.any()


@built
def test_no_rows():
    norm, (x, delta) = norm_of(37, FP32), inputs_of(FP32, FP32, (2, 0, 37))
    total, normal = norm(x, delta)
    assert total.shape == normal.shape == (2, 0, 37)
    gradients = torch.autograd.grad(normal.sum(), (x, norm.weight))
    assert gradients[0].shape == x.shape and not gradients[1].any()


def test_transforms_and_norms_without_bias_take_the_plain_path():
    norm, plain = ResidualNorm(8), torch.nn.LayerNorm(8)
    x, tangent = torch.randn(3, 8), torch.randn(3, 8)
    _, wanted = torch.func.jvp(lambda a: plain(a + a), (x,), (tangent,))
    _, got = torch.func.jvp(lambda a: norm(a, a)[1], (x,), (tangent,))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.vmap(lambda a: norm(a)[1])(x), plain(x))
    assert ResidualNorm(8, bias=False)(x)[1].shape == x.shape
