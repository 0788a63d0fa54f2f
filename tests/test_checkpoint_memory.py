"""Loading takes the model and one tensor more, saving one tensor: peaks of a process's memory, file pages included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
