"""The loss's CPU op against the same function in plain PyTorch: all dtypes, ties, odd sizes, NaN, and its messages."""

import pytest
import torch

from rwkv_ext import _layer_registration, _load, losses

pytestmark = pytest.mark.skipif(_load.error is not None, reason="the op library is not built")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNIT = {torch.float64: 1.2e-16, torch.float32: 6e-8, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # rounding


def op(*arguments):
    return torch.ops.rwkv_ext.cross_entropy_rows(*arguments)


def make(rows, vocab, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.parametrize("l2wrap", [0.0, 0.25])
@pytest.mark.parametrize("vocab", [1, 7, 16, 33, 512, 1031])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equals_the_plain_form(dtype, vocab, l2wrap):
    logits, targets = make(9, vocab, dtype)
    logits[3] = logits[3, 0]  # all equal: the first counts as the largest
    targets[4] = logits[4].argmax()
    expected = logits.to(torch.float64, copy=True)
    expected_loss = losses._softmax_gradient(expected, targets[:, None], None, l2wrap, True)
    loss = op(logits, targets, l2wrap, True)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert (loss.double().sum() - expected_loss).abs() <= 2e-6 * expected_loss.abs() + 1e-12
    relative = max(1.01 * UNIT[dtype], 2e-6)
    error = (logits.double() - expected).abs()
    assert (error <= relative * expected.abs() + 5e-7).all()  # 5e-7: what softmax - 1 loses


def test_fp64_is_fp64():
    logits, targets = make(3, 37, torch.float64)
    expected = logits.clone()
    losses._softmax_gradient(expected, targets[:, None], None, 0.1, True)
    op(logits, targets, 0.1, True)
    torch.testing.assert_close(logits, expected, rtol=1e-13, atol=1e-15)


def test_without_overwriting_the_logits_stay():
    logits, targets = make(5, 100, torch.float32)
    before = logits.clone()
    torch.testing.assert_close(
        op(logits, targets, 1.0, False), torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    )
    assert torch.equal(logits, before)


def test_rows_of_a_wider_tensor_and_no_rows():
    wide, targets = make(5, 100, torch.float32)
    part = wide[:, 10:60].contiguous()
    targets %= 50
    expected = op(part, targets, 0.1, True)
    edges = wide[:, :10].clone(), wide[:, 60:].clone()
    assert torch.equal(op(wide[:, 10:60], targets, 0.1, True), expected) and torch.equal(wide[:, 10:60], part)
    assert torch.equal(wide[:, :10], edges[0]) and torch.equal(wide[:, 60:], edges[1])
    assert op(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), 0.1, True).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_rows(dtype):
    logits, targets = make(4, 40, dtype)
    clean = logits.clone()
    logits[1, 5] = float("nan")
    logits[2, 38] = float("inf")
    loss, expected = op(logits, targets, 0.1, True), op(clean, targets, 0.1, True)
    assert loss[1].isnan() and loss[2].isnan() and logits[1].isnan().all() and logits[2].isnan().any()
    for row in (0, 3):
        assert torch.equal(loss[row], expected[row]) and torch.equal(logits[row], clean[row])


def test_the_first_of_several_largest():
    """Wherever it lies: before a block of vectors ends, in the next one, in single vectors, in the rest of a row."""
    for vocab in (5, 40, 300, 1000):
        for first in {0, 1, 4, 37, 255, 256, 290, 511, 512, 991, 999} & set(range(vocab)):
            logits = torch.zeros(1, vocab)
            logits[0, first :: 3] = 2.0
            gradient, plain = logits.clone(), logits.clone()
            op(gradient, torch.tensor([0]), 1.0, True)
            op(plain, torch.tensor([0]), 0.0, True)
            assert (gradient - plain).nonzero().tolist() == [[0, first]]


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[3e4, -3e4, 2.9e4], [-3e4, -3e4, -3e4]])
    loss = op(logits, torch.tensor([1, 2]), 0.0, True)
    torch.testing.assert_close(loss, torch.tensor([6e4, 3.0]).log().exp().where(torch.tensor([True, False]), loss))
    torch.testing.assert_close(loss[1], torch.tensor(3.0).log())
    torch.testing.assert_close(logits[0], torch.tensor([1.0, -1.0, 0.0]))


def test_same_bits_for_any_number_of_threads():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        logits, targets = make(37, 3000, torch.bfloat16)
        results.append((op(logits, targets, 0.1, True), logits))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_opcheck():
    logits, targets = make(3, 20, torch.float32)
    torch.library.opcheck(torch.ops.rwkv_ext.cross_entropy_rows.default, (logits, targets, 0.1, True))


@pytest.mark.parametrize(
    ("logits", "targets", "error", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), [0, 0], ValueError, "logits must be float32, .*, got int64"),
        (torch.zeros(3), [0], ValueError, r"logits must have shape \[rows, V\] with V >= 1, got \[3\]"),
        (torch.zeros(2, 0), [0, 0], ValueError, r"logits must have shape \[rows, V\] with V >= 1, got \[2, 0\]"),
        (torch.zeros(3, 2).t(), [0, 0], ValueError, r"logits must have a unit last stride, .*strides \[1, 2\]"),
        (torch.zeros(2, 3), [0], ValueError, r"targets must have shape \[rows\] = \[2\], got \[1\]"),
        (torch.zeros(2, 3), [0.0, 1.0], ValueError, "targets must be int64, got float32"),
        (torch.zeros(2, 3), [0, 3], IndexError, "targets must be from 0 to V - 1 = 2, got 3 at index 1"),
        (torch.zeros(2, 3), [-1, 0], IndexError, "targets must be from 0 to V - 1 = 2, got -1 at index 0"),
    ],
)
def test_messages(logits, targets, error, text):
    before = logits.clone()
    with pytest.raises(error, match="cross_entropy_rows: " + text):
        op(logits, torch.tensor(targets), 0.1, True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_same_without_the_op(dtype, monkeypatch):
    """What other devices run, on the CPU."""

    def loss_and_gradients():
        generator = torch.Generator().manual_seed(1)
        hidden, weight = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in ((9, 16), (512, 16)))
        targets = torch.randint(512, (9,), generator=generator)
        loss = losses.linear_cross_entropy(hidden, weight, targets, l2wrap=0.1, chunk=4)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    fused = loss_and_gradients()
    monkeypatch.setattr(_layer_registration, "_built", False)
    for got, want in zip(fused, loss_and_gradients(), strict=True):
        torch.testing.assert_close(got, want, rtol=4 * UNIT[dtype], atol=4 * UNIT[dtype] * want.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_accumulate(dtype):
    """total becomes part, then total + part, in fp32 or fp64 whatever part is in."""
    parts = [make(7, 301, dtype, seed)[0] for seed in range(2)]
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.full((7, 301), float("nan"), dtype=wide)
    for first, part in zip((True, False), parts, strict=True):
        torch.ops.rwkv_ext.accumulate(total, part, first)
    assert torch.equal(total, parts[0].to(wide) + parts[1].to(wide))
    torch.library.opcheck(torch.ops.rwkv_ext.accumulate.default, (total, parts[0], False))


@pytest.mark.parametrize(
    ("total", "text"),
    [
        (torch.zeros(3, 2), r"total must have the shape of part \[2, 3\], got \[3, 2\]"),
        (torch.zeros(2, 3).half(), "total must be float32 beside a bfloat16 part, got float16"),
        (torch.zeros(3, 2).t(), r"total must be contiguous, because it is changed in place, got strides \[1, 2\]"),
    ],
)
def test_accumulate_messages(total, text):
    with pytest.raises(ValueError, match="accumulate: " + text):
        torch.ops.rwkv_ext.accumulate(total, torch.zeros(2, 3, dtype=torch.bfloat16), False)


def test_a_masked_logit_has_no_gradient():
    logits = torch.tensor([[0.0, -1e9, -float("inf"), 2.0] * 8])
    torch.ops.rwkv_ext.cross_entropy_rows(logits, torch.tensor([3]), 0.0, True)
    assert logits[0, 1::4].eq(0).all() and logits[0, 2::4].eq(0).all()
