"""RWKVConfig: formulas and messages; parameter counts of the released models, built on the meta device."""

import dataclasses

import pytest
import torch
from model_cases import SMALL, one_thread, random_model  # noqa: F401

from rwkv_ext.models import RWKV, RWKVConfig

EAGLE, FINCH = "5.2", "6.0"
# (version, L, D): F, H, R, decay rank, parameters. The counts match the sizes of the released files.
RELEASED = {
    "eagle-0.1B": (EAGLE, 12, 768, 2688, 12, None, None, 192_807_936),
    "eagle-0.4B": (EAGLE, 24, 1024, 3584, 16, None, None, 461_721_600),
    "eagle-1.5B": (EAGLE, 24, 2048, 7168, 32, None, None, 1_577_754_624),
    "eagle-3B": (EAGLE, 32, 2560, 8960, 40, None, None, 3_062_999_040),
    "eagle-7B": (EAGLE, 32, 4096, 14336, 64, None, None, 7_518_044_160),
    "finch-0.1B": (FINCH, 12, 768, 2688, 12, 32, 64, 196_955_136),
    "finch-1.6B": (FINCH, 24, 2048, 7168, 32, 32, 64, 1_599_873_024),
    "finch-3B": (FINCH, 32, 2560, 8960, 40, 32, 64, 3_099_863_040),
    "finch-7B": (FINCH, 32, 4096, 14336, 64, 64, 128, 7_635_746_816),
    "finch-14B": (FINCH, 61, 4096, 14336, 64, 64, 128, 14_069_088_256),
}


@pytest.mark.parametrize("row", RELEASED.values(), ids=RELEASED)
def test_released_sizes(row):
    version, n_layer, n_embd, dim_ffn, n_head, mix_rank, decay_rank, count = row
    config = RWKVConfig(version=version, n_layer=n_layer, n_embd=n_embd)
    assert (config.dim_att, config.dim_ffn, config.n_head) == (n_embd, dim_ffn, n_head)
    assert (config.mix_rank, config.decay_rank, config.vocab_size) == (mix_rank, decay_rank, 65536)
    with torch.device("meta"):
        model = RWKV(config)
    assert model.parameter_count() == count
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("n_embd, dim_ffn", [(64, 224), (96, 320), (160, 544), (192, 672)])
def test_channel_mix_width_is_rounded_down_to_32(n_embd, dim_ffn):
    assert RWKVConfig(n_layer=1, n_embd=n_embd, head_size=32).dim_ffn == dim_ffn


def test_names_and_shapes_are_those_of_the_pth_files():
    d, a, f, v, r, rd = 96, 64, 128, 41, 8, 16
    sizes = dict(vocab_size=v, n_layer=2, n_embd=d, dim_att=a, dim_ffn=f, head_size=16)
    norms = {"ln1.weight": [d], "ln1.bias": [d], "ln2.weight": [d], "ln2.bias": [d]}
    shared = norms | {
        "att.time_faaaa": [4, 16],
        **{f"att.{m}.weight": [a, d] for m in ("receptance", "key", "value", "gate")},
        "att.output.weight": [d, a], "att.ln_x.weight": [a], "att.ln_x.bias": [a],
        "ffn.key.weight": [f, d], "ffn.receptance.weight": [d, d], "ffn.value.weight": [d, f],
    }  # fmt: skip
    eagle = shared | {f"att.time_mix_{c}": [1, 1, d] for c in "kvrg"} | {f"ffn.time_mix_{c}": [1, 1, d] for c in "kr"}
    finch = shared | {f"att.time_maa_{c}": [1, 1, d] for c in "xwkvrg"} | {f"ffn.time_maa_{c}": [1, 1, d] for c in "kr"}
    finch |= {"att.time_maa_w1": [d, 5 * r], "att.time_maa_w2": [5, r, d]}
    finch |= {"att.time_decay_w1": [d, rd], "att.time_decay_w2": [rd, a]}
    eagle["att.time_decay"], finch["att.time_decay"] = [4, 16], [1, 1, a]
    top = {"emb.weight": [v, d], "ln_out.weight": [d], "ln_out.bias": [d], "head.weight": [v, d]}
    top |= {"blocks.0.ln0.weight": [d], "blocks.0.ln0.bias": [d]}
    for config, block in (
        (RWKVConfig(version=EAGLE, **sizes), eagle),
        (RWKVConfig(version=FINCH, mix_rank=r, decay_rank=rd, **sizes), finch),
    ):
        expected = top | {f"blocks.{layer}.{name}": shape for layer in (0, 1) for name, shape in block.items()}
        state_dict = RWKV(config).state_dict()
        assert {name: list(x.shape) for name, x in state_dict.items()} == expected
        assert list(state_dict)[0] == "emb.weight" and list(state_dict)[-1] == "head.weight"


@pytest.mark.parametrize("kind", SMALL)
def test_attention_width_may_differ_from_the_model_width(kind):
    """A = 96, D = 64: shapes follow A in the time mix, D elsewhere; forward and step agree."""
    config = dataclasses.replace(SMALL[kind], dim_att=96, dim_ffn=None)
    assert config.dim_ffn == 224
    model = random_model(config)
    state = model.initial_state(2)
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        logits, _ = model(tokens)
        for t in range(5):
            stepped = model.step(tokens[:, t], state)
    torch.testing.assert_close(stepped, logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SMALL)
def test_flops_are_counted_from_the_shapes(kind):
    c = SMALL[kind]
    d, a, f = c.n_embd, c.dim_att, c.dim_ffn
    block = 5 * d * a + 2 * d * f + d * d
    if kind == "finch":
        block += 2 * 5 * d * c.mix_rank + d * c.decay_rank + c.decay_rank * a
    forward = 2 * (c.n_layer * block + c.vocab_size * d) + c.n_layer * 5 * a * c.head_size
    assert RWKV(c).flops_per_token() == 3 * forward


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (dict(version="7"), ValueError, r'version must be "5.2" \(Eagle\) or "6.0" \(Finch\), got \'7\''),
        (dict(version=6.0), ValueError, r"version must be .* got 6.0"),
        (dict(version="5.2", mix_rank=32), ValueError, r"mix_rank must be None for Eagle, got 32"),
        (dict(version="5.2", decay_rank=8), ValueError, r"decay_rank must be None for Eagle, got 8"),
        (dict(n_layer=0), ValueError, r"n_layer must be at least 1, got 0"),
        (dict(n_layer="6"), TypeError, r"n_layer must be an integer, got '6'"),
        (dict(vocab_size=True), TypeError, r"vocab_size must be an integer, got True"),
        (dict(vocab_size=0), ValueError, r"vocab_size must be at least 1, got 0"),
        (dict(n_embd=128.0), TypeError, r"n_embd must be an integer, got 128.0"),
        (dict(head_size=-64), ValueError, r"head_size must be at least 1, got -64"),
        (dict(dim_ffn=0), ValueError, r"dim_ffn must be at least 1, got 0"),
        (dict(mix_rank=0), ValueError, r"mix_rank must be at least 1, got 0"),
        (dict(n_embd=100), ValueError, r"n_embd must be a multiple of 32, got 100"),
        (dict(dim_att=80), ValueError, r"dim_att must be a multiple of 32, got 80"),
        (dict(dim_ffn=100), ValueError, r"dim_ffn must be a multiple of 32, got 100"),
        (dict(n_embd=96), ValueError, r"dim_att must be a multiple of head_size, got 96 and 64; change n_embd"),
    ],
    ids=str,
)
def test_messages_name_the_field(change, kind, message):
    with pytest.raises(kind, match=r"RWKVConfig: " + message):
        RWKVConfig(**(dict(n_layer=2, n_embd=128) | change))


def test_config_is_frozen_and_survives_a_round_trip():
    for config in SMALL.values():
        assert RWKVConfig(**dataclasses.asdict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 3
