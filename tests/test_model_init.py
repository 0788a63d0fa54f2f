"""Initial weights against the published formulas, element by element, in both recipes, and the training they allow."""

import dataclasses
import math

import pytest
import torch
from model_cases import SMALL, one_thread  # noqa: F401

from rwkv_ext.models import RWKV

SIZES = dict(vocab_size=80, n_embd=64, dim_att=96, head_size=16)
LR = 4e-4


def build(kind, recipe, n_layer, seed=0, **kwargs):
    """A model whose every element was NaN before init_weights."""
    model = RWKV(dataclasses.replace(SMALL[kind], n_layer=n_layer, dim_ffn=None, **SIZES))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    lr_init = LR if recipe == "paper" else None
    model.init_weights(recipe, torch.Generator().manual_seed(seed), lr_init=lr_init, **kwargs)
    return model


def expected_vectors(kind, recipe, layer, layers, width, att):
    """Scalar by scalar; b ** 3 in Finch's channel mix is the current recipe's."""
    a = layer / (layers - 1) if layers > 1 else 0
    b = 1 - layer / layers
    ffn = b**3 if (kind, recipe) == ("finch", "current") else b
    e = [i / width for i in range(width)]
    eagle = {
        "att.k": [x**b for x in e],
        "att.v": [x**b + 0.3 * a for x in e],
        "att.r": [x ** (b / 2) for x in e],
        "att.g": [x ** (b / 2) for x in e],
        "ffn.k": [x**ffn for x in e],
        "ffn.r": [x**ffn for x in e],
    }
    if kind == "finch":
        eagle |= {"att.x": eagle["att.k"], "att.w": eagle["att.k"]}
    vectors = {}
    for name, values in eagle.items():
        part, which = name.split(".")
        if kind == "eagle":
            vectors[f"{part}.time_mix_{which}"] = values
        else:
            vectors[f"{part}.time_maa_{which}"] = [1 - x for x in values]
    n = range(att)
    vectors["att.time_decay"] = [-6 + 5 * (i / (att - 1)) ** (0.7 + 1.3 * a) for i in n]
    vectors["att.time_faaaa"] = [a * (1 - i / (att - 1)) + 0.1 * ((i + 1) % 3 - 1) for i in n]
    vectors["att.ln_x.weight"] = [((1 + layer) / layers) ** 0.7] * att
    return vectors


# Gains of the semi-orthogonal matrices: rows > columns only in ffn.key (224 x 64), att.* (96 x 64) and head (80 x 64).
GAINS = {
    "current": {"att.receptance": 1, "att.value": 1, "att.key": 0.1, "att.gate": 0.1, "ffn.key": 1},
    "paper": {f"att.{name}": (96 / 64) ** 0.5 for name in ("receptance", "value", "key", "gate")}
    | {"ffn.key": 3.5**0.5},
}
ZERO = ("att.output.weight", "ffn.value.weight", "ffn.receptance.weight")


@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("recipe", ["current", "paper"])
@pytest.mark.parametrize("kind", SMALL)
def test_every_parameter_has_its_value(kind, recipe, n_layer):
    model = build(kind, recipe, n_layer)
    parameters = dict(model.named_parameters())
    seen = set()

    def take(name):
        seen.add(name)
        return parameters[name].detach()

    for layer in range(n_layer):
        name = f"blocks.{layer}."
        for short, values in expected_vectors(kind, recipe, layer, n_layer, 64, 96).items():
            torch.testing.assert_close(take(name + short).flatten(), torch.tensor(values), rtol=1e-6, atol=1e-7)
        for short, gain in GAINS[recipe].items():
            assert_orthogonal(take(f"{name}{short}.weight"), gain)
        for short in ZERO:
            assert not take(name + short).any()
        assert not take(name + "att.ln_x.bias").any()
        for norm in ("ln1", "ln2") + (("ln0",) if layer == 0 else ()):
            assert (take(f"{name}{norm}.weight") == 1).all() and not take(f"{name}{norm}.bias").any()
        if kind == "finch":
            for short in ("att.time_maa_w1", "att.time_decay_w1"):
                if recipe == "current":
                    assert not take(name + short).any()
                else:
                    assert_uniform(take(name + short), 1e-4)
            for short in ("att.time_maa_w2", "att.time_decay_w2"):
                assert_uniform(take(name + short), 0.01 if recipe == "current" else 1e-4)
    assert_uniform(take("emb.weight"), 1e-4 if recipe == "current" else LR)
    assert_orthogonal(take("head.weight"), 0.5 * (80 / 64) ** 0.5)
    assert (take("ln_out.weight") == 1).all() and not take("ln_out.bias").any()
    assert seen == set(parameters)


def assert_orthogonal(weight, gain):
    short = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    torch.testing.assert_close(short @ short.T, gain**2 * torch.eye(len(short), dtype=torch.float64), rtol=0, atol=1e-5)
    positive = (weight.diagonal() > 0).double().mean()
    assert 0.25 < positive < 0.75, "Q of a QR without the sign fix has a diagonal of one sign"


def assert_uniform(weight, bound):
    scaled = weight.flatten() / bound
    assert scaled.abs().max() <= 1 and scaled.abs().max() > 0.98
    assert abs(scaled.mean()) < 0.1 and abs(scaled.var() - 1 / 3) < 0.05


def test_small_vocabulary_has_gain_one_half():
    model = RWKV(dataclasses.replace(SMALL["finch"], vocab_size=41, n_embd=64))
    assert_orthogonal(model.head.weight.detach(), 0.5)


def test_generator_decides_every_number():
    first, again, other = (dict(build("finch", "current", 2, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert not any(torch.equal(first[name], other[name]) for name in ("emb.weight", "head.weight"))
    torch.manual_seed(3)
    a = RWKV(SMALL["eagle"])
    torch.manual_seed(3)
    assert torch.equal(a.head.weight, RWKV(SMALL["eagle"]).head.weight)


def test_low_precision_parameters_are_the_rounded_fp32_values():
    model = RWKV(SMALL["finch"]).to(torch.bfloat16)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    full = RWKV(SMALL["finch"])
    full.init_weights(generator=torch.Generator().manual_seed(0))
    for p, q in zip(model.parameters(), full.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q.to(torch.bfloat16))


@pytest.mark.parametrize("kind", SMALL)
def test_time_state_starts_at_zero(kind):
    model = RWKV(SMALL[kind])
    model.enable_time_state()
    with torch.no_grad():
        model.blocks[0].att.time_state.fill_(1)
    model.init_weights()
    assert not any(block.att.time_state.any() for block in model.blocks)


@pytest.mark.parametrize("recipe", ["current", "paper"])
@pytest.mark.parametrize("kind", SMALL)
def test_a_fresh_model_learns(kind, recipe):
    """Every parameter receives a gradient within three steps (zero matrices hide some at first), and the loss falls."""
    torch.manual_seed(0)
    model = RWKV(SMALL[kind])
    model.init_weights(recipe, torch.Generator().manual_seed(0), LR)
    tokens = torch.randint(41, (4, 1), generator=torch.Generator().manual_seed(0)) + torch.arange(12)
    tokens = tokens % 41
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, moved = [], set()
    for _ in range(6):
        loss, _ = model(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        moved |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        losses.append(loss.item())
    assert moved == {name for name, _ in model.named_parameters()}
    assert losses[-1] < losses[0] - 0.3, losses


def test_messages_name_the_argument():
    model = RWKV(SMALL["eagle"])
    with pytest.raises(ValueError, match=r'init_weights: recipe must be "current" or "paper", got \'old\''):
        model.init_weights("old")
    with pytest.raises(ValueError, match=r'lr_init must be given with recipe "paper", .*, got None; pass the largest'):
        model.init_weights("paper")
