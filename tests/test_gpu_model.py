"""Whole models on a GPU: logits, gradients, decoding and a short training run against the same on the CPU."""

import numpy as np
import pytest
import torch
from gpu_tools import DEVICE, needs_kernels
from model_cases import random_model, random_tokens
from tiny_run import TinyRun

from rwkv_ext import _load
from rwkv_ext.models import RWKVConfig, RWKVState
from rwkv_ext.testing import error_ratio
from train.data import make_batch

pytestmark = needs_kernels
SIZES = dict(vocab_size=97, n_layer=3, n_embd=128)
CONFIGS = {
    "eagle": RWKVConfig(version="5.2", **SIZES),
    "finch": RWKVConfig(version="6.0", **SIZES),
    "finch-32": RWKVConfig(version="6.0", head_size=32, mix_rank=8, decay_rank=16, **SIZES),
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 matrix products without tf32, so that what differs is our own doing."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def loss_and_gradients(model, tokens, dtype=None):
    device = model.emb.weight.device
    tokens = tokens.to(device)
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss, state = model(tokens[:, :-1], targets=tokens[:, 1:])
    gradients = torch.autograd.grad(loss + 1e-3 * state.wkv.square().mean(), list(model.parameters()))
    return loss.item(), torch.cat([x.cpu().double().flatten() for x in gradients])


@KINDS
def test_gpu_model_equals_the_cpu(kind):
    """Logits and state in fp32, with a carried state and packed."""
    model, tokens = random_model(CONFIGS[kind]), random_tokens(CONFIGS[kind], 2, 70)
    on_device = random_model(CONFIGS[kind]).to(DEVICE)
    with torch.no_grad():
        for cu_seqlens in (None, torch.tensor([0, 20, 20, 70])):
            given = tokens if cu_seqlens is None else tokens[:1]
            logits, state = model(given, None, cu_seqlens)
            moved = None if cu_seqlens is None else cu_seqlens.to(DEVICE)
            actual, actual_state = on_device(given.to(DEVICE), None, moved)
            assert error_ratio(actual, logits) < 2e-5
            assert all(error_ratio(a, b) < 2e-5 for a, b in zip(actual_state, state, strict=True))
            again, _ = on_device(given.to(DEVICE), actual_state, moved)
            assert error_ratio(again, model(given, state, cu_seqlens)[0]) < 2e-5


@KINDS
def test_gpu_model_gradients(kind):
    """In fp32 those of the CPU; under autocast to bf16 within bf16's error."""
    tokens = random_tokens(CONFIGS[kind], 2, 131)
    loss, expected = loss_and_gradients(random_model(CONFIGS[kind]), tokens)
    model = random_model(CONFIGS[kind]).to(DEVICE)
    actual_loss, actual = loss_and_gradients(model, tokens)
    assert actual_loss == pytest.approx(loss, rel=1e-5) and error_ratio(actual, expected) < 1e-4
    half_loss, half = loss_and_gradients(model, tokens, torch.bfloat16)
    assert half_loss == pytest.approx(loss, rel=0.02) and error_ratio(half, expected) < 0.1


@KINDS
def test_gpu_model_decoding(kind):
    """Token by token equals the whole, and greedy continuations equal the CPU's."""
    config = CONFIGS[kind]
    model, tokens = random_model(config).to(DEVICE), random_tokens(config, 3, 20).to(DEVICE)
    with torch.no_grad():
        logits, end = model(tokens)
        state = RWKVState(*(torch.zeros_like(x) for x in end))
        for t in range(20):
            assert error_ratio(model.step(tokens[:, t], state), logits[:, t]) < 2e-5
        assert all(error_ratio(a, b) < 2e-5 for a, b in zip(state, end, strict=True))


@KINDS
def test_gpu_model_compiles(kind):
    model, tokens = random_model(CONFIGS[kind]).to(DEVICE), random_tokens(CONFIGS[kind], 2, 40).to(DEVICE)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        assert error_ratio(compiled(tokens)[0], model(tokens)[0]) < 2e-5
    torch._dynamo.reset()


def test_gpu_model_generate():
    if _load.native_error:
        pytest.skip(_load.native_error)
    from rwkv_ext.generate import generate
    from rwkv_ext.tokenizer import WorldTokenizer

    config = RWKVConfig(version="6.0", vocab_size=65536, n_layer=2, n_embd=64, mix_rank=8, decay_rank=8)
    model, tokenizer = random_model(config), WorldTokenizer()
    on_cpu, on_device = (
        "".join(generate(placed, tokenizer, "The quick brown fox", max_tokens=12, temperature=0.0))
        for placed in (model, random_model(config).to(DEVICE))
    )
    assert on_cpu == on_device and on_cpu


def test_gpu_batches_come_from_pinned_memory():
    windows = np.random.default_rng(0).integers(0, 9, (4, 33))
    batch = make_batch(windows, "packed", DEVICE)
    host = (batch.tokens, batch.targets, batch.cu_seqlens)
    moved = batch.to(DEVICE)
    for tensor, copy in zip(host, (moved.tokens, moved.targets, moved.cu_seqlens), strict=True):
        assert tensor.is_pinned() and copy.device.type == DEVICE.type and torch.equal(copy.cpu(), tensor)


@pytest.mark.parametrize("version", ["5.2", "6.0"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gpu_model_trains(tmp_path, version, dtype):
    """A short run on the GPU loses what the same run on the CPU loses, step by step."""
    if _load.native_error:
        pytest.skip(_load.native_error)
    losses = {}
    for device in ("cpu", DEVICE.type):
        run = TinyRun(
            tmp_path / device,
            model={"version": version, "head_size": 32},
            train={"device": device, "dtype": "fp32" if device == "cpu" else dtype},
            optim={"lr": 1e-2},
        )
        assert run.run() == 0
        losses[device] = run.losses()
    close = dict(rel=1e-3) if dtype == "fp32" else dict(rel=0.05)
    assert losses[DEVICE.type] == pytest.approx(losses["cpu"], **close)
    assert losses[DEVICE.type][-1] < losses[DEVICE.type][0] - 0.3
