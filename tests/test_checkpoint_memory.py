"""Loading takes the model and one tensor more, saving one tensor: peaks of a process's memory, file pages included."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rwkv_ext.checkpoint import files, pth
from rwkv_ext.checkpoint.tensors import MappedTensors

ROOT = Path(__file__).parent.parent

# Two of its tensors have 34 MB in fp32, far more than the allocator's noise, and are a third of the model each.
MEASURE = """
import gc, json, sys
import torch
from rwkv_ext.checkpoint import files
from rwkv_ext.models import RWKV, RWKVConfig

folder, results = sys.argv[1], []
torch.set_num_threads(1)


def bytes_of(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field + ":"))


def peak(what, allowed, action):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from here
    before = bytes_of("VmRSS")
    kept = action()
    results.append((what, bytes_of("VmHWM") - before, allowed))


def small(size=32, vocabulary=9):
    with torch.device("meta"):
        model = RWKV(RWKVConfig(n_layer=1, n_embd=size, head_size=16, vocab_size=vocabulary))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)  # every page of it is there
    return model


forms = {"pth": "m.pth", "hf": "hf", "fla": "fla"}  # safetensors: what hf folders consist of
for form, name in forms.items():  # imports and caches, before anything counts
    small().save_pretrained(f"{folder}/small-{name}", format=form)
    RWKV.from_pretrained(f"{folder}/small-{name}")
model = small(256, 32768)
total, largest = sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters())
assert largest == 4 * 32768 * 256 and largest > 0.3 * total
one = 1.1 * largest  # in fp32; half of that in bfloat16
for form, name in forms.items():
    path = f"{folder}/{name}"
    peak(f"save {form}", one / 2, lambda: model.save_pretrained(path, None, form, 20_000_000))
    peak(f"load {form}", total / 2 + one / 2, lambda: RWKV.from_pretrained(path))
    peak(f"load {form} as fp32", total + one / 2, lambda: RWKV.from_pretrained(path, dtype=torch.float32))


def convert():
    config, tensors, *_ = files.read(f"{folder}/fla")
    files.write(f"{folder}/wide.pth", config, tensors, torch.float32)


peak("convert", one / 2 + one, convert)  # a tensor's pages and its cast
peak("load fp32", total + one, lambda: RWKV.from_pretrained(f"{folder}/wide.pth"))
peak("load fp32 as bf16", total / 2 + one, lambda: RWKV.from_pretrained(f"{folder}/wide.pth", dtype=torch.bfloat16))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    # Every larger piece of memory is mapped for itself and given back when freed: else a heap kept from an earlier
    # measurement would hide what a later one takes.
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_no_second_model_in_memory(results):
    assert len(results) == 12
    for what, peak, allowed in results:
        assert peak <= allowed, f"{what}: {peak / 1e6:.1f} MB at the peak, {allowed / 1e6:.1f} MB allowed"
        assert peak >= 0.8 * allowed, f"{what}: {peak / 1e6:.1f} MB at the peak, not measured where it was taken"


def resident(x):
    """Return how many of the tensor's pages this process has (the kernel's own count, for the mapping it lies in)."""
    found = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                first, last = (int(word, 16) for word in line.split()[0].split("-"))
                found = first <= x.data_ptr() < last
            elif found and line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("the tensor lies in no mapping")


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_released_pages_leave_and_come_back(name, tmp_path):
    values = {"a": torch.randn(1 << 20), "b": torch.randn(1 << 20)}
    stored = {"m.pth": torch.save, "m.safetensors": save_file}[name]
    stored(values, tmp_path / "there")
    (tmp_path / name).symlink_to("there")  # as the caches of downloaded models have it
    tensors = files._open(tmp_path / name)[1]
    assert torch.equal(tensors["a"], values["a"]) and torch.equal(tensors["b"], values["b"])
    assert resident(tensors["a"]) >= 2 * values["a"].nbytes
    tensors.release("a")
    assert values["b"].nbytes - 65536 <= resident(tensors["a"]) < 1.1 * values["b"].nbytes
    assert torch.equal(tensors["a"], values["a"]) and torch.equal(tensors["b"], values["b"])


def test_memory_that_is_no_files_is_never_given_back(tmp_path):
    values = {"a": torch.randn(1 << 20)}
    torch.save(values, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    tensors = pth.load(tmp_path / "old.pth")  # such files are read, not mapped
    tensors.release("a")
    assert torch.equal(tensors["a"], values["a"])
    claimed = MappedTensors({"a": values["a"].clone()}, [tmp_path / "old.pth"])
    claimed.release("a")
    assert torch.equal(claimed["a"], values["a"])
