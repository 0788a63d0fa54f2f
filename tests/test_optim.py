"""Parameter groups of AdamW: the table of the official trainer, for both versions."""

import pytest
import torch

from rwkv_ext.models import RWKV, RWKVConfig
from train.config import OptimTable
from train.optim import (
    clipped_step,
    gradient_norm,
    group_of,
    make_optimizer,
    materialise_state,
    set_learning_rate,
)

TABLE = OptimTable(lr=1e-3, lr_final=1e-4, weight_decay=0.1)
EXPECTED = {
    "emb.weight": "matrix", "head.weight": "matrix", "ln_out.weight": "norm", "ln_out.bias": "norm",
    "blocks.0.ln0.weight": "norm", "blocks.1.ln1.weight": "norm", "blocks.1.ln2.bias": "norm",
    "blocks.1.att.ln_x.weight": "norm", "blocks.1.att.ln_x.bias": "norm", "blocks.1.att.time_decay": "decay",
    "blocks.1.att.time_faaaa": "bonus", "blocks.1.att.receptance.weight": "matrix", "blocks.1.att.key.weight": "matrix",
    "blocks.1.att.value.weight": "matrix", "blocks.1.att.gate.weight": "matrix", "blocks.1.att.output.weight": "matrix",
    "blocks.1.ffn.key.weight": "matrix", "blocks.1.ffn.receptance.weight": "matrix",
    "blocks.1.ffn.value.weight": "matrix",
}  # fmt: skip
FINCH = {"blocks.1.att.time_maa_w1": "lora", "blocks.1.att.time_maa_w2": "lora", "blocks.1.att.time_decay_w1": "lora",
         "blocks.1.att.time_decay_w2": "lora", "blocks.1.att.time_maa_x": "mix", "blocks.1.att.time_maa_w": "mix",
         "blocks.1.ffn.time_maa_k": "mix"}  # fmt: skip
EAGLE = {"blocks.1.att.time_mix_k": "mix", "blocks.1.att.time_mix_g": "mix", "blocks.1.ffn.time_mix_r": "mix"}


def tiny(version: str) -> RWKV:
    return RWKV(RWKVConfig(version=version, vocab_size=96, n_layer=2, n_embd=64, head_size=32))


@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_optim_groups(version):
    model = tiny(version)
    optimizer = make_optimizer(model, TABLE)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["name"] for group in optimizer.param_groups for p in group["params"]}
    assert set(found) == set(names.values()), "every parameter is in exactly one group"
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    expected = EXPECTED | (FINCH if version == "6.0" else EAGLE)
    assert {name: found[name] for name in expected} == expected
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.1 if group["name"] in ("matrix", "state") else 0.0)
        assert group["lr_scale"] == (2.0 if group["name"] == "decay" else 1.0)
        assert group["betas"] == (0.9, 0.99) and group["eps"] == 1e-18 and group["fused"]


def test_optim_time_state_decays():
    assert group_of("blocks.0.att.time_state", torch.Size([2, 8, 8])) == "state"
    assert group_of("blocks.0.att.key.weight", torch.Size([64, 1, 1])) == "norm", "axes of size one do not count"


def test_optim_learning_rate_and_frozen_parameters():
    model = tiny("6.0")
    model.emb.weight.requires_grad_(False)
    optimizer = make_optimizer(model, TABLE)
    assert all(p is not model.emb.weight for group in optimizer.param_groups for p in group["params"])
    set_learning_rate(optimizer, 0.25)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups if group["name"] in ("decay", "lora")} == {
        "decay": 0.5, "lora": 0.25,
    }  # fmt: skip


def test_optim_update_is_decoupled_adamw():
    """One step with a gradient of ones moves every tensor by its own rate, and matrices by lr x decay x weight more."""
    model = tiny("6.0")
    optimizer = make_optimizer(model, TABLE)
    set_learning_rate(optimizer, 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        group = group_of(name, p.shape)
        expected = before[name] * (1 - 1e-2 * 0.1 * (group == "matrix")) - 1e-2 * (2 if group == "decay" else 1)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_optim_materialised_state_is_adamws_own():
    """A step from materialised (zero) state equals a step from none, bit for bit."""
    results = []
    for materialise in (False, True):
        torch.manual_seed(0)
        model = tiny("5.2")
        model.init_weights(generator=torch.Generator().manual_seed(1))
        optimizer = make_optimizer(model, TABLE)
        if materialise:
            materialise_state(optimizer)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
        kinds = {key: value.dtype for key, value in optimizer.state[model.emb.weight].items()}
        assert kinds == {"step": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6], ids=["none", "longer", "shorter"])
def test_optim_clipped_step(limit):
    """Weights and moments are those of torch's clipping and a step; the scale is gone afterwards."""
    models = [tiny("6.0") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make_optimizer(model, TABLE) for model in models]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        norm = gradient_norm(models[0])
        clipped_step(optimizers[0], norm.item(), limit)
        expected = torch.nn.utils.clip_grad_norm_(models[1].parameters(), limit or float("inf"))
        optimizers[1].step()
        torch.testing.assert_close(norm, expected)
        assert 0.5 < norm < 1e6 and getattr(optimizers[0], "grad_scale", None) is None
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-7)
        for kind in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizers[0].state[a][kind], optimizers[1].state[b][kind], rtol=1e-5, atol=1e-9
            )
