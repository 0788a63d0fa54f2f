"""Weights are loaded into memory that the system is asked to give in large pages; where it has none, as elsewhere."""

from pathlib import Path

import pytest
import torch

from rwkv_ext import RWKV, RWKVConfig
from rwkv_ext.checkpoint import large_pages

HAS_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage").exists()
ROWS, COLUMNS = 1 << 13, 128  # 4 MiB in fp32


def is_advised(x: torch.Tensor) -> bool:
    """Whether the system knows of the wish for the middle of x."""
    middle, inside = x.data_ptr() + x.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, *rest = line.split()
        if not field.endswith(":"):
            start, end = (int(address, 16) for address in field.split("-"))
            inside = start <= middle < end
        elif inside and field == "VmFlags:":
            return "hg" in rest
    raise AssertionError("x must lie in the process's memory")


@pytest.mark.parametrize("advice", [large_pages._ADVICE, None, 9999], ids=["as it is", "not Linux", "refused"])
def test_copy_in_large_pages(advice, monkeypatch):
    monkeypatch.setattr(large_pages, "_ADVICE", advice)
    matrix = torch.randn(COLUMNS, ROWS)
    for x in (matrix.T, matrix[3, 5:6], matrix[:0]):
        for dtype in (torch.float32, torch.bfloat16):
            copy = large_pages.copy_in_large_pages(x, dtype)
            assert copy.is_contiguous() and copy.dtype == dtype and torch.equal(copy, x.to(dtype))
            assert not x.numel() or copy.data_ptr() != x.data_ptr()


@pytest.mark.skipif(not HAS_LARGE_PAGES, reason="this kernel has no large pages to ask for")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_loaded_weights_ask_for_large_pages(tmp_path, quantize):
    config = RWKVConfig(version="6.0", n_layer=1, n_embd=COLUMNS, head_size=64, vocab_size=4 * ROWS)
    RWKV(config).save_pretrained(tmp_path / "model.pth", torch.float32)
    model = RWKV.from_pretrained(tmp_path / "model.pth", quantize=quantize)
    assert is_advised(model.emb.weight) and is_advised(model.head.weight)
    assert not is_advised(torch.ones(ROWS * COLUMNS * 16))  # 64 MiB: a mapping of its own


def test_the_copy_is_on_the_cpu_whatever_the_default_device():
    x = torch.arange(6.0)
    with torch.device("meta"):
        copy = large_pages.copy_in_large_pages(x, torch.float32)
    assert copy.is_cpu and copy.tolist() == x.tolist()
