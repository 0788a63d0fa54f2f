"""Token shift against the definition, token by token: carried values, packed boundaries, empty and short input."""

import pytest
import torch

from rwkv_ext.models.token_shift import Packing, shift_tokens

D = 3
CUTS = {
    "one": [0, 7],
    "three": [0, 2, 3, 9],
    "empty-first": [0, 0, 0, 4],
    "empty-inside": [0, 3, 3, 3, 5],
    "empty-last": [0, 4, 4],
    "all-empty": [0, 0, 0],
    "single-tokens": [0, 1, 2, 3],
}


def expected_shift(h, last, cuts):
    previous, newest = [], []
    for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
        carry = last[i]
        for t in range(a, b):
            previous.append(carry)
            carry = h[t]
        newest.append(carry)
    return torch.stack(previous) if previous else h, torch.stack(newest)


def leaf(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("carried", [True, False], ids=["carried", "start"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_packed(cuts, carried, index_dtype):
    h, last = leaf(1, cuts[-1], D, seed=0), leaf(len(cuts) - 1, D, seed=1)
    packing = Packing.of(torch.tensor(cuts, dtype=index_dtype), cuts[-1])
    outputs = shift_tokens(h, last if carried else None, packing)
    previous, newest = expected_shift(h[0], last if carried else torch.zeros_like(last), cuts)
    check(outputs, (previous[None], newest), (h, last) if carried else (h,))


@pytest.mark.parametrize("carried", [True, False], ids=["carried", "start"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batch(batch, tokens, carried):
    h, last = leaf(batch, tokens, D, seed=0), leaf(batch, D, seed=1)
    outputs = shift_tokens(h, last if carried else None, None)
    start = last if carried else torch.zeros_like(last)
    rows = torch.cat([start[:, None], h], 1)
    check(outputs, (rows[:, :-1], rows[:, -1]), (h, last) if carried else (h,))
    newest = outputs[1]  # a view into all T tokens would keep them alive in every layer
    assert newest.untyped_storage().nbytes() == newest.numel() * newest.element_size()


def test_carried_value_is_cast_to_the_activations():
    previous, newest = shift_tokens(torch.zeros(1, 2, D, dtype=torch.bfloat16), torch.ones(1, D), None)
    assert previous.dtype == newest.dtype == torch.bfloat16
    assert torch.equal(previous[0, 0], torch.ones(D, dtype=torch.bfloat16))


def check(outputs, expected, leaves):
    for x, y in zip(outputs, expected, strict=True):
        assert torch.equal(x, y)
    cotangents = [leaf(*x.shape, seed=2 + i).detach() for i, x in enumerate(outputs)]

    def gradients(tensors):
        total = sum((c * x).sum() for c, x in zip(cotangents, tensors, strict=True))
        if not total.requires_grad:
            return [None] * len(leaves)
        return torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)

    for tensor, x, y in zip(leaves, gradients(outputs), gradients(expected), strict=True):
        zero = torch.zeros_like(tensor)
        torch.testing.assert_close(zero if x is None else x, zero if y is None else y)
