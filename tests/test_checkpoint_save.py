"""A failed save leaves the old checkpoint whole and nothing else behind; what is not a checkpoint is not replaced."""

from pathlib import Path

import pytest
import torch
from file_limits import largest_file
from model_cases import SMALL, one_thread, random_model  # noqa: F401


@pytest.fixture(scope="module")
def finch():
    return random_model(SMALL["finch"])


def content(path):
    return {p.name: p.read_bytes() for p in (path.iterdir() if path.is_dir() else [path])}


@pytest.mark.parametrize("name, form", [("m.pth", "pth"), ("m.safetensors", "safetensors"), ("m", "hf"), ("m", "fla")])
def test_a_failed_save_leaves_the_old_checkpoint(finch, name, form, tmp_path):
    path = tmp_path / name
    finch.save_pretrained(path, format=form)
    before = content(path)
    other = random_model(SMALL["finch"], seed=1)
    for limit in (100, 30_000, 200_000):
        message = rf"save_pretrained: {path} could not be written .*; free space or choose another path"
        with largest_file(limit), pytest.raises(OSError, match=message):
            other.save_pretrained(path, torch.float32, form)
    with torch.no_grad():
        other.blocks[1].ffn.value.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"must stay below 65504 to fit float16, got 1e\+06"):
        other.save_pretrained(path, torch.float16, form)
    assert content(path) == before
    assert [p.name for p in tmp_path.iterdir()] == [name]
    other.save_pretrained(path, torch.float32, form)
    assert content(path) != before
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(finch, failure, tmp_path, monkeypatch):
    finch.save_pretrained(tmp_path / "m")
    before, rename = content(tmp_path / "m"), Path.rename

    def only_aside(self, target):
        if self.name.endswith(".tmp"):
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", only_aside)
    words = r"save_pretrained: .*/m could not be written .Input/output error." if failure.args else None
    with pytest.raises(type(failure), match=words):
        finch.save_pretrained(tmp_path / "m", torch.float32)
    assert content(tmp_path / "m") == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_folders_with_anything_else_are_not_replaced(finch, tmp_path):
    finch.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("mine")
    before = content(tmp_path / "m")
    with pytest.raises(
        FileExistsError, match=r"m must hold nothing but what is to be replaced, has also README.md; ch"
    ):
        finch.save_pretrained(tmp_path / "m", torch.float32)
    assert content(tmp_path / "m") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match=r"file must be a folder or not exist, is a file; choose another path"):
        finch.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(OSError, match=r"save_pretrained: .*/nowhere/m could not be written .No such file"):
        finch.save_pretrained(tmp_path / "nowhere" / "m")


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m"])
def test_numbers_that_no_model_is_made_of(finch, name, tmp_path):
    with pytest.raises(ValueError, match=r"dtype must be float64, float32, float16 or bfloat16, got torch.int32 for "):
        finch.save_pretrained(tmp_path / name, torch.int32)
    assert not list(tmp_path.iterdir())
    finch.save_pretrained(tmp_path / name, torch.float64)
    loaded = type(finch).from_pretrained(tmp_path / name)
    assert loaded.emb.weight.dtype == torch.float64 and torch.equal(loaded.emb.weight, finch.emb.weight.double())


def test_a_linked_folder_stays_a_link(finch, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "m").symlink_to("there")
    finch.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m").is_symlink() and (tmp_path / "there" / "config.json").is_file()
