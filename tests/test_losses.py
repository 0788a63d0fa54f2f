"""linear_cross_entropy against F.linear, F.cross_entropy and L2Wrap written as a penalty that autograd can see."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_ext import losses
from rwkv_ext.losses import linear_cross_entropy

IGNORED = -100


def plain(hidden, weight, targets, l2wrap=1e-4, ignore_index=IGNORED):
    """Return (the value of the loss, what the gradients are the gradients of)."""
    logits = F.linear(hidden, weight).flatten(0, -2)
    targets = targets.flatten().long()
    value = F.cross_entropy(logits, targets, ignore_index=ignore_index)
    largest = logits.max(-1).values[targets != ignore_index]
    return value, value + 0.5 * l2wrap * (largest**2).mean()


def make(shape=(3, 11), width=16, vocab=77, dtype=torch.float64, ignored=5, scale=1.0):
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(*shape, width, dtype=torch.float64, generator=generator).to(dtype)
    weight = (scale * torch.randn(vocab, width, dtype=torch.float64, generator=generator)).to(dtype)
    targets = torch.randint(vocab, shape, generator=generator)
    targets.view(-1)[2 : 2 + ignored] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def gradients(loss, *inputs, **options):
    return torch.autograd.grad(loss, inputs, **options)


def rms_ratio(got, expected):
    return ((got.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("ignored", [0, 5])
@pytest.mark.parametrize("vocab", [77, 512, 1])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_fp64_equals_plain(vocab, chunk, ignored):
    hidden, weight, targets = make(vocab=vocab, ignored=ignored)
    value, objective = plain(hidden, weight, targets, l2wrap=0.3)
    loss = linear_cross_entropy(hidden, weight, targets, l2wrap=0.3, chunk=chunk)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=1e-12)
    # 2.5: the L2Wrap part is scaled by the incoming gradient like the rest
    got, expected = gradients(2.5 * loss, hidden, weight), gradients(2.5 * objective, hidden, weight)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vocab", [300, 4096])
def test_fp32_equals_plain(vocab):
    hidden, weight, targets = make((2, 50), 32, vocab, torch.float32)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    value, objective = plain(exact_hidden, exact_weight, targets)
    exact = gradients(objective, exact_hidden, exact_weight)
    loss = linear_cross_entropy(hidden, weight, targets, chunk=32)
    assert loss.item() == pytest.approx(value.item(), rel=1e-6)
    for got, expected in zip(gradients(loss, hidden, weight), exact, strict=True):
        assert got.dtype == torch.float32
        assert rms_ratio(got, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_at_least_as_exact_as_torch(dtype):
    hidden, weight, targets = make((4, 64), 32, 4096, dtype, scale=0.5)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    value, objective = plain(exact_hidden, exact_weight, targets)
    exact = gradients(objective, exact_hidden, exact_weight)
    loss = linear_cross_entropy(hidden, weight, targets, chunk=60)
    ours = gradients(loss, hidden, weight)
    stock_value, stock_objective = plain(hidden, weight, targets)
    stock = gradients(stock_objective, hidden, weight)
    assert loss.dtype == torch.float32
    unit = torch.finfo(dtype).eps
    assert abs(loss - value).item() < unit / 4 and abs(loss - value) <= abs(stock_value - value)
    for got, peer, expected in zip(ours, stock, exact, strict=True):
        assert got.dtype == dtype
        print("rms ratio", dtype, rms_ratio(got, expected), "torch", rms_ratio(peer, expected))
        assert rms_ratio(got, expected) < min(unit, 1.1 * rms_ratio(peer, expected))


def test_fp32_weight_with_16_bit_hidden_sums_in_fp32():
    hidden, weight, targets = make((4, 64), 32, 4096, torch.bfloat16, scale=0.5)
    master = weight.detach().float().requires_grad_()
    with_master = gradients(linear_cross_entropy(hidden, master, targets, chunk=16), hidden, master)
    with_bf16 = gradients(linear_cross_entropy(hidden, weight, targets, chunk=16), hidden, weight)
    assert [x.dtype for x in with_master] == [torch.bfloat16, torch.float32]
    assert torch.equal(with_master[0], with_bf16[0])
    assert torch.equal(with_master[1].bfloat16(), with_bf16[1])


def test_autocast_casts_hidden_and_keeps_the_fp32_master():
    hidden, weight, targets = make(vocab=512, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    got = gradients(loss, hidden, weight)
    cast = hidden.detach().bfloat16().requires_grad_()
    expected_loss = linear_cross_entropy(cast, weight, targets)
    expected = gradients(expected_loss, cast, weight)
    assert torch.equal(loss, expected_loss)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert torch.equal(got[0], expected[0].float()) and torch.equal(got[1], expected[1])


def test_autocast_leaves_fp64_alone():
    hidden, weight, targets = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), linear_cross_entropy(hidden, weight, targets))
        assert linear_cross_entropy(hidden, weight, targets).dtype == torch.float64


def test_gradcheck():
    hidden, weight, targets = make((2, 5), 6, 20, ignored=2)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, l2wrap=0, chunk=3), (hidden, weight)
    )


def test_reductions_differ_by_the_divisor():
    hidden, weight, targets = make()
    count = (targets != IGNORED).sum()
    mean = gradients(linear_cross_entropy(hidden, weight, targets, l2wrap=0.3), hidden, weight)
    total = linear_cross_entropy(hidden, weight, targets, l2wrap=0.3, reduction="sum")
    torch.testing.assert_close(gradients(total / count, hidden, weight), mean)
    for normalizer in (2 * count, 2 * count.item(), 2.0 * count):
        half = linear_cross_entropy(hidden, weight, targets, l2wrap=0.3, normalizer=normalizer)
        torch.testing.assert_close(gradients(2 * half, hidden, weight), mean)


def test_an_fp64_normalizer_leaves_the_loss_in_fp32():
    inputs = make(dtype=torch.float32)
    assert linear_cross_entropy(*inputs, normalizer=torch.tensor(3.0, dtype=torch.float64)).dtype == torch.float32


def test_accumulated_micro_batches_equal_the_batch():
    hidden, weight, targets = make((4, 9), ignored=11)
    count = (targets != IGNORED).sum()
    whole = gradients(linear_cross_entropy(hidden, weight, targets, l2wrap=0.3), hidden, weight)
    first, second = (
        linear_cross_entropy(hidden[half], weight, targets[half], l2wrap=0.3, normalizer=count)
        for half in (slice(0, 2), slice(2, 4))
    )
    torch.testing.assert_close(gradients(first + second, hidden, weight), whole)


@pytest.mark.parametrize("shape", [(2, 5), (0, 5), (0,)])
def test_no_token_left_gives_zero_loss_and_zero_gradients(shape):
    hidden, weight, _ = make(shape)
    for reduction in ("mean", "sum"):
        loss = linear_cross_entropy(hidden, weight, torch.full(shape, IGNORED), reduction=reduction)
        grad_hidden, grad_weight = gradients(loss, hidden, weight)
        assert loss == 0
        assert grad_hidden.shape == hidden.shape and not grad_hidden.any()
        assert grad_weight.shape == weight.shape and not grad_weight.any()


def test_other_ignore_index_and_int32_targets():
    hidden, weight, targets = make(ignored=0)
    value, objective = plain(hidden, weight, targets, ignore_index=3)
    assert (targets == 3).any()
    loss = linear_cross_entropy(hidden, weight, targets.int(), ignore_index=3)
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(gradients(loss, hidden, weight), gradients(objective, hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masked_rows_equal_selected_rows(dtype):
    # what other devices run, where selecting rows would synchronise
    hidden, weight, targets = make(vocab=512, dtype=dtype)
    hidden, weight, targets = hidden.detach().flatten(0, -2), weight.detach(), targets.flatten()
    keep = targets != IGNORED
    options = (0.3, 7, True, True)
    total, grad_hidden, grad_weight = losses._sum_and_gradients(hidden, weight, targets.where(keep, 0), keep, *options)
    expected = losses._sum_and_gradients(hidden[keep], weight, targets[keep], None, *options)
    assert not grad_hidden[~keep].any()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close((total, grad_hidden[keep], grad_weight), expected, **tolerance)


def test_l2wrap_takes_the_first_of_equal_logits():
    weight = torch.zeros(512, 4, dtype=torch.float64)
    weight[[70, 71, 300], 0] = 2.0
    hidden = torch.tensor([[1.5, 0, 0, 0]], dtype=torch.float64)
    targets = torch.tensor([9])
    grads = [
        losses._sum_and_gradients(hidden, weight, targets, None, l2wrap, 8, False, True)[2][:, 0] for l2wrap in (0, 0.5)
    ]
    difference = grads[1] - grads[0]
    assert difference.nonzero().tolist() == [[70]]
    assert difference[70].item() == pytest.approx(0.5 * 3.0 * 1.5)


def test_large_logits_and_improbable_targets_stay_finite():
    hidden = torch.tensor([[300.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 0.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]), l2wrap=0)
    assert loss.item() == 600
    assert gradients(loss, hidden)[0].tolist() == [[2.0, 0.0]]


def test_nan_is_reported_not_hidden():
    hidden, weight, targets = make(vocab=512, dtype=torch.float32)
    with torch.no_grad():
        hidden[0, 0, 0] = float("nan")
    assert linear_cross_entropy(hidden, weight, targets).isnan()


def profile(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = profiler.events()
    products = sum(event.name in ("aten::mm", "aten::addmm") for event in events)
    return result, products, max(event.self_cpu_memory_usage for event in events)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_never_exist(dtype):
    tokens, vocab, width, chunk = 96, 4096, 16, 8
    hidden, weight, targets = make((tokens,), width, vocab, dtype)
    _, _, largest = profile(lambda: linear_cross_entropy(hidden, weight, targets, chunk=chunk).backward())
    assert largest == vocab * 4 * max(chunk, width)  # the fp32 logits of a chunk, or the gradient of weight
    assert largest < tokens * vocab * hidden.element_size() / 2
    _, _, stock = profile(lambda: plain(hidden, weight, targets)[1].backward())
    assert stock >= tokens * vocab * hidden.element_size()  # the measurement sees what it looks for


def test_only_needed_products_are_computed():
    hidden, weight, targets = make(dtype=torch.float32)
    frozen_hidden, frozen_weight = hidden.detach(), weight.detach()
    both = gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    loss, products, _ = profile(lambda: linear_cross_entropy(hidden, frozen_weight, targets))
    assert products == 2 and torch.equal(gradients(loss, hidden)[0], both[0])
    loss, products, _ = profile(lambda: linear_cross_entropy(frozen_hidden, weight, targets))
    assert products == 2 and torch.equal(gradients(loss, weight)[0], both[1])
    loss, products, _ = profile(lambda: linear_cross_entropy(frozen_hidden, frozen_weight, targets))
    assert products == 1 and not loss.requires_grad
    with torch.no_grad():
        loss, products, _ = profile(lambda: linear_cross_entropy(hidden, weight, targets))
    assert products == 1 and not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets)[0])


def test_backward_twice_and_run_twice_are_bitwise_equal():
    hidden, weight, targets = make(dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets)
    first = gradients(loss, hidden, weight, retain_graph=True)
    second = gradients(loss, hidden, weight)
    again = gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_views_and_strides():
    hidden, weight, targets = make((6, 22), 32, 512)
    hidden, weight, targets = hidden[::2, 1::2, ::2], weight.t()[::2].t(), targets[::2, 1::2]
    assert not hidden.is_contiguous() and not weight.is_contiguous() and not targets.is_contiguous()
    value, objective = plain(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight, targets, chunk=10)
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(gradients(loss, hidden, weight), gradients(objective, hidden, weight))


def test_opcheck():
    hidden, weight, targets = make((9,), 8, 20, torch.float32, ignored=2)
    for h, w in ((hidden, weight), (hidden.detach(), weight)):
        args = (h, w, targets, IGNORED, 1e-4, 4, h.requires_grad, True)
        torch.library.opcheck(torch.ops.rwkv_ext.linear_cross_entropy.default, args)


def test_compile_makes_one_graph():
    hidden, weight, targets = make(dtype=torch.float32)

    def step(hidden, weight, targets):
        return 2 * linear_cross_entropy(hidden.sin(), weight, targets)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (3, 2):
        args = hidden[:count], weight, targets[:count]
        assert torch.equal(compiled(*args), step(*args))
        for a, b in zip(gradients(compiled(*args), *args[:2]), gradients(step(*args), *args[:2]), strict=True):
            assert torch.equal(a, b)


def test_second_derivatives_are_refused():
    hidden, weight, targets = make()
    loss = linear_cross_entropy(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="second derivatives do not exist; where create_graph=True is needed, use F"):
        gradients(loss, hidden, create_graph=True)


@pytest.mark.parametrize("bad", [77, -1, 2**40])
def test_target_out_of_range_names_value_and_position(bad):
    hidden, weight, targets = make()
    targets[1, 4] = bad
    message = rf"targets must be in \[0, 77\) or ignore_index, got {bad} at position 15 .*check the tokenizer"
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets)


ERRORS = [
    ("hidden", lambda x: x.long(), TypeError, "hidden must be float64, .*, got torch.int64"),
    ("targets", lambda x: x.double(), TypeError, "targets must be int64 or int32 token ids, got torch.float64"),
    ("weight", lambda x: x.float(), TypeError, "weight must be torch.float64 as hidden is.*got torch.float32"),
    ("hidden", lambda x: x.float(), TypeError, "weight must be torch.float32 as hidden is.*got torch.float64"),
    ("weight", lambda x: x[:, 1:], ValueError, r"weight must be \[V, D\].*weight \[77, 15\] and hidden \[3, 11, 16\]"),
    ("weight", lambda x: x[:0], ValueError, r"weight must be \[V, D\] with V >= 1.*got weight \[0, 16\]"),
    ("targets", lambda x: x[:2], ValueError, r"targets must have hidden's leading axes \[3, 11\], got \[2, 11\]"),
    ("targets", lambda x: x.to("meta"), ValueError, "must be on one device, got cpu, cpu and meta"),
    ("l2wrap", -1.0, ValueError, "l2wrap must be >= 0, got -1.0; 0 turns it off"),
    ("reduction", "none", ValueError, 'reduction must be "mean" or "sum", got \'none\''),
    ("normalizer", torch.ones(2), ValueError, r"normalizer must be a number or scalar tensor, got \[2\]"),
    ("normalizer", 0, ValueError, "normalizer must be > 0, got 0; it is the token count"),
    ("chunk", 0, ValueError, "chunk must be at least 1 token, got 0; leave it out"),
]


@pytest.mark.parametrize("argument, change, error, message", ERRORS, ids=[f"{e[0]}-{i}" for i, e in enumerate(ERRORS)])
def test_errors(argument, change, error, message):
    arguments = dict(zip(("hidden", "weight", "targets"), make(), strict=True))
    arguments[argument] = change(arguments[argument]) if callable(change) else change
    with pytest.raises(error, match="linear_cross_entropy: .*" + message):
        linear_cross_entropy(**arguments)


def test_sum_with_a_normalizer_is_an_error():
    with pytest.raises(ValueError, match='normalizer must be None with reduction="sum", got 3; use "mean"'):
        linear_cross_entropy(*make(), reduction="sum", normalizer=3)


def test_fake_tensors_have_the_shapes_of_real_ones():
    hidden, weight, targets = make(dtype=torch.bfloat16)
    args = [x.detach().to("meta") for x in (hidden.flatten(0, 1), weight, targets.flatten())]
    loss, grad_hidden, grad_weight = torch.ops.rwkv_ext.linear_cross_entropy(*args, IGNORED, 1e-4, 4, True, True)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert (grad_hidden.shape, grad_hidden.dtype) == (args[0].shape, torch.bfloat16)
    assert (grad_weight.shape, grad_weight.dtype) == (weight.shape, torch.float32)


def test_a_second_backward_pass_gives_the_same_gradients():
    """The first one scales in place what the forward pass computed."""
    hidden, weight, targets = make()
    loss = linear_cross_entropy(hidden, weight, targets, l2wrap=0.1)
    first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    loss.backward()
    for a, b, c, leaf in zip(first, kept, second, (hidden, weight), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and a.data_ptr() != c.data_ptr()
        torch.testing.assert_close(3 * leaf.grad, a)
