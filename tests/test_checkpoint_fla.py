"""A flash-linear-attention folder, computed in fp64 by that library's equations, gives our model's logits.

The equations are written out here from the names in the folder; nothing of rwkv_ext computes them.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from model_cases import SMALL, one_thread, random_model, random_tokens  # noqa: F401
from safetensors.torch import load_file

CONFIG = SMALL["finch"]


def shifted(h):
    return F.pad(h, (0, 0, 1, -1)) - h


def time_mix(p, h, settings, head_eps):
    """h [T, D]; p has what comes after attn."""
    heads, width = settings["num_heads"], settings["hidden_size"]
    delta = shifted(h)
    low = torch.tanh((h + delta * p["x_proj.0.mu"]) @ p["x_proj.0.linear.weight"].T).unflatten(-1, (5, -1))
    mixing = torch.einsum("tnr,dnr->ntd", low, p["x_proj.2.weight"].view(width, 5, -1)) + p["x_bias"].unsqueeze(1)
    r, w, k, v, g = (h + delta * mix for mix in mixing)  # their order
    w = torch.tanh(w @ p["w_proj.linear.lora.0.weight"].T) @ p["w_proj.linear.lora.2.weight"].T
    w = -torch.exp(w + p["w_proj.linear.lora.2.bias"])  # the logarithm of the decay
    r, k, v, g = (x @ p[f"{name}_proj.linear.weight"].T for name, x in zip("rkvg", (r, k, v, g), strict=True))
    r, w, k, v = (x.unflatten(-1, (heads, -1)) for x in (r, w, k, v))
    state, outputs = torch.zeros(heads, r.shape[-1], v.shape[-1], dtype=h.dtype), []
    for t in range(h.shape[0]):
        pair = k[t].unsqueeze(2) * v[t].unsqueeze(1)
        outputs.append(torch.einsum("hk,hkv->hv", r[t], state + p["bonus"].unsqueeze(2) * pair))
        state = torch.exp(w[t]).unsqueeze(2) * state + pair
    y = F.group_norm(torch.stack(outputs).flatten(1), heads, p["g_norm.weight"], p["g_norm.bias"], head_eps)
    return (y * F.silu(g)) @ p["o_proj.weight"].T


def channel_mix(p, h):
    delta = shifted(h)
    k = torch.relu((h + delta * p["key.mu"]) @ p["key.linear.weight"].T).square()
    return torch.sigmoid((h + delta * p["receptance.mu"]) @ p["receptance.linear.weight"].T) * (k @ p["value.weight"].T)


def logits_of(folder, tokens, head_eps):
    p = {name: x.double() for name, x in load_file(folder / "model.safetensors").items()}
    settings = json.loads((folder / "config.json").read_text())

    def under(prefix):
        return {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], settings["norm_eps"])

    x = norm("model.layers.0.pre_norm", p["model.embeddings.weight"][tokens])
    for layer in range(settings["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        x = x + time_mix(under(f"{name}.attn."), norm(f"{name}.attn_norm", x), settings, head_eps)
        x = x + channel_mix(under(f"{name}.ffn."), norm(f"{name}.ffn_norm", x))
    return norm("model.norm", x) @ p["lm_head.weight"].T


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = random_model(CONFIG)
    folder = tmp_path_factory.mktemp("fla") / "model"
    model.save_pretrained(folder, torch.float32, "fla")
    return model.double(), folder


@torch.no_grad()
def test_the_head_norms_of_released_models_need_their_own_eps(saved):
    model, folder = saved
    tokens = random_tokens(CONFIG, 19)
    ours = model(tokens.unsqueeze(0))[0][0]
    torch.testing.assert_close(logits_of(folder, tokens, head_eps=64e-5), ours, rtol=0, atol=1e-10)
    assert (logits_of(folder, tokens, head_eps=1e-5) - ours).abs().max() > 0.01, "then the note would be idle"


@torch.no_grad()
def test_a_model_trained_with_one_eps_for_all_norms_needs_values_8_times_as_large(saved):
    model, folder = saved
    tokens = random_tokens(CONFIG, 19)
    theirs = logits_of(folder, tokens, head_eps=1e-5)
    for block in model.blocks:
        block.att.value.weight.mul_(8)
    try:
        torch.testing.assert_close(theirs, model(tokens.unsqueeze(0))[0][0], rtol=0, atol=1e-10)
    finally:
        for block in model.blocks:
            block.att.value.weight.div_(8)
