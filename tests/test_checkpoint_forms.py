"""Every form of checkpoint: the same bits through any two of them, what a path means, shards, tuned initial states."""

import dataclasses
import json

import pytest
import torch
from model_cases import SMALL, one_thread, random_model, random_tokens  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rwkv_ext.checkpoint import files
from rwkv_ext.models import RWKV

KINDS = pytest.mark.parametrize("kind", SMALL)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
PATHS = {"pth": "model.pth", "safetensors": "model.safetensors", "hf": "hf-folder", "fla": "fla-folder"}


def odd_model(kind, dtype=torch.float32):
    """Every size another, so that nothing passes for something else; three layers, so that the middle one is plain."""
    sizes = dict(n_layer=3, n_embd=64, dim_att=96, dim_ffn=160)
    return random_model(dataclasses.replace(SMALL[kind], **sizes), dtype=dtype)


def tune(model):
    model.enable_time_state()
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            block.att.time_state.normal_(generator=torch.Generator().manual_seed(layer))
    return model


def assert_same(model, other):
    assert model.config == other.config
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, x in mine.items():
        y = theirs[name]
        assert y.dtype == x.dtype and y.is_contiguous() and torch.equal(x, y), name


@KINDS
@DTYPES
def test_same_bits_through_every_pair_of_forms(kind, dtype, tmp_path):
    model = odd_model(kind, dtype)
    shard_bytes = 200_000 if dtype == torch.float32 else files.SHARD_BYTES
    forms = [form for form in files.FORMS if kind == "finch" or form != "fla"]
    for first in forms:
        one = tmp_path / f"1-{PATHS[first]}"
        model.save_pretrained(one, dtype, format=first, shard_bytes=shard_bytes)
        loaded = RWKV.from_pretrained(one)
        assert_same(model, loaded)
        assert all(p.requires_grad for p in loaded.parameters())
        for second in forms:  # straight from file to file, as convert does
            two = tmp_path / f"2-{PATHS[second]}"
            config, tensors, *_ = files.read(one)
            files.write(two, config, tensors, None, second, shard_bytes)
            assert_same(model, RWKV.from_pretrained(two))


@KINDS
def test_the_same_logits_from_every_form(kind, tmp_path):
    model = tune(odd_model(kind))
    tokens = random_tokens(model.config, 2, 9)
    for form in ("pth", "safetensors", "hf"):
        model.save_pretrained(tmp_path / PATHS[form], torch.float32)
        loaded = RWKV.from_pretrained(str(tmp_path / PATHS[form]))
        assert_same(model, loaded)
        assert torch.equal(model(tokens)[0], loaded(tokens)[0])


def test_the_path_says_the_form(tmp_path):
    model = odd_model("finch")
    for name, form in {
        "a.pth": "pth", "a.pt": "pth", "a.bin": "pth", "a.safetensors": "safetensors", "v6-Finch-1.6B": "hf", "a": "hf",
    }.items():  # fmt: skip
        assert files.form_of(tmp_path / name) == form
        model.save_pretrained(tmp_path / name)
        found = files.read(tmp_path / name)
        assert found.naming == ("hf" if form == "hf" else "official"), name
        assert (tmp_path / name).is_dir() == (form == "hf")
    for form in files.FORMS:
        assert files.form_of(tmp_path / "a", form) == form
    with pytest.raises(ValueError, match="format must be one of pth, safetensors, hf, fla, got 'gguf'"):
        model.save_pretrained(tmp_path / "b", format="gguf")
    with pytest.raises(ValueError, match=r"save_pretrained: path must name a folder for format fla, got .*b.pth"):
        model.save_pretrained(tmp_path / "b.pth", format="fla")
    with pytest.raises(ValueError, match=r"save_pretrained: path must name a .pth file for format pth, got .*b.safet"):
        model.save_pretrained(tmp_path / "b.safetensors", format="pth")
    with pytest.raises(ValueError, match="save_pretrained: shard_bytes must be at least 1, got 0"):
        model.save_pretrained(tmp_path / "b", shard_bytes=0)
    assert not list(tmp_path.glob("b*"))


def test_files_without_a_telling_name_are_known_by_their_content(tmp_path):
    model = odd_model("finch")
    for form in ("pth", "safetensors"):
        model.save_pretrained(tmp_path / f"{form}-weights", torch.float32, format=form)
        assert_same(model, RWKV.from_pretrained(tmp_path / f"{form}-weights"))


@KINDS
def test_any_names_in_any_container(kind, tmp_path):
    """Hugging Face names in one .safetensors, in a .bin, in .bin shards; flash-linear-attention's in a .pth."""
    model = odd_model(kind)
    namings = {"hf": files.huggingface, "official": files.official} | ({"fla": files.fla} if kind == "finch" else {})
    for naming, module in namings.items():
        tensors = {name: x.contiguous() for name, x in module.from_official(model.state_dict()).items()}
        save_file(tensors, tmp_path / "one.safetensors")
        torch.save(tensors, tmp_path / "one.pth")
        whole, shards = tmp_path / f"{naming}-bin", tmp_path / f"{naming}-bins"
        whole.mkdir(), shards.mkdir()
        torch.save(tensors, whole / "pytorch_model.bin")
        places = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(tensors)}
        for file in set(places.values()):
            torch.save({name: x for name, x in tensors.items() if places[name] == file}, shards / file)
        (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
        for path in (tmp_path / "one.safetensors", tmp_path / "one.pth", whole, shards):
            found = files.read(path)
            assert found.naming == naming, path
            assert_same(model, RWKV.from_pretrained(path))


@KINDS
def test_safetensors_as_its_own_library_sees_it(kind, tmp_path):
    model = odd_model(kind)
    model.save_pretrained(tmp_path / "a.safetensors")
    content = load_file(tmp_path / "a.safetensors")
    assert content.keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        assert torch.equal(content[name], x.to(torch.bfloat16))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_mixed_dtypes_survive_without_a_dtype(tmp_path):
    tensors = {
        name: x if "time_" in name else x.to(torch.bfloat16) for name, x in odd_model("finch").state_dict().items()
    }
    torch.save(tensors, tmp_path / "in.pth")
    for form, name in PATHS.items():
        config, mixed, *_ = files.read(tmp_path / "in.pth")
        files.write(tmp_path / name, config, mixed, None, form)
        found = files.read(tmp_path / name).tensors
        for key, x in tensors.items():
            assert found[key].dtype == x.dtype and torch.equal(found[key], x), key


def test_shards_and_their_index(tmp_path):
    model = odd_model("finch")
    model.save_pretrained(tmp_path / "m", torch.float32, shard_bytes=30_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("m/*.safetensors"))
    assert len(shards) > 5
    assert [p.name for p in shards] == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    sizes = {}
    for shard in shards:
        content = load_file(shard)
        sizes[shard.name] = sum(x.nbytes for x in content.values())
        assert all(index["weight_map"][name] == shard.name for name in content)
        assert sizes[shard.name] <= 30_000 or len(content) == 1
    assert index["metadata"]["total_size"] == sum(sizes.values()) == 4 * model.parameter_count()
    assert len(index["weight_map"]) == len(model.state_dict())
    model.save_pretrained(tmp_path / "m")  # and now one file: nothing of the shards stays
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@KINDS
def test_time_state_alone(kind, suffix, tmp_path):
    base, tuned = odd_model(kind), tune(odd_model(kind))
    base.save_pretrained(tmp_path / "base.pth", torch.float32)
    tuned.save_time_state(tmp_path / f"state{suffix}", torch.float32)
    found = files.read_time_state(tmp_path / f"state{suffix}", base.config)
    assert list(found) == [f"blocks.{layer}.att.time_state" for layer in range(3)]
    together = RWKV.from_pretrained(tmp_path / "base.pth", time_state=tmp_path / f"state{suffix}")
    assert_same(tuned, together)
    # Their axes are (head, value, key), those of the recurrence's state (head, key, value).
    for layer, name in enumerate(found):
        assert torch.equal(together.initial_state(1).wkv[layer, 0], found[name].transpose(1, 2))
    low = RWKV.from_pretrained(tmp_path / "base.pth", dtype=torch.bfloat16)
    low.load_time_state(tmp_path / f"state{suffix}")
    assert torch.equal(low.blocks[1].att.time_state, tuned.blocks[1].att.time_state.to(torch.bfloat16))
    assert low.blocks[1].att.time_state.requires_grad
    tuned.load_time_state(tmp_path / f"state{suffix}")  # in place of the one it has
    assert_same(tuned, together)


def test_time_state_under_hugging_face_names(tmp_path):
    tuned = tune(odd_model("finch"))
    tuned.save_pretrained(tmp_path / "hf", torch.float32)
    assert "rwkv.blocks.2.attention.time_state" in load_file(tmp_path / "hf" / "model.safetensors")
    states = {f"rwkv.blocks.{i}.attention.time_state": b.att.time_state.detach() for i, b in enumerate(tuned.blocks)}
    torch.save(states, tmp_path / "state.bin")
    base = odd_model("finch")
    base.load_time_state(tmp_path / "state.bin")
    assert_same(tuned, base)


def test_time_state_of_another_model_is_refused(tmp_path):
    model = odd_model("finch")
    tune(random_model(SMALL["finch"])).save_time_state(tmp_path / "small.pth")
    model.save_pretrained(tmp_path / "whole.pth")
    for name, words in {
        "small.pth": "missing blocks.2.att.time_state [6, 16, 16]\n  blocks.0.att.time_state must be [6, 16, 16], got",
        "whole.pth": "extra emb.weight [41, 64]",
    }.items():
        with pytest.raises(ValueError) as error:
            model.load_time_state(tmp_path / name)
        assert "must hold the tuned initial states of this model alone" in str(error.value)
        assert words in str(error.value)
        assert model.blocks[0].att.time_state is None, "a refused file leaves the model as it was"
    with pytest.raises(ValueError, match=r"small.pth must be .* got a tuned initial state alone .* as time_state="):
        RWKV.from_pretrained(tmp_path / "small.pth")
    with pytest.raises(ValueError, match="save_time_state: the model must have a time_state, has none"):
        model.save_time_state(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"save_time_state: path must end in .pth or .safetensors, got .*state$"):
        tune(model).save_time_state(tmp_path / "state")


def test_what_fla_has_no_place_for(tmp_path):
    with pytest.raises(ValueError, match=r"format fla must be given a Finch .* got an Eagle .5.2. one"):
        odd_model("eagle").save_pretrained(tmp_path / "fla", format="fla")
    with pytest.raises(ValueError, match=r"format fla must be given a model without a tuned initial state"):
        tune(odd_model("finch")).save_pretrained(tmp_path / "fla", format="fla")
    assert not (tmp_path / "fla").exists()
