"""from_pretrained and save_pretrained: round trips, detection, prefixes, wrong tensors, damaged files, full disks."""

import collections
import dataclasses
import re
import zipfile

import pytest
import torch
from file_limits import largest_file
from model_cases import SMALL, one_thread, random_model, random_tokens  # noqa: F401

from rwkv_ext.checkpoint import pth
from rwkv_ext.models import RWKV

KINDS = pytest.mark.parametrize("kind", SMALL)


def tensors_of(kind):
    return {name: x.clone() for name, x in random_model(SMALL[kind]).state_dict().items()}


def load_saved(tensors, tmp_path, **kwargs):
    path = tmp_path / "model.pth"
    torch.save(tensors, path)
    return RWKV.from_pretrained(path, **kwargs)


def refused(tensors, tmp_path):
    with pytest.raises(ValueError) as error:
        load_saved(tensors, tmp_path)
    message = str(error.value)
    assert message.startswith(f"from_pretrained: {tmp_path / 'model.pth'} must ")
    return message


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip(kind, dtype, tmp_path):
    config = dataclasses.replace(SMALL[kind], dim_att=96, dim_ffn=160, n_layer=3)
    model = random_model(config).to(dtype)
    model.save_pretrained(tmp_path / "a.pth", dtype)
    loaded = RWKV.from_pretrained(str(tmp_path / "a.pth"))
    assert loaded.config == config
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    for p, q in zip(model.parameters(), loaded.parameters(), strict=True):
        assert q.dtype == dtype and q.requires_grad and torch.equal(p, q)
    tokens = random_tokens(config, 1, 7)
    assert torch.equal(model(tokens)[0], loaded(tokens)[0])


@KINDS
def test_file_is_an_ordered_dict_of_bf16_tensors(kind, tmp_path):
    model = random_model(SMALL[kind])
    model.save_pretrained(tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(content) == list(model.state_dict())
    assert {x.dtype for x in content.values()} == {torch.bfloat16}
    assert all(torch.equal(content[name], p.to(torch.bfloat16)) for name, p in model.state_dict().items())
    size = (tmp_path / "a.pth").stat().st_size
    assert size < 2 * model.parameter_count() + 64 * 1024, "each tensor alone, not the storage it is a view of"
    assert RWKV.from_pretrained(tmp_path / "a.pth", dtype=torch.float32).head.weight.dtype == torch.float32


@pytest.mark.parametrize("large", [1, 1 << 30], ids=["zip64", "zip"])
def test_the_container_is_torchs_own(large, tmp_path, monkeypatch):
    """torch.load, mapped or not, the zip checksums, and data at multiples of 64 bytes as torch.save puts it."""
    monkeypatch.setattr(pth, "_LARGE", large)
    model = random_model(SMALL["finch"])
    model.save_pretrained(tmp_path / "a.pth", torch.float32)
    torch.save(dict(model.state_dict()), tmp_path / "torchs.pth")
    for mapped in (False, True):
        content = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mapped)
        reference = torch.load(tmp_path / "torchs.pth", weights_only=True, mmap=mapped)
        assert list(content) == list(reference)
        for name, x in reference.items():
            assert torch.equal(content[name], x) and content[name].stride() == x.stride()
            assert type(content[name]) is torch.Tensor and not content[name].requires_grad
            assert content[name].data_ptr() % 64 == 0
    assert torch.load(tmp_path / "a.pth", weights_only=False).keys() == content.keys()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
        assert [name for name in archive.namelist() if "/data/" in name] == [
            f"archive/data/{i}" for i in range(len(content))
        ]
    again = tmp_path / "again.pth"
    model.save_pretrained(again, torch.float32)
    assert again.read_bytes() == (tmp_path / "a.pth").read_bytes()


def test_views_are_saved_without_their_storage(tmp_path):
    model = random_model(SMALL["finch"])
    big = torch.zeros(1000, *model.head.weight.shape)
    big[0] = model.head.weight.detach()
    model.head.weight.data = big[0]
    model.save_pretrained(tmp_path / "a.pth", torch.float32)
    assert (tmp_path / "a.pth").stat().st_size < 4 * model.parameter_count() + 64 * 1024


def test_official_names_may_carry_prefixes(tmp_path):
    tensors = tensors_of("finch")
    for prefix in ("_forward_module.", "model.", "_forward_module.model.", "module.", "_orig_mod."):
        prefixed = collections.OrderedDict((prefix + name, x) for name, x in tensors.items())
        model = load_saved(prefixed, tmp_path)
        assert torch.equal(model.head.weight, tensors["head.weight"])
    both = tensors | {"model.head.weight": tensors["head.weight"]}
    assert "name every tensor once, got head.weight twice (also as model.head.weight)" in refused(both, tmp_path)


def test_mixed_dtypes_take_the_widest_unless_told(tmp_path):
    tensors = {name: x if "time_" in name else x.to(torch.bfloat16) for name, x in tensors_of("eagle").items()}
    assert {p.dtype for p in load_saved(tensors, tmp_path).parameters()} == {torch.float32}
    low = load_saved(tensors, tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def test_file_from_before_the_zip_format(tmp_path):
    tensors = tensors_of("finch")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(RWKV.from_pretrained(tmp_path / "old.pth").emb.weight, tensors["emb.weight"])


def test_loaded_parameters_do_not_live_in_the_file(tmp_path):
    tensors = tensors_of("finch")
    model = load_saved(tensors, tmp_path)
    (tmp_path / "model.pth").write_bytes(b"gone")
    assert torch.equal(model.emb.weight, tensors["emb.weight"])
    with torch.no_grad():
        model.emb.weight.zero_()


@KINDS
def test_time_state_round_trip(kind, tmp_path):
    model = random_model(SMALL[kind])
    model.enable_time_state()
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.normal_()
    model.save_pretrained(tmp_path / "a.pth", torch.float32)
    loaded = RWKV.from_pretrained(tmp_path / "a.pth")
    tokens = random_tokens(model.config, 1, 5)
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    expected = torch.stack([block.att.time_state.transpose(1, 2) for block in model.blocks])
    assert torch.equal(loaded.initial_state(1).wkv[:, 0], expected)


def test_every_wrong_tensor_is_named(tmp_path):
    tensors = tensors_of("finch")
    del tensors["blocks.1.ln2.bias"], tensors["blocks.0.att.gate.weight"]
    tensors["blocks.1.att.time_mystery"] = torch.zeros(3, 4)
    tensors["blocks.1.ffn.value.weight"] = tensors["blocks.1.ffn.value.weight"].T.contiguous()
    tensors["blocks.0.att.time_state"] = torch.zeros(4, 16, 16)
    tensors["ln_out.bias"] = torch.zeros(64, dtype=torch.int64)
    message = refused(tensors, tmp_path)
    assert "must hold exactly one model; 6 wrong tensors:" in message
    for line in (
        "missing blocks.1.ln2.bias [64]",
        "missing blocks.0.att.gate.weight [64, 64]",
        "missing blocks.1.att.time_state [4, 16, 16]",
        "extra blocks.1.att.time_mystery [3, 4]",
        "blocks.1.ffn.value.weight must be [64, 224], got [224, 64]",
        "ln_out.bias must be floating point, got torch.int64",
    ):
        assert f"\n  {line}" in message, message


def drop(part):
    return lambda tensors: {name: x for name, x in tensors.items() if part not in name}


def add(name):
    return lambda tensors: tensors | {name: torch.zeros(2)}


def per_head_decay(tensors):
    return {name: x[:, 0].clone() if name.endswith("att.time_decay") else x for name, x in tensors.items()}


@pytest.mark.parametrize(
    "kind, change, found",
    [
        ("finch", add("blocks.0.att.r_k"), "got an RWKV-7 model"),
        ("finch", add("blocks.0.att.x_r"), "got an RWKV-7 model"),
        ("finch", add("blocks.0.att.gate_w1"), "got an RWKV-6.0a model (att.gate_w1)"),
        ("finch", add("blocks.0.att.time_maa_rkvw_w1"), "got an RWKV-6.0b or 6.0c model (time_maa_rkvw_w1)"),
        ("eagle", drop("att.ln_x"), "got an RWKV-4 or older model (no att.ln_x)"),
        ("eagle", drop("att.gate"), "got an RWKV-5.0 model (no att.gate)"),
        ("eagle", per_head_decay, "got an RWKV-5.1 model (one decay per head: att.time_decay [4])"),
        ("eagle", drop("time_decay"), "got an RWKV-5.1 model (one decay per head: att.time_decay none)"),
        ("finch", lambda t: {"blocks.0.att.time_state": torch.zeros(4, 16, 16)}, "got a tuned initial state alone"),
        ("finch", add("blocks.0.att.key.lora_A"), "got a LoRA adapter; merge it"),
        ("finch", lambda t: {"fc.weight": torch.zeros(2, 2)}, "got tensors that are not RWKV's, such as fc.weight"),
        ("finch", lambda t: {}, "got tensors that are not RWKV's, such as none at all"),
        ("finch", drop("blocks.0.att.time_faaaa"), "lacks blocks.0.att.time_faaaa with 2 axes (missing)"),
        ("finch", drop("time_maa_w1"), "lacks blocks.0.att.time_maa_w1 with 2 axes (missing)"),
        ("finch", lambda t: t | {"emb.weight": torch.zeros(3)}, "lacks emb.weight with 2 axes ([3])"),
        ("eagle", lambda t: t | {"emb.weight": torch.zeros(41, 40)}, "n_embd must be a multiple of 32, got 40"),
    ],
)
def test_other_files_are_refused_by_what_they_are(kind, change, found, tmp_path):
    assert found in refused(change(tensors_of(kind)), tmp_path)


@KINDS
def test_a_bias_free_per_head_axis_is_still_51(kind, tmp_path):
    """5.1 files keep one decay per head as [H] or [H, 1]; both must not pass for 5.2."""
    tensors = tensors_of("eagle")
    for name in [n for n in tensors if n.endswith("att.time_decay")]:
        tensors[name] = tensors[name][:, :1].clone()
    assert "RWKV-5.1 model (one decay per head: att.time_decay [4, 1])" in refused(tensors, tmp_path)


def test_files_that_hold_no_dict_of_tensors(tmp_path):
    assert "must hold a dict of name -> tensor, got list" in refused([torch.zeros(2)], tmp_path)
    nested = {"model": tensors_of("finch"), "step": 3}
    assert "alone, got other things under ['model', 'step']; if it is a training" in refused(nested, tmp_path)
    assert "got other things under [0]" in refused({0: torch.zeros(2)}, tmp_path)
    sparse = tensors_of("finch") | {"emb.weight": torch.eye(3).to_sparse()}
    assert "name -> dense tensor alone, got other things under ['emb.weight']" in refused(sparse, tmp_path)


def test_parameters_in_a_file_are_tensors(tmp_path):
    model = random_model(SMALL["finch"])
    loaded = load_saved(dict(model.named_parameters()), tmp_path)
    for p, q in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q) and q.is_leaf and q.requires_grad


class Forbidden:
    """weights_only must refuse it: unpickling runs code."""


def test_unreadable_files(tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(FileNotFoundError, match=r"from_pretrained: .*model.pth does not exist; give the path"):
        RWKV.from_pretrained(path)
    torch.save(tensors_of("finch"), path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:100], b"", b"not a checkpoint at all\n" * 50):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.pth must be a .pth file of tensors, got .* truncated"):
            RWKV.from_pretrained(path)
    torch.save({"emb.weight": Forbidden()}, path)
    with pytest.raises(ValueError, match=r"model.pth must be a .pth file of tensors, got .* something else"):
        RWKV.from_pretrained(path)


def test_values_too_large_for_fp16_are_refused(tmp_path):
    model = random_model(SMALL["finch"])
    with torch.no_grad():
        model.blocks[1].ffn.value.weight[0, 0] = 1e6
    message = r"blocks.1.ffn.value.weight must stay below 65504 to fit float16, got 1e\+06; use bfloat16"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "m.pth", torch.float16)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "m.pth", torch.float32)
    with pytest.raises(ValueError, match=message):
        RWKV.from_pretrained(tmp_path / "m.pth", dtype=torch.float16)


def test_dtype_must_be_floating_point(tmp_path):
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype, got torch.int32; use torch.bfloat16"):
        RWKV.from_pretrained(tmp_path / "m.pth", dtype=torch.int32)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pth"
    model = random_model(SMALL["finch"])
    model.save_pretrained(path)
    before = path.read_bytes()
    with torch.no_grad():
        model.emb.weight.add_(1)
    for limit in (100, 5000, len(before) - 1000):
        message = r"save_pretrained: .*model.pth could not be written .*; free space or choose another path"
        with largest_file(limit), pytest.raises(OSError, match=message):
            model.save_pretrained(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
    with pytest.raises(FileNotFoundError, match=r"save_pretrained: .*could not be written .No such file"):
        model.save_pretrained(tmp_path / "nowhere" / "model.pth")
    model.save_pretrained(path)
    assert path.read_bytes() != before


def test_saving_over_the_file_the_model_came_from(tmp_path):
    tensors = tensors_of("eagle")
    model = load_saved(tensors, tmp_path)
    model.save_pretrained(tmp_path / "model.pth", torch.float32)
    assert re.fullmatch(r"RWKVConfig\(version='5.2'.*\)", str(RWKV.from_pretrained(tmp_path / "model.pth").config))
