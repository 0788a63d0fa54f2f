"""The models against their equations in fp64 (plain_model.py): logits, states, every gradient, and known limits."""

import plain_model
import pytest
import torch
import torch.nn.functional as F
from model_cases import SMALL, one_thread, random_model, random_tokens  # noqa: F401

from rwkv_ext.models import RWKVState
from rwkv_ext.models.time_mix import HeadNorm
from rwkv_ext.models.token_shift import TokenShift

KINDS = pytest.mark.parametrize("kind", SMALL)
T = 19
LEAVES = {"eagle": 50, "finch": 62}  # parameters of two layers, so that none can drop out of the comparison


def fp64_parameters(model):
    return {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}


def random_state(config, batch, dtype, seed=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = [x.shape for x in RWKVState.zeros(config, batch)]
    return RWKVState(*(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) * 0.5 for s in shapes))


def plain_state(state, row):
    return [[x[layer, row] for x in state] for layer in range(state.wkv.shape[0])]


def assert_ratio(name, actual, expected, bound):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= bound, f"{name}: relative RMS error {error:.2e} > {bound:.0e}"


@KINDS
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
def test_logits_states_and_all_gradients(kind, dtype, bound):
    """A scalar of logits and final state, started from a given state: gradients of all parameters and that state."""
    config, batch = SMALL[kind], 2
    model = random_model(config, dtype=dtype)
    tokens = random_tokens(config, batch, T)
    state = RWKVState(*(x.requires_grad_() for x in random_state(config, batch, dtype)))
    logits, end = model(tokens, state)
    generator = torch.Generator().manual_seed(9)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (logits, *end)]
    outputs = [logits, *end]
    sum((c.to(x.dtype) * x).sum() for c, x in zip(cotangents, outputs, strict=True)).backward()

    p = fp64_parameters(model)
    start = RWKVState(*(x.detach().double().requires_grad_() for x in state))
    rows = [plain_model.forward(p, tokens[row].tolist(), plain_state(start, row)) for row in range(batch)]
    expected = [torch.stack([row[0] for row in rows])]
    for field in range(3):
        per_row = [torch.stack([layer[field] for layer in row[1]]) for row in rows]
        expected.append(torch.stack(per_row, dim=1))
    sum((c * x).sum() for c, x in zip(cotangents, expected, strict=True)).backward()

    for name, x, y in zip(("logits", *RWKVState._fields), outputs, expected, strict=True):
        assert_ratio(name, x, y, bound)
    assert len(p) == LEAVES[kind]
    for name, parameter in model.named_parameters():
        assert_ratio(f"gradient of {name}", parameter.grad, p[name].grad, bound)
    for name, x, y in zip(RWKVState._fields, state, start, strict=True):
        assert_ratio(f"gradient of the initial {name}", x.grad, y.grad, bound)


@KINDS
def test_bf16_error_is_that_of_bf16(kind):
    """A bf16 model within 2% (relative RMS) of fp64 on the same weights, T = 19: about 4 units of bf16 rounding."""
    config = SMALL[kind]
    model = random_model(config).to(torch.bfloat16)
    tokens = random_tokens(config, 1, T)
    with torch.no_grad():
        logits, state = model(tokens)
        expected, _ = plain_model.forward(fp64_parameters(model), tokens[0].tolist())
    assert logits.dtype == torch.bfloat16 and state.wkv.dtype == torch.float32
    assert_ratio("bf16 logits", logits[0], expected, 2e-2)


@KINDS
def test_bf16_gradients(kind):
    """bf16 gradients of every parameter within 6% (relative RMS) of fp64 ones on the same weights; most are near 2%."""
    config = SMALL[kind]
    model = random_model(config, seed=1).to(torch.bfloat16)
    tokens = random_tokens(config, 1, T, seed=1)
    targets = random_tokens(config, 1, T, seed=9)
    F.cross_entropy(model(tokens)[0][0].float(), targets[0]).backward()
    p = fp64_parameters(model)
    F.cross_entropy(plain_model.forward(p, tokens[0].tolist())[0], targets[0]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16
        assert_ratio(f"gradient of {name}", parameter.grad, p[name].grad, 6e-2)


def test_eagle_is_finch_with_inverted_mixing_and_zero_low_rank_factors():
    eagle, finch = random_model(SMALL["eagle"]), random_model(SMALL["finch"], seed=1)
    source = dict(eagle.named_parameters())
    with torch.no_grad():
        for name, p in finch.named_parameters():
            if name.endswith(("time_maa_w2", "time_decay_w2")):
                p.zero_()
            elif "time_maa_" in name and name[-1] in "kvrg":
                p.copy_(1 - source[name.replace("time_maa_", "time_mix_")])
            elif name.endswith("time_decay"):
                p.copy_(source[name].reshape(p.shape))
            elif name in source:
                p.copy_(source[name])
        tokens = random_tokens(eagle.config, 2, T)
        (a, state_a), (b, state_b) = eagle(tokens), finch(tokens)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state_a.wkv, state_b.wkv, rtol=1e-5, atol=1e-5)


@KINDS
def test_zero_output_matrices_leave_the_normalised_embedding(kind):
    model = random_model(SMALL[kind])
    with torch.no_grad():
        for block in model.blocks:
            block.att.output.weight.zero_()
            block.ffn.value.weight.zero_()
        tokens = random_tokens(model.config, 1, 5)
        width = (model.config.n_embd,)
        first, out = model.blocks[0].ln0, model.ln_out
        x = F.layer_norm(model.emb.weight[tokens], width, first.weight, first.bias, 1e-5)
        x = F.layer_norm(x, width, out.weight, out.bias, 1e-5)
        torch.testing.assert_close(model(tokens)[0], x @ model.head.weight.T)


@KINDS
def test_full_decay_forgets_all_but_the_last_tokens(kind):
    """With w = 0 the state is the last k v^T, so a layer sees 3 tokens back: 2 by time mix, 1 by channel mix."""
    model = random_model(SMALL[kind], dtype=torch.float64)
    reach = 3 * model.config.n_layer
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_decay.fill_(30)
        tokens = random_tokens(model.config, 1, 12)
        last = model(tokens)[0][0, -1]
        for back, seen in ((reach + 1, False), (reach, True)):
            changed = tokens.clone()
            changed[0, -1 - back] = (changed[0, -1 - back] + 1) % model.config.vocab_size
            assert torch.equal(model(changed)[0][0, -1], last) is not seen


def test_no_decay_and_unit_bonus_count_every_token_alike():
    """w = 1 and u = 1 make y_t = r_t sum_{s <= t} k_s v_s^T: linear attention without decay."""
    att = random_model(SMALL["finch"], dtype=torch.float64).blocks[1].att
    h = torch.randn(1, T, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        att.time_decay.fill_(-1e9)
        att.time_faaaa.fill_(1)
        r, k, v, g, _ = (x[0] for x in att.mix(TokenShift(h, None)))
        y = torch.einsum("thi,thij->thj", r, torch.einsum("thi,thj->thij", k, v).cumsum(0))
        expected = att.output(att.ln_x(y, g))
        torch.testing.assert_close(att(h, None, None, None)[0][0], expected)


def test_head_norm_ignores_scale_except_through_eps():
    norm = HeadNorm(32)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    y, gate = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    y = y.view(7, 2, 16)
    torch.testing.assert_close(norm(y * 1e3, gate), norm(y * 1e5, gate), rtol=1e-4, atol=1e-5)
    mean, variance = y.mean(-1, keepdim=True), y.var(-1, unbiased=False, keepdim=True)
    for scale in (1.0, 1e-2):
        expected = (scale * (y - mean) / (scale**2 * variance + 64e-5).sqrt()).flatten(1) * norm.weight + norm.bias
        torch.testing.assert_close(norm(scale * y, gate), expected * F.silu(gate))
