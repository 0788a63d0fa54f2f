"""linear() against F.linear: values, derivatives of both orders, any strides, and when it leaves the work to torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from rwkv_ext import linear_cross_entropy, matrix_product
from rwkv_ext.matrix_product import linear

SHAPES = {"rows": ((70, 256), 96), "batch": ((2, 35, 256), 97), "odd": ((67, 251), 131), "wide": ((4, 1031), 517)}
needs_avx512 = pytest.mark.skipif(not matrix_product._HAS_AVX512, reason="this torch has no AVX-512 oneDNN here")


@pytest.fixture
def calls(monkeypatch):
    """Note the products that go to oneDNN; without AVX-512 the switch is thrown: what oneDNN has instead serves."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    seen, run = [], matrix_product._by_onednn
    monkeypatch.setattr(matrix_product, "_HAS_AVX512", True)
    monkeypatch.setattr(matrix_product, "_by_onednn", lambda x, w: seen.append(x.shape) or run(x, w))
    return seen


def make(shape, out, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, w, c = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
        for s in (shape, (out, shape[-1]), (*shape[:-1], out))
    )
    return x.requires_grad_(), w.requires_grad_(), c


def assert_close(actual, expected):
    """Within 2e-6 (relative RMS) of the product in fp64: fp32 rounding over a thousand terms."""
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize(("shape", "out"), SHAPES.values(), ids=SHAPES)
def test_product_and_gradients(shape, out, calls):
    x, w, c = make(shape, out)
    y = linear(x, w)
    gradients = torch.autograd.grad((y * c).sum(), (x, w))
    assert len(calls) == 3
    wide_x, wide_w = (t.detach().double().requires_grad_() for t in (x, w))
    expected = F.linear(wide_x, wide_w)
    assert_close(y, expected)
    for got, want in zip(gradients, torch.autograd.grad((expected * c).sum(), (wide_x, wide_w)), strict=True):
        assert_close(got, want)


def test_transposed_and_expanded_operands(calls):
    x, w, _ = make((256, 70), 64)
    for a, b in ((x.t(), w.detach().new_ones(64, 256)), (x, w), (x[:, ::2], w[:, ::2]), (x[:1].expand(256, 70), w)):
        assert_close(linear(a, b), F.linear(a.double(), b.double()))
    assert len(calls) >= 3


@pytest.mark.parametrize("needed", ["x", "w"])
def test_only_the_wanted_gradient_is_computed(needed, calls):
    x, w, c = make((70, 256), 96)
    {"x": w, "w": x}[needed].requires_grad_(False)
    (linear(x, w) * c).sum().backward()
    assert len(calls) == 2 and ((x.grad is None), (w.grad is None)) == (needed == "w", needed == "x")


def test_second_derivative(calls):
    x, w, c = make((70, 256), 96)

    def of(product, x, w):
        (gradient,) = torch.autograd.grad((product(x, w) ** 2 * c).sum(), x, create_graph=True)
        return torch.autograd.grad((gradient**2).sum(), (x, w))

    actual = of(linear, x, w)
    assert len(calls) > 3
    for got, want in zip(actual, of(F.linear, *(t.detach().double().requires_grad_() for t in (x, w))), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("case", ["small", "rows", "fp64", "bf16", "empty", "autocast", "disabled", "func", "forward"])
def test_torchs_own_product_where_it_fits_better(case, calls):
    shapes = {"small": ((8, 64), 64), "rows": ((2, 2048), 1024), "empty": ((0, 256), 4096)}
    shape, out = shapes.get(case, ((70, 256), 96))
    x, w, _ = make(shape, out, {"fp64": torch.float64, "bf16": torch.bfloat16}.get(case, torch.float32))
    if case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, w).dtype == torch.bfloat16
    elif case == "disabled":
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(linear(x, w), F.linear(x, w))
    elif case == "func":
        assert torch.equal(torch.func.vmap(linear, (0, None))(x[None], w)[0], F.linear(x, w))
    elif case == "forward":
        with forward_ad.dual_level():
            y = linear(forward_ad.make_dual(x.detach(), x.detach()), w.detach())
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, F.linear(x, w).detach())
    else:
        assert torch.equal(linear(x, w), F.linear(x, w))
    assert not calls


def test_wrong_shapes_get_torchs_words(calls):
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        linear(torch.zeros(70, 256), torch.zeros(96, 255))


@pytest.mark.parametrize("shape", [(70, 64, 9000), (3, 256, 4096), (70, 251, 4097)], ids=str)
def test_products_by_tiles(shape, calls):
    n, width, vocab = shape
    x, w, z = make((n, width), vocab)
    x, w = x.detach(), w.detach()
    out = torch.full((n, vocab), float("nan"))
    matrix_product.multiply_into(out, x, w)
    assert_close(out, x.double() @ w.double().t())
    total = torch.full((width, vocab), float("nan"))
    for first in (True, False):
        matrix_product.add_transposed_product(total, z, x, first)
    assert_close(total, 2 * x.double().t() @ z.double())
    assert n < 4 or len(calls) == 3 * len(matrix_product._tiles(vocab))


@pytest.mark.parametrize("tokens", [50, 600])
def test_the_loss_uses_it(tokens, calls):
    """Loss and gradients in fp32, cut into chunks, against torch in fp64."""
    x, w, _ = make((tokens, 96), 5000)
    targets = torch.randint(5000, (tokens,), generator=torch.Generator().manual_seed(3))
    loss = linear_cross_entropy(x, w, targets, l2wrap=0, chunk=256)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = F.cross_entropy(F.linear(*wide), targets)
    assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, wide)
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want)
    assert calls and gradients[0][1].is_contiguous()


@needs_avx512
def test_a_model_uses_it(monkeypatch):
    from rwkv_ext.models import RWKV, RWKVConfig

    seen, run = [], matrix_product._by_onednn
    monkeypatch.setattr(matrix_product, "_by_onednn", lambda x, w: seen.append(1) or run(x, w))
    model = RWKV(RWKVConfig(version="6.0", vocab_size=64, n_layer=1, n_embd=128))
    model(torch.zeros(1, 256, dtype=torch.int64))[0].sum().backward()
    assert len(seen) >= 3 * 8
