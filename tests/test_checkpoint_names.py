"""Names, shapes and parameter counts of every released model, on meta tensors, against tables written out here."""

from typing import NamedTuple

import pytest
import torch
from model_cases import one_thread  # noqa: F401

from rwkv_ext.checkpoint import fla, huggingface, official
from rwkv_ext.models import RWKV, RWKVConfig

# Axes: V vocabulary, D width, A = H heads of N channels, F channel mix, R rank of the mixing (M = 5 R), P of the decay.
OUTSIDE = {
    "emb.weight": "V D",
    "blocks.0.ln0.weight": "D",
    "blocks.0.ln0.bias": "D",
    "ln_out.weight": "D",
    "ln_out.bias": "D",
    "head.weight": "V D",
}
BOTH = {
    "ln1.weight": "D",
    "ln1.bias": "D",
    "ln2.weight": "D",
    "ln2.bias": "D",
    "att.time_faaaa": "H N",
    "att.receptance.weight": "A D",
    "att.key.weight": "A D",
    "att.value.weight": "A D",
    "att.gate.weight": "A D",
    "att.output.weight": "D A",
    "att.ln_x.weight": "A",
    "att.ln_x.bias": "A",
    "ffn.key.weight": "F D",
    "ffn.receptance.weight": "D D",
    "ffn.value.weight": "D F",
}
EAGLE = BOTH | {
    "att.time_mix_k": "1 1 D",
    "att.time_mix_v": "1 1 D",
    "att.time_mix_r": "1 1 D",
    "att.time_mix_g": "1 1 D",
    "att.time_decay": "H N",
    "ffn.time_mix_k": "1 1 D",
    "ffn.time_mix_r": "1 1 D",
}
FINCH = BOTH | {
    "att.time_maa_x": "1 1 D",
    "att.time_maa_w": "1 1 D",
    "att.time_maa_k": "1 1 D",
    "att.time_maa_v": "1 1 D",
    "att.time_maa_r": "1 1 D",
    "att.time_maa_g": "1 1 D",
    "att.time_maa_w1": "D M",
    "att.time_maa_w2": "5 R D",
    "att.time_decay": "1 1 A",
    "att.time_decay_w1": "D P",
    "att.time_decay_w2": "P A",
    "ffn.time_maa_k": "1 1 D",
    "ffn.time_maa_r": "1 1 D",
}
HF_OUTSIDE = {
    "rwkv.embeddings.weight": "V D",
    "rwkv.blocks.0.pre_ln.weight": "D",
    "rwkv.blocks.0.pre_ln.bias": "D",
    "rwkv.ln_out.weight": "D",
    "rwkv.ln_out.bias": "D",
    "head.weight": "V D",
}
HF_BOTH = {
    "ln1.weight": "D",
    "ln1.bias": "D",
    "ln2.weight": "D",
    "ln2.bias": "D",
    "attention.time_faaaa": "H N",
    "attention.receptance.weight": "A D",
    "attention.key.weight": "A D",
    "attention.value.weight": "A D",
    "attention.gate.weight": "A D",
    "attention.output.weight": "D A",
    "attention.ln_x.weight": "A",
    "attention.ln_x.bias": "A",
    "feed_forward.key.weight": "F D",
    "feed_forward.receptance.weight": "D D",
    "feed_forward.value.weight": "D F",
}
HF_EAGLE = HF_BOTH | {
    "attention.time_mix_key": "1 1 D",
    "attention.time_mix_value": "1 1 D",
    "attention.time_mix_receptance": "1 1 D",
    "attention.time_mix_gate": "1 1 D",
    "attention.time_decay": "H N",
    "feed_forward.time_mix_key": "1 1 D",
    "feed_forward.time_mix_receptance": "1 1 D",
}
HF_FINCH = HF_BOTH | {
    "attention.time_maa_x": "1 1 D",
    "attention.time_maa_w": "1 1 D",
    "attention.time_maa_k": "1 1 D",
    "attention.time_maa_v": "1 1 D",
    "attention.time_maa_r": "1 1 D",
    "attention.time_maa_g": "1 1 D",
    "attention.time_maa_w1": "D M",
    "attention.time_maa_w2": "5 R D",
    "attention.time_decay": "1 1 A",
    "attention.time_decay_w1": "D P",
    "attention.time_decay_w2": "P A",
    "feed_forward.time_maa_k": "1 1 D",
    "feed_forward.time_maa_r": "1 1 D",
}
FLA_OUTSIDE = {
    "model.embeddings.weight": "V D",
    "model.layers.0.pre_norm.weight": "D",
    "model.layers.0.pre_norm.bias": "D",
    "model.norm.weight": "D",
    "model.norm.bias": "D",
    "lm_head.weight": "V D",
}
FLA_FINCH = {
    "attn_norm.weight": "D",
    "attn_norm.bias": "D",
    "ffn_norm.weight": "D",
    "ffn_norm.bias": "D",
    "attn.x_proj.0.mu": "D",
    "attn.x_proj.0.linear.weight": "M D",
    "attn.x_proj.2.weight": "D M",
    "attn.x_bias": "5 D",
    "attn.r_proj.linear.weight": "A D",
    "attn.k_proj.linear.weight": "A D",
    "attn.v_proj.linear.weight": "A D",
    "attn.g_proj.linear.weight": "A D",
    "attn.w_proj.linear.lora.0.weight": "P D",
    "attn.w_proj.linear.lora.2.weight": "A P",
    "attn.w_proj.linear.lora.2.bias": "A",
    "attn.bonus": "H N",
    "attn.g_norm.weight": "A",
    "attn.g_norm.bias": "A",
    "attn.o_proj.weight": "D A",
    "ffn.key.mu": "D",
    "ffn.receptance.mu": "D",
    "ffn.key.linear.weight": "F D",
    "ffn.receptance.linear.weight": "D D",
    "ffn.value.weight": "D F",
}


class Released(NamedTuple):
    version: str
    layers: int
    width: int
    heads: int
    channel_mix: int
    ranks: tuple[int, int] | None
    parameters: int


RELEASED = {
    "eagle-0.1b": Released("5.2", 12, 768, 12, 2688, None, 192_807_936),
    "eagle-0.4b": Released("5.2", 24, 1024, 16, 3584, None, 461_721_600),
    "eagle-1.5b": Released("5.2", 24, 2048, 32, 7168, None, 1_577_754_624),
    "eagle-3b": Released("5.2", 32, 2560, 40, 8960, None, 3_062_999_040),
    "eagle-7b": Released("5.2", 32, 4096, 64, 14336, None, 7_518_044_160),
    "finch-0.1b": Released("6.0", 12, 768, 12, 2688, (32, 64), 196_955_136),
    "finch-1.6b": Released("6.0", 24, 2048, 32, 7168, (32, 64), 1_599_873_024),
    "finch-3b": Released("6.0", 32, 2560, 40, 8960, (32, 64), 3_099_863_040),
    "finch-7b": Released("6.0", 32, 4096, 64, 14336, (64, 128), 7_635_746_816),
    "finch-14b": Released("6.0", 61, 4096, 64, 14336, (64, 128), 14_069_088_256),
}
FINCHES = [name for name in RELEASED if name.startswith("finch")]


def table(released, outside, block, blocks="blocks"):
    """Return name -> shape of a whole model, its block's lines repeated for every layer."""
    sizes = {"V": 65536, "D": released.width, "A": released.width, "H": released.heads, "N": 64}
    sizes |= {"F": released.channel_mix, "1": 1, "5": 5}
    if released.ranks:
        sizes |= {"R": released.ranks[0], "M": 5 * released.ranks[0], "P": released.ranks[1]}
    lines = outside | {f"{blocks}.{i}.{name}": axes for i in range(released.layers) for name, axes in block.items()}
    return {name: tuple(sizes[axis] for axis in axes.split()) for name, axes in lines.items()}


def shapes(tensors):
    return {name: tuple(x.shape) for name, x in tensors.items()}


@pytest.fixture(params=RELEASED)
def released(request):
    return RELEASED[request.param]


@pytest.fixture
def model(released):
    """The model that the tensors' shapes say, not the one that any formula says."""
    block = EAGLE if released.version == "5.2" else FINCH
    meta = {name: torch.empty(shape, device="meta") for name, shape in table(released, OUTSIDE, block).items()}
    config = official.infer_config("the table", meta)
    with torch.device("meta"):
        return RWKV(config)


def test_official_names_and_sizes(released, model):
    lines = table(released, OUTSIDE, EAGLE if released.version == "5.2" else FINCH)
    assert shapes(model.state_dict()) == lines
    assert official.shapes(model.config) == lines
    assert list(official.shapes(model.config)) == list(model.state_dict()), "the order of the .pth files"
    assert model.parameter_count() == released.parameters
    assert model.config == RWKVConfig(version=released.version, n_layer=released.layers, n_embd=released.width)
    ranks = (model.config.mix_rank, model.config.decay_rank)
    assert ranks == (released.ranks or (None, None))
    assert (model.config.n_head, model.config.dim_ffn) == (released.heads, released.channel_mix)


def test_hugging_face_names_and_sizes(released, model):
    lines = table(released, HF_OUTSIDE, HF_EAGLE if released.version == "5.2" else HF_FINCH, "rwkv.blocks")
    theirs = huggingface.from_official(model.state_dict())
    assert shapes(theirs) == lines
    assert shapes(huggingface.to_official(theirs)) == shapes(model.state_dict())
    assert huggingface.infer_config("the table", theirs) == model.config
    settings = huggingface.settings(model.config)
    version = released.version[0]
    assert settings["architectures"] == [f"Rwkv{version}ForCausalLM"] and settings["model_type"] == f"rwkv{version}"
    assert (settings["hidden_size"], settings["attention_hidden_size"]) == (released.width, released.width)
    assert (settings["num_hidden_layers"], settings["intermediate_size"]) == (released.layers, released.channel_mix)
    assert (settings["head_size"], settings["head_size_divisor"], settings["layer_norm_epsilon"]) == (64, 8, 1e-5)
    assert (settings["vocab_size"], settings["bos_token_id"], settings["eos_token_id"]) == (65536, 0, 0)


@pytest.mark.parametrize("released", [RELEASED[name] for name in FINCHES], ids=FINCHES)
def test_fla_names_and_sizes(released, model):
    lines = table(released, FLA_OUTSIDE, FLA_FINCH, "model.layers")
    theirs = fla.from_official(model.state_dict())
    assert shapes(theirs) == lines
    assert shapes(fla.to_official(theirs)) == shapes(model.state_dict())
    assert fla.infer_config("the table", theirs) == model.config
    assert sum(x.numel() for x in theirs.values()) == released.parameters
    settings = fla.settings(model.config)
    assert (settings["hidden_size"], settings["num_heads"]) == (released.width, released.heads)
    assert (settings["proj_low_rank_dim"], settings["gate_low_rank_dim"]) == released.ranks
    assert (settings["expand_k"], settings["expand_v"]) == (1, 1)
    assert (settings["num_hidden_layers"], settings["intermediate_size"]) == (released.layers, released.channel_mix)


@pytest.mark.parametrize("tuned", [False, True])
def test_the_table_of_shapes_is_the_models_own_where_no_two_sizes_agree(tuned):
    odd = dict(vocab_size=11, n_layer=2, n_embd=64, head_size=16, dim_att=96, dim_ffn=160)
    for config in (
        RWKVConfig(version="5.2", **odd),
        RWKVConfig(version="6.0", mix_rank=3, decay_rank=5, **odd),
    ):
        with torch.device("meta"):
            model = RWKV(config)
            if tuned:
                model.enable_time_state()
        assert official.shapes(config, tuned) == shapes(model.state_dict())
        assert list(official.shapes(config, tuned)) == list(model.state_dict())
        assert official.infer_config("the model", model.state_dict()) == config


def test_the_published_files_are_the_parameters_at_two_bytes_and_little_else():
    """Bytes of released files, against the tables: no other ranks and no other depth would come so close."""
    for name, size in {
        "eagle-1.5b": 3_155_590_184,
        "eagle-3b": 6_126_106_472,
        "eagle-7b": 15_036_197_526,
        "finch-3b": 6_199_859_158,
        "finch-7b": 15_271_627_478,
    }.items():
        assert 0 < size - 2 * RELEASED[name].parameters < 150_000


def test_fla_layout_by_value():
    """Every entry lands where flash-linear-attention's equations look for it."""
    config = RWKVConfig(n_layer=1, n_embd=32, head_size=16, mix_rank=2, decay_rank=3, vocab_size=5)
    tensors = {name: torch.randn(shape) for name, shape in official.shapes(config).items()}
    theirs = fla.from_official(tensors)
    layer, block = "model.layers.0.attn", "blocks.0.att"
    groups = theirs[f"{layer}.x_proj.0.linear.weight"].view(5, 2, 32)
    back = theirs[f"{layer}.x_proj.2.weight"].reshape(32, 5, 2)
    for their_slot, which in enumerate("rwkvg"):
        our_slot = "wkvrg".index(which)
        columns = tensors[f"{block}.time_maa_w1"][:, 2 * our_slot : 2 * our_slot + 2]
        assert torch.equal(groups[their_slot], columns.T)
        assert torch.equal(back[:, their_slot], tensors[f"{block}.time_maa_w2"][our_slot].T)
        assert torch.equal(theirs[f"{layer}.x_bias"][their_slot], tensors[f"{block}.time_maa_{which}"].flatten())
    assert torch.equal(theirs[f"{layer}.w_proj.linear.lora.0.weight"], tensors[f"{block}.time_decay_w1"].T)
    assert torch.equal(theirs[f"{layer}.w_proj.linear.lora.2.weight"], tensors[f"{block}.time_decay_w2"].T)
    assert torch.equal(theirs[f"{layer}.w_proj.linear.lora.2.bias"], tensors[f"{block}.time_decay"].flatten())
    assert torch.equal(theirs[f"{layer}.v_proj.linear.weight"], tensors[f"{block}.value.weight"])
