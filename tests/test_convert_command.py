"""rwkv-ext convert: what it writes, what it says, and what it refuses before writing anything."""

import pytest
import torch
from model_cases import SMALL, one_thread, random_model  # noqa: F401

from rwkv_ext import cli
from rwkv_ext.models import RWKV


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = random_model(SMALL["finch"])
    model.save_pretrained("in.pth", torch.float32)
    return model


def assert_holds(path, model, dtype):
    loaded = RWKV.from_pretrained(path)
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert q.dtype == dtype and torch.equal(p.to(dtype), q), name


def test_report_and_result(model, capsys):
    assert cli.main(["convert", "in.pth", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = f"{model.parameter_count():,}"
    assert lines[0] == "read   in.pth: .pth, official names, float32"
    assert lines[1] == (
        "model  Finch (6.0), 2 layers of width 64, 4 heads of 16, channel mix 224, ranks 8 and 16, vocabulary 41: "
        f"{count} parameters"
    )
    assert lines[2].startswith("wrote  out: Hugging Face names, each tensor in its own dtype, 1 file, 0.001 GB")
    assert len(lines) == 3
    assert_holds("out", model, torch.float32)

    assert cli.main(["convert", "out", "fla", "--format", "fla", "--dtype", "bfloat16", "--shard-gb", "0.0001"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "read   out: folder with model.safetensors, Hugging Face names, float32"
    assert "wrote  fla: flash-linear-attention names, bfloat16, " in lines[2] and " files, " in lines[2]
    assert lines[3].startswith("note   ") and "set g_norm.eps = 64e-5" in lines[3]
    assert_holds("fla", model, torch.bfloat16)

    assert cli.main(["convert", "fla", "back.pth"]) == 0
    assert " shards, flash-linear-attention names, bfloat16" in capsys.readouterr().out
    assert_holds("back.pth", model, torch.bfloat16)
    assert cli.main(["convert", "back.pth", "back.pth", "--dtype", "float32", "--overwrite"]) == 0  # over itself
    assert_holds("back.pth", model.to(torch.bfloat16), torch.float32)


def test_time_state_is_merged(model, capsys):
    model.enable_time_state()
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.normal_()
    model.save_time_state("state.pth", torch.float32)
    assert cli.main(["convert", "in.pth", "tuned.safetensors", "--time-state", "state.pth"]) == 0
    assert "vocabulary 41, tuned initial state: " in capsys.readouterr().out
    assert_holds("tuned.safetensors", model, torch.float32)
    with torch.no_grad():
        model.blocks[0].att.time_state.zero_()
    model.save_time_state("other.pth", torch.float32)
    assert (
        cli.main(["convert", "tuned.safetensors", "tuned.safetensors", "--overwrite", "--time-state", "other.pth"]) == 0
    )
    assert_holds("tuned.safetensors", model, torch.float32)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.pth", "out"], "missing.pth does not exist; give the path"),
        (["in.pth", "in.pth"], "in.pth exists; choose another OUT, or give --overwrite to replace it"),
        (["in.pth", "out.pth", "--format", "hf"], "path must name a folder for format hf, got out.pth"),
        (["in.pth", "out", "--shard-gb", "0"], "--shard-gb must be more than 0, got 0"),
        (["in.pth", "out", "--shard-gb", "nan"], "--shard-gb must be more than 0, got nan"),
        (["in.pth", "out", "--time-state", "in.pth"], "must hold the tuned initial states of this model alone"),
    ],
)
def test_mistakes_end_in_a_sentence(model, arguments, message, capsys, tmp_path):
    assert cli.main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rwkv-ext convert: ") and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]
