"""benchmarks/bench_decode.py: what it prints, and that a wrong result prints no time."""

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_decode
from memory_read import MemoryRead

TINY = ["--size", "tiny", "--threads", "1", "--repeats", "1", "--megabytes", "1", "--kinds"]


@pytest.fixture(autouse=True)
def package_without_jit(monkeypatch):
    """As test_parity.py wants it, whichever imports the package first; and it starts in a moment."""
    monkeypatch.setenv("RWKV_JIT_ON", "0")


def test_bench_decode_report(tmp_path, capsys):
    bench_decode.main([*TINY, "fp32", "int8", "--version", "eagle", "--output", str(tmp_path / "report.md")])
    report = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out.strip() == report.strip()
    rows = [line for line in report.splitlines() if line.startswith("| tiny | eagle")]
    assert [row.split(" | ")[2] for row in rows] == ["fp32", "int8"]
    assert all(re.search(r"\| \d+\.\d\d \| \d+\.\d \| .* \| \d+ % \| ", row) for row in rows)


def test_bench_decode_prints_no_time_for_a_wrong_result(monkeypatch, capsys):
    step = bench_decode.RWKV.step
    monkeypatch.setattr(bench_decode.RWKV, "step", lambda *given: step(*given) * 1.01)
    with pytest.raises(SystemExit, match=r"bench_decode: fp32: the step errs by 0.01, more than .*: no times"):
        bench_decode.main([*TINY, "fp32"])
    assert "|" not in capsys.readouterr().out


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_read_reads_all_of_it(threads):
    read = MemoryRead(1, threads)
    assert 2**20 - 1024 <= read.bytes <= 2**20
    read()
    read._buffer[-1] = torch.tensor(2)
    with pytest.raises(RuntimeError, match=f"MemoryRead: the sum must be {read.bytes // 8}, got {read.bytes // 8 + 1}"):
        read()
