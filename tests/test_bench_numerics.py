"""The comparison of algorithms: every way computes the same function, and errors are told as they are."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_ext import reference
from rwkv_ext.testing import assert_close_ratio, error_ratio, make_inputs, outputs_and_gradients

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def ways(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import numerics_ways

    return numerics_ways


def test_bench_numerics_ways_agree(ways):
    """On harmless decays all are the same function, over several chunks of 64 and a rest."""
    inputs = make_inputs("6.0", 1, 150, 2, 16)
    exact = outputs_and_gradients(reference.wkv6, inputs.double())
    for way in ways.ways(None, False):
        assert_close_ratio(way.run(inputs), exact, floor=1e-5)


def test_bench_numerics_cumulative_sums_cancel(ways):
    """What the table shows: the log-cumsum form's dw loses its digits where the decay is strong, and inf breaks it."""
    inputs = make_inputs("6.0", 1, 150, 1, 32, regime="mixed")
    strong = -torch.exp(inputs.w.double()) < -12
    exact = outputs_and_gradients(reference.wkv6, inputs.double())["dw"][strong]
    errors = {way.name: error_ratio(way.run(inputs)["dw"][strong], exact) for way in ways.ways(None, False)}
    assert errors["rwkv_ext, CPU"] < 2e-6 and errors["log-cumsum form"] > 1e-3
    huge = make_inputs("6.0", 1, 150, 1, 32, regime="huge")
    assert ways.log_cumsum(*huge)[0].isnan().any()


def test_bench_numerics_cotangents_are_the_same_for_all(ways):
    """What another environment is handed is what outputs_and_gradients uses here."""
    inputs, kept = make_inputs("6.0", 1, 20, 1, 4), {}
    expected = outputs_and_gradients(reference.wkv6, inputs)
    outputs_and_gradients(lambda *x: ways.keep_cotangents(kept, *reference.wkv6(*x)), inputs)
    leaves = [x.clone().requires_grad_() for x in inputs[:6]]
    gradients = torch.autograd.grad(reference.wkv6(*leaves), leaves, (kept["dy"], kept["dstate_out"]))
    for name, x in zip(("dr", "dk", "dv", "dw", "du", "dstate"), gradients, strict=True):
        assert torch.equal(x, expected[name])


def test_bench_numerics_tables(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_numerics

    monkeypatch.setattr(bench_numerics, "SHAPE", dict(batch=1, tokens=70, heads=1, size=64))
    monkeypatch.setattr(sys, "argv", ["bench_numerics.py", "--compare", "--regimes", "mixed", "huge"])
    bench_numerics.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| mixed |") for line in lines) == 3
    assert [line for line in lines if line.startswith("| huge | log-cumsum form | fp32 | NaN (")]
    assert sum(line.startswith("| rwkv_ext, CPU | fp32 |") for line in lines) == 3  # of y, of dw, of dw by decay
    monkeypatch.setattr(sys, "argv", ["bench_numerics.py", "--emulated"])
    with pytest.raises(SystemExit, match="--emulated and --fla-python belong to --compare"):
        bench_numerics.main()
    monkeypatch.setattr(sys, "argv", ["bench_numerics.py", "--write", "--regimes", "huge"])
    with pytest.raises(SystemExit, match="--write needs all regimes and is not for --compare"):
        bench_numerics.main()


def test_bench_numerics_writes_the_page(monkeypatch, tmp_path, capsys):
    """All dtypes between the marks, the CPU's rows of the other tables replaced, everything else as it was."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_numerics

    for folder in ("docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    before = (BENCHMARKS.parent / "docs" / "numerics.md").read_text()
    (tmp_path / "docs" / "numerics.md").write_text(before)
    monkeypatch.setattr(bench_numerics, "ROOT", tmp_path)
    monkeypatch.setattr(bench_numerics, "SHAPE", dict(batch=1, tokens=20, heads=2, size=32))
    monkeypatch.setattr(sys, "argv", ["bench_numerics.py", "--write"])
    bench_numerics.main()
    after, printed = (tmp_path / "docs" / "numerics.md").read_text(), capsys.readouterr().out
    begin, end = (after.index(mark) for mark in bench_numerics.BLOCK)
    block = after[begin:end]
    assert block.split("-->")[1].strip() in printed
    assert (tmp_path / "docs" / "numerics.png").stat().st_size > 10_000
    (report,) = (tmp_path / "benchmarks" / "results").glob("cpu_numerics_*.md")
    assert "- commit: " in report.read_text() and block.split("-->")[1].strip() in report.read_text()
    for dtype in ("fp64", "fp32", "bf16", "fp16"):
        table = block[block.index(f"| Finch, {dtype} |") :].split("\n\n")[0].splitlines()
        assert len(table) == 2 + 6 * (2 if dtype == "fp64" else 3)
        assert all(line.count("|") == 11 for line in table)

    def others(text):
        """What is not the CPU's: outside of the marks and its three rows in each of three tables."""
        begin, end = (text.index(mark) for mark in bench_numerics.BLOCK)
        lines = (text[:begin] + text[end:]).splitlines()
        ways = ("| rwkv_ext, CPU |", "| PyTorch loop |", "| log-cumsum form |")
        return [line for line in lines if not line.startswith(ways)], len(lines)

    assert others(after) == others(before)
    rows = [line for line in after[end:].splitlines() if line.startswith("| rwkv_ext, CPU | fp32 |")]
    assert len(rows) == 3 and not set(rows) & set(before.splitlines())


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="flash-linear-attention is installed here")
def test_bench_numerics_says_how_to_install_fla():
    program = BENCHMARKS / "fla_interpreter.py"
    result = subprocess.run([sys.executable, program, "in", "out"], capture_output=True, text=True)
    assert result.returncode == 1 and "pip install --no-deps fla-core==0.6.0 triton" in result.stderr
