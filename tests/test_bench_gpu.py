"""The GPU benchmark's harness at toy sizes on the CPU: what it checks, counts and writes."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench_gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_gpu

    return bench_gpu


@pytest.fixture
def run(bench_gpu, tmp_path, capsys):
    def run(*arguments):
        status = bench_gpu.main(["--device", "cpu", "--toy", "--output", str(tmp_path), *arguments])
        (report,) = tmp_path.glob("*_wkv.md")
        assert capsys.readouterr().out.strip() == report.read_text().strip()
        return status, report.read_text()

    return run


def section(report, title):
    """The lines of one table, without its head."""
    part = report.split(f"## {title}")[1].split("\n## ")[0]
    return [line for line in part.splitlines() if line.startswith("| ")][2:]


def test_bench_gpu_report(run, tmp_path):
    status, report = run()
    assert status == 0 and "Wrong results" not in report and "Failed" not in report
    cases = section(report, "The ops")
    assert len(cases) == 10 and all(line.count(" .. ") == 3 and " % " in line for line in cases)
    compared = section(report, "Beside others")
    assert any("PyTorch loop" in line for line in compared) and any("SDPA" in line for line in compared)
    assert len(section(report, "Decoding")) == 4
    assert len(section(report, "Time and memory")) == 3 * 4
    assert "flash-linear-attention: RuntimeError: its Triton kernels need a GPU" in report
    targets = section(report, "Targets")
    assert len(targets) == 6 and all(line.endswith("|  |  |") for line in targets)  # toy times are no measurement
    pictures = [tmp_path / line.split("(")[1][:-1] for line in report.splitlines() if line.startswith("![")]
    assert len(pictures) == 2 and all(picture.stat().st_size > 5000 for picture in pictures)


def test_bench_gpu_prints_no_time_for_a_wrong_result(run, bench_gpu, monkeypatch):
    import gpu_check

    def wrong(*arguments):
        y, state = torch.ops.rwkv_ext.wkv6_forward(*arguments, torch.is_grad_enabled())[:2]
        return y * (1.02 if y.dtype == torch.bfloat16 else 1), state

    monkeypatch.setitem(gpu_check.OPS, "6.0", wrong)
    status, report = run("--only", "cases", "peers")
    assert status == 1
    lines = {line.split(" | ")[0].strip("| "): line for line in section(report, "The ops")}
    assert " .. " not in lines["main"] and " .. " not in lines["N 128"]
    assert " .. " in lines["Eagle"] and " .. " in lines["fp32"]
    assert "- main, B2 T160 H2 N64: y 2." in report
    assert not any("| rwkv_ext |" in line for line in section(report, "Beside others"))


def test_bench_gpu_refuses_a_wrong_truth(bench_gpu, monkeypatch):
    import gpu_check

    op = gpu_check.OPS["6.0"]
    monkeypatch.setitem(gpu_check.OPS, "6.0", lambda *x: (op(*x)[0] * (1 + 1e-9), None))
    inputs = bench_gpu.MAIN.toy().make(torch.device("cpu"))
    with pytest.raises(SystemExit, match="the fp64 op itself is wrong: error 1.0e-09"):
        gpu_check.Expected("6.0", inputs, inputs.r)


def test_bench_gpu_a_failing_peer_does_not_end_the_run(run, bench_gpu, monkeypatch):
    import gpu_peers

    def fails(case, inputs, dy):
        raise RuntimeError("no such kernel image\nmore lines")

    peer = gpu_peers.Peer("broken", fails, lambda case: "")
    monkeypatch.setattr(bench_gpu, "find_peers", lambda *_: ([peer], []))
    status, report = run("--only", "peers")
    assert status == 0 and "- broken, B2 T160 H2 N64: RuntimeError: no such kernel image\n" in report


def test_bench_gpu_stops_in_time(run):
    status, report = run("--minutes", "0")
    assert status == 0 and not section(report, "The ops") and "## Failed or left out\n\n- main\n" in report


def test_bench_gpu_upstream_without_sources(run, tmp_path):
    _, report = run("--only", "decode", "--upstream", str(tmp_path))
    assert "RWKV-LM's kernels: FileNotFoundError" in report and "give a checkout of RWKV-LM" in report


def test_bench_gpu_counts_bytes(bench_gpu):
    """134 million token-channels in bf16: 10, 13 and 18 bytes each; Eagle has no stream of decays."""
    import gpu_cases

    for case in (gpu_cases.MAIN, gpu_cases.LONG):
        assert case.token_channels == 2**27
        assert [case.bytes(x) / 2**27 for x in ("forward", "saving", "backward")] == [10, 13, 18]
    eagle = next(case for case in gpu_cases.CASES if case.name == "Eagle")
    assert [eagle.bytes(x) / 2**27 for x in ("forward", "saving", "backward")] == [8, 11, 14]
    packed = next(case for case in gpu_cases.CASES if case.lengths)
    assert sum(packed.lengths) == packed.tokens and max(packed.lengths) > 3 * min(packed.lengths)


def test_bench_gpu_needs_a_gpu(bench_gpu, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench_gpu.main(["--device", "cuda"]) == 1
    assert "no CUDA device; --device cpu --toy runs the harness itself" in capsys.readouterr().err
