"""Damaged, incomplete and contradictory checkpoints are refused in a sentence, and nothing in one is executed."""

import json
import os
import pickle
import random
import struct

import pytest
import torch
from model_cases import SMALL, one_thread, random_model  # noqa: F401
from safetensors.torch import load_file, save_file

from rwkv_ext.checkpoint import files
from rwkv_ext.models import RWKV

INDEX = "model.safetensors.index.json"
FOLDERS = pytest.mark.parametrize("form", ["hf", "fla"])


@pytest.fixture(scope="module")
def finch():
    return random_model(SMALL["finch"])


@pytest.fixture
def sharded(finch, tmp_path):
    """A folder of Hugging Face's layout in several shards."""
    finch.save_pretrained(tmp_path / "m", torch.float32, shard_bytes=100_000)
    return tmp_path / "m"


def refusal(path, kind=ValueError):
    with pytest.raises(kind) as error:
        RWKV.from_pretrained(path)
    message = str(error.value)
    assert message.startswith("from_pretrained: "), message
    return message


def change_json(path, **changes):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | changes))


def test_no_such_file(tmp_path):
    message = refusal(tmp_path / "m.safetensors", FileNotFoundError)
    assert message.endswith(
        "m.safetensors does not exist; give the path of a .pth or .safetensors file, or of a folder"
    )


@pytest.mark.parametrize("size", [0, 7, 8, 100, 3000, -1000, -1])
def test_truncated_safetensors(finch, size, tmp_path):
    finch.save_pretrained(tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:size])
    assert "m.safetensors must be a complete .safetensors file" in refusal(tmp_path / "m.safetensors")


def raw_safetensors(path, header, data=b""):
    header = header.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_safetensors_that_lie(tmp_path):
    path = tmp_path / "m.safetensors"
    one = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    raw_safetensors(path, f"{{{one},{one}}}", b"\0" * 4)
    assert "m.safetensors must name every tensor once, got a twice" in refusal(path)
    for header, data in {
        "{]": b"",
        "[]": b"",
        "{" + one + "}": b"\0" * 3,
        "{" + one.replace("[0,4]", "[0,400]") + "}": b"\0" * 4,
        "{" + one.replace("[1]", "[1000000000000000]") + "}": b"\0" * 4,
        "{" + one.replace("F32", "F999") + "}": b"\0" * 4,
    }.items():
        raw_safetensors(path, header, data)
        assert "must be a complete .safetensors file of tensors that torch has" in refusal(path), header
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    assert "must be a complete .safetensors file" in refusal(path)
    save_file({"a": torch.zeros(2)}, path)
    assert "must be an Eagle (5.2) or Finch (6.0) model, got tensors that are not RWKV's, such as a" in refusal(path)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_random_damage_is_refused_or_harmless(finch, form, tmp_path):
    """Whatever bytes change in the tables of a file, no exception but ours comes out."""
    path = tmp_path / f"m.{form}"
    finch.save_pretrained(path)
    whole, chance = path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 4])):
            place = chance.randrange(6000) if chance.random() < 0.6 else -1 - chance.randrange(8000)
            damaged[place] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            RWKV.from_pretrained(path)
        except ValueError as error:
            assert str(error).startswith("from_pretrained: "), error
            refused += 1
    assert refused > 10


class Intruder:
    """Unpickled by anything that executes what a pickle says, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("container", ["m.pth", "old.pth", "bare.pth", "folder/pytorch_model.bin"])
def test_nothing_in_a_file_is_executed(finch, container, tmp_path):
    trap, path = tmp_path / "trap", tmp_path / container
    path.parent.mkdir(exist_ok=True)
    content = dict(finch.state_dict()) | {"blocks.0.att.extra": Intruder(trap)}
    if container == "bare.pth":
        path.write_bytes(pickle.dumps(content | {name: 0 for name in finch.state_dict()}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container != "old.pth")
    model = path if container.endswith(".pth") else path.parent
    assert "must be a .pth file of tensors" in refusal(model)
    assert not trap.exists()
    with pytest.raises(ValueError, match="must be a .pth file of tensors"):
        finch.load_time_state(path)
    assert not trap.exists()
    # The trap works: whoever does execute the file, falls into it.
    if container == "bare.pth":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trap.exists()


def test_a_config_that_asks_for_code_is_read_as_data(finch, tmp_path):
    finch.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "modeling_rwkv6.py").write_text("raise SystemExit('executed')\n")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["auto_map"]
    RWKV.from_pretrained(tmp_path / "m")


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:'torch.load' received a zip file that looks like")
def test_torchscript_is_refused(tmp_path):
    class Module(torch.nn.Module):
        def forward(self, x):
            return x

    torch.jit.trace(Module(), torch.zeros(1)).save(tmp_path / "m.pth")
    assert "must be a .pth file of tensors" in refusal(tmp_path / "m.pth")


def test_folders_of_something_else(finch, tmp_path):
    message = refusal(tmp_path, FileNotFoundError)
    assert "must hold one of model.safetensors, pytorch_model.bin or its .index.json, has nothing; give the" in message
    finch.save_pretrained(tmp_path / "m.pth")
    assert "has m.pth; give the path of the model's own file or folder" in refusal(tmp_path, FileNotFoundError)
    for i in range(20):
        (tmp_path / f"a{i:02}").touch()
    assert "has a00, a01, a02, a03, a04, a05, a06, a07 ...; give" in refusal(tmp_path, FileNotFoundError)


def test_missing_shards_are_named(sharded):
    for number in (2, 3):
        next(sharded.glob(f"model-{number:05}-*")).unlink()
    message = refusal(sharded, FileNotFoundError)
    count = len(list(sharded.glob("*.safetensors"))) + 2
    absent = ", ".join(f"model-{number:05}-of-{count:05}.safetensors" for number in (2, 3))
    assert message.endswith(f"{INDEX} names files that are not there: {absent}; download them")


def test_truncated_shards_are_named(sharded):
    shard = next(sharded.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-5])
    assert f"{shard} must be a complete .safetensors file" in refusal(sharded)


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"weight_map": {"a": "b", "a": "c"}}', "must be JSON with every name once (a is there twice)"),
        ("{", "must be JSON with every name once"),
        ("\xff\xfe", "must be JSON with every name once"),
        ("[]", "must be a JSON object, got list"),
        ("{}", "must map tensors to files under weight_map; download it again"),
        ('{"weight_map": {"a": 3}}', "must map tensors to files under weight_map"),
        ('{"weight_map": {"a": "../config.json"}}', "must name files of its own folder, got '../config.json'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "must name files of its own folder, got '/etc/passwd'"),
        ('{"weight_map": {"a": ".."}}', "must name files of its own folder, got '..'"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "names files that are not there: absent.safetensors"),
        ('{"weight_map": {}}', "got tensors that are not RWKV's, such as none at all"),
    ],
)
def test_damaged_indices(sharded, content, words):
    (sharded / INDEX).write_text(content, encoding="latin-1")
    assert words in refusal(sharded, (ValueError, FileNotFoundError))


def test_shards_that_contradict_the_index(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    here, there = load_file(first), load_file(second)
    name, x = next(iter(there.items()))
    save_file(here | {name: x}, first)
    assert f"{first} must hold what {INDEX} says, also has {name}; download both" in refusal(sharded)
    gone = next(iter(here))
    save_file({other: x for other, x in here.items() if other != gone}, first)
    assert f"{first} must hold what {INDEX} says, lacks {gone}; download both" in refusal(sharded)


def test_a_file_beside_its_own_index(sharded, finch):
    finch.save_pretrained(sharded.parent / "one")
    (sharded.parent / "one" / "model.safetensors").rename(sharded / "model.safetensors")
    assert f"must hold model.safetensors or {INDEX}, has both; remove the stale one" in refusal(sharded)


HF_VALUES = {
    "hidden_size": 65, "attention_hidden_size": 128, "num_hidden_layers": 3, "head_size": 64, "head_size_divisor": 1,
    "intermediate_size": 256, "layer_norm_epsilon": 1e-6, "vocab_size": 65536, "tie_word_embeddings": True,
}  # fmt: skip
FLA_VALUES = {
    "hidden_size": 65, "expand_k": 0.5, "expand_v": 2, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_heads": 5, "proj_low_rank_dim": 16, "gate_low_rank_dim": 8, "hidden_act": "relu", "norm_first": False,
    "norm_bias": False, "norm_eps": 64e-5, "vocab_size": 65536, "tie_word_embeddings": True, "attn": {"layers": [1]},
}  # fmt: skip


@pytest.mark.parametrize("form, wrong", [("hf", HF_VALUES), ("fla", FLA_VALUES)], ids=["hf", "fla"])
def test_every_setting_is_checked_against_the_tensors(finch, form, wrong, tmp_path):
    finch.save_pretrained(tmp_path / "m", format=form)
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    for key, value in wrong.items():
        change_json(tmp_path / "m" / "config.json", **(settings | {key: value}))
        message = refusal(tmp_path / "m")
        assert f"config.json must describe the tensors beside it, got {key} {value!r} (must be " in message, key
    change_json(tmp_path / "m" / "config.json", **(settings | {"hidden_size": 1, "vocab_size": "many"}))
    message = refusal(tmp_path / "m")
    assert "hidden_size 1 (must be 64), " in message and "vocab_size 'many' (must be 41); correct the file" in message


@FOLDERS
def test_what_config_json_leaves_open_is_taken_from_the_tensors(finch, form, tmp_path):
    finch.save_pretrained(tmp_path / "m", torch.float32, form)
    path = tmp_path / "m" / "config.json"
    released = {"intermediate_size": None, "num_attention_heads": 64, "unknown": [1]}  # as the released files have it
    change_json(path, **released)
    assert RWKV.from_pretrained(path.parent).config == finch.config
    path.write_text("{}")
    assert RWKV.from_pretrained(path.parent).config == finch.config
    path.unlink()
    assert RWKV.from_pretrained(path.parent).config == finch.config
    path.write_text("{")
    assert "config.json must be JSON with every name once" in refusal(path.parent)


def test_tensors_of_another_layout_are_named_as_the_file_names_them(finch, tmp_path):
    for form, name, words in (
        ("hf", "rwkv.blocks.1.attention.gate.weight", "must hold exactly one model; 1 wrong tensors"),
        ("hf", "rwkv.blocks.0.attention.time_faaaa", "lacks {} with 2 axes (missing)"),
        ("fla", "model.layers.1.attn.g_norm.bias", "must hold exactly one model; 1 wrong tensors"),
        ("fla", "model.layers.0.attn.bonus", "lacks {} with 2 axes (missing)"),
    ):
        finch.save_pretrained(tmp_path / form, format=form)
        file = tmp_path / form / "model.safetensors"
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file)
        message = refusal(tmp_path / form)
        assert words.format(name) in message and name in message


def test_a_missing_layer_is_named(tmp_path):
    model = random_model(SMALL["finch"])
    for form, name in (("hf", "rwkv.blocks.0."), ("fla", "model.layers.0.")):
        model.save_pretrained(tmp_path / form, format=form)
        file = tmp_path / form / "model.safetensors"
        tensors = {n.replace(name, name.replace("0", "7")): x for n, x in load_file(file).items()}
        tensors |= {n: x for n, x in load_file(file).items() if n.startswith(name)}
        save_file(tensors, file)
        assert "must have every layer, has layer 7 but no layer 2; a part of it may be missing" in refusal(file)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model.layers.0.attn.x_bias": torch.zeros(4, 64)}, "x_bias as [a multiple of 5, any size], got [4, 64]"),
        (
            {"model.layers.1.attn.x_proj.0.linear.weight": torch.zeros(41, 64)},
            "must have model.layers.1.attn.x_proj.0.linear.weight as [a multiple of 5, any size], got [41, 64]",
        ),
        ({"model.layers.0.attn.x_proj.2.weight": torch.zeros(64)}, "as [any size, a multiple of 5], got [64]"),
        (
            {"model.layers.0.attn.x_bias": torch.zeros(10, 64)},
            "model.layers.0.attn.x_bias must be [5, 64], got [10, 64]",
        ),
        ({"model.layers.0.ffn.key.mu": torch.zeros(1, 1, 64)}, "ffn.key.mu as [any size], got [1, 1, 64]"),
        (
            {"model.layers.0.attn.o_proj.weight": torch.zeros(64, 63)},
            "attn.o_proj.weight must be [64, 64], got [64, 63]",
        ),
        ({"model.layers.0.attn.spare": torch.zeros(1)}, "extra model.layers.0.attn.spare [1]"),
    ],
    ids=lambda value: next(iter(value)).split(".", 3)[-1] if isinstance(value, dict) else "",
)
def test_misshapen_fla_tensors(finch, change, words, tmp_path):
    tensors = dict(files.fla.from_official(finch.state_dict()).items())
    torch.save(tensors | change, tmp_path / "m.pth")
    assert words in refusal(tmp_path / "m.pth")


def test_other_models_of_fla_are_refused(tmp_path):
    for name, found in {
        "model.layers.0.attn.x_r": "got an RWKV-7 model",
        "model.layers.0.attn.q_proj.weight": "got another one (no attn.x_proj.0.linear.weight), with model.layers",
    }.items():
        torch.save({name: torch.zeros(2)}, tmp_path / "m.pth")
        message = refusal(tmp_path / "m.pth")
        assert "must be an rwkv6 (Finch) model of flash-linear-attention, " + found in message


def test_a_saved_state_is_refused(finch, tmp_path):
    finch.initial_state(2).save(tmp_path / "s.safetensors")
    assert "got the state of a text; load it with RWKVState.load" in refusal(tmp_path / "s.safetensors")


def test_older_models_under_hugging_face_names_are_refused(tmp_path):
    tensors = files.huggingface.from_official(random_model(SMALL["eagle"]).state_dict())
    decays = {name: x[:, 0].clone() if name.endswith(".time_decay") else x for name, x in tensors.items()}
    torch.save(decays, tmp_path / "m.pth")
    assert "got an RWKV-5.1 model (one decay per head: att.time_decay [4])" in refusal(tmp_path / "m.pth")
    torch.save({name: x for name, x in tensors.items() if "gate" not in name}, tmp_path / "m.pth")
    assert "got an RWKV-5.0 model (no att.gate)" in refusal(tmp_path / "m.pth")
