"""benchmarks/bench_data.py on a few megabytes: its report has its rows; a way that reads something else stops it."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_data

from train.data import make_batch

TINY = ["--rounds", "1", "--seconds", "0.001", "--samples", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "shards"
    bench_data.main([str(path), "--prepare", "--gigabytes", "0.0064", "--shards", "8"])
    return path


def test_bench_data_report(folder, tmp_path, capsys):
    bench_data.main([str(folder), *TINY, "--output", str(tmp_path / "report.md")])
    report = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out.strip().endswith(report.strip())
    warm = re.findall(r"^\| (\d+) \| (\d+) \| ", report, re.M)
    assert warm == [("512", "16"), ("512", "128"), ("4096", "8"), ("4096", "32")]
    assert re.findall(r"^\| \d+ \| ([a-z ]+) \| \d", report, re.M) == ["ours", "many shards", "memmap loop"] * 2
    assert "0.0064 GB of random uint16 tokens as one shard, and the same as 8 shards" in report


def test_bench_data_stops_at_wrong_batches(folder, monkeypatch):
    def wrong(windows, *rest):
        windows[-1, -1] ^= 1  # the last target
        return make_batch(windows, *rest)

    monkeypatch.setattr(bench_data, "make_batch", wrong)
    with pytest.raises(SystemExit, match="ours: not the batches of the memmap loop"):
        bench_data.main([str(folder), *TINY])
