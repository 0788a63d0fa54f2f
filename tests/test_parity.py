"""fp32 logits and states equal those of the PyPI package `rwkv`, the reference implementation of the .pth files."""

import os
from unittest import mock

import pytest
import torch
from model_cases import CASES, one_thread, random_model, random_tokens  # noqa: F401

from rwkv_ext.models import RWKV

TOLERANCE = 2e-5  # times the largest |logit|, at least 1


@pytest.fixture(scope="module")
def package():
    os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0", RWKV_V7_ON="0")
    from rwkv.model import RWKV as PackageRWKV

    return PackageRWKV


@pytest.fixture(scope="module", params=[*CASES, "eagle-tuned", "finch-32-64-tuned"])
def models(request, package, tmp_path_factory):
    """(ours read back from a .pth, the package reading the same file); all weights fp32, so it folds ln0 in fp32."""
    model = random_model(CASES[request.param.removesuffix("-tuned")])
    if request.param.endswith("-tuned"):
        model.enable_time_state()
        with torch.no_grad():
            for layer, block in enumerate(model.blocks):
                generator = torch.Generator().manual_seed(layer)
                block.att.time_state.copy_(torch.randn(block.att.time_state.shape, generator=generator))
    path = tmp_path_factory.mktemp("parity") / "model.pth"
    model.save_pretrained(path, torch.float32)
    # The package collects garbage after every tensor, which takes seconds once a test session has a large heap.
    with mock.patch("gc.collect"):
        return RWKV.from_pretrained(path), package(str(path), "cpu fp32", verbose=False)


@pytest.fixture(scope="module")
def tokens(models):
    return random_tokens(models[0].config, 33).tolist()


def assert_logits(ours, theirs):
    error, scale = (ours - theirs).abs().max().item(), max(1.0, theirs.abs().max().item())
    assert scale > 1, "logits too small to prove anything"
    assert error <= TOLERANCE * scale, f"max error {error:.2e} at logit scale {scale:.2f}"


def assert_states(state, theirs):
    for layer in range(state.wkv.shape[0]):
        for ours, reference in zip((x[layer, 0] for x in state), theirs[3 * layer : 3 * layer + 3], strict=True):
            assert ours.shape == reference.shape
            torch.testing.assert_close(ours, reference, rtol=2e-5, atol=1e-4)


@torch.no_grad()
def test_sequence_and_carried_state(models, tokens):
    ours, package = models
    logits, state = ours(torch.tensor([tokens]))
    expected, their_state = package.forward(list(tokens), None, full_output=True)
    assert_logits(logits[0], expected)
    assert_states(state, their_state)

    more = random_tokens(ours.config, 9, seed=1).tolist()
    logits, state = ours(torch.tensor([more]), state)
    expected, their_state = package.forward(more, their_state, full_output=True)
    assert_logits(logits[0], expected)
    assert_states(state, their_state)


@torch.no_grad()
def test_token_by_token(models, tokens):
    ours, package = models
    state, their_state = None, None
    stepped = ours.initial_state(1)
    for token in tokens[:12]:
        expected, their_state = package.forward([token], their_state)
        logits, state = ours(torch.tensor([[token]]), state)
        assert_logits(logits[0, 0], expected)
        assert_logits(ours.step(torch.tensor([token]), stepped)[0], expected)
    assert_states(state, their_state)
    assert_states(stepped, their_state)


@torch.no_grad()
def test_step_after_sequence(models, tokens):
    ours, package = models
    _, state = ours(torch.tensor([tokens]))
    _, their_state = package.forward(list(tokens), None)
    expected, _ = package.forward([5], their_state)
    assert_logits(ours.step(torch.tensor([5]), state)[0], expected)
