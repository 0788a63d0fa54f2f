"""Several ranks under torchrun with gloo: the same result as one rank, and no rank waits for one that failed."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from tiny_run import TinyRun

from train.config import TrainTable
from train.distributed import BUCKET_ELEMENTS, _buckets, start_ranks

pytestmark = pytest.mark.dist

# A step of AdamW moves a weight by the rate whatever the gradient's size: with eps 1e-18 the rounding of a gradient
# that is zero otherwise decides where to. A larger eps keeps a difference of 1e-6 that small.
COMPARABLE = {"optim": {"eps": 1e-4, "lr": 1e-3}, "train": {"tokens": 8 * 32 * 8}}


def finish(processes: list[subprocess.Popen], seconds: float = 120) -> list[str]:
    """Wait for processes and return their output; end them and fail if one hangs."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        raise AssertionError("the ranks hang:\n" + "\n".join(p.communicate()[0] for p in processes)) from None


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    run = TinyRun(tmp_path_factory.mktemp("one"), **COMPARABLE)
    assert run.run() == 0
    return run


@pytest.mark.parametrize("sharding", ["replicate", "fsdp"])
def test_distributed_two_ranks_equal_one(sharding, one_rank, tmp_path, capsys):
    """Same losses and weights in fp32 at the same global batch; one rank goes on from the two ranks' checkpoint."""
    changes = {"optim": COMPARABLE["optim"], "train": COMPARABLE["train"] | {"sharding": sharding}}
    run = TinyRun(tmp_path, **changes)
    processes = [run.start(ranks=2)] if sharding == "replicate" else run.start_ranks()
    output = "".join(finish(processes))
    assert all(process.returncode == 0 for process in processes), output
    assert "micro-batch 2 x 2 ranks x 2 passes" in output
    np.testing.assert_allclose(run.losses(), one_rank.losses(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(run.grad_norms(), one_rank.grad_norms(), rtol=1e-5)
    np.testing.assert_allclose(run.validations(), one_rank.validations(), rtol=0, atol=1e-6)
    one, two = one_rank.weights(), run.weights()
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)

    shorter = TinyRun(tmp_path / "resumed", **changes)
    run.copy_checkpoint(6, shorter)
    (shorter.folder / "train.bin").write_bytes((run.folder / "train.bin").read_bytes())
    assert shorter.run() == 0
    assert "saved with 2 ranks x 1 threads" in capsys.readouterr().out
    np.testing.assert_allclose(shorter.losses(), one_rank.losses(), rtol=0, atol=1e-6)
    assert len(shorter.losses()) == 8


FAIL_IN_DATA = """
import train.data
real = train.data.TrainingData._read
def read(self, first):
    if self._ranks.rank == 1 and first == 16:
        raise ValueError('rank 1 cannot read sample 17')
    return real(self, first)
train.data.TrainingData._read = read
"""
FAIL_ON_DISK = """
import os, resource
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, -1))
"""


@pytest.mark.parametrize(
    ("patch", "first", "second"),
    [
        (FAIL_IN_DATA, "error: another rank ended; its message says", "[rank 1] error: rank 1 cannot read sample 17"),
        (FAIL_ON_DISK, "error: checkpoint: ", "[rank 1] error: checkpoint: "),
    ],
    ids=["data", "disk"],
)
def test_distributed_one_rank_fails(patch, first, second, tmp_path):
    """The other one ends as well, by itself and soon, and nothing half-written stays."""
    run = TinyRun(tmp_path, train={"tokens": 256 * 4}, data={"validation": []})
    script = tmp_path / "failing.py"
    script.write_text(patch + "import sys\nfrom train.pretrain import main\nsys.exit(main(sys.argv[1:]))\n")
    processes = run.start_ranks(script)
    outputs = finish(processes, seconds=60)
    assert [process.returncode for process in processes] == [1, 1], outputs
    assert first in outputs[0] and second in outputs[1], outputs
    if patch is FAIL_ON_DISK:
        assert all("step_4 could not be saved (" in output for output in outputs)
    assert not list(run.output.glob("*step_*"))


def test_distributed_interrupt_reaches_all_ranks(tmp_path):
    """SIGTERM to torchrun, and from it to the ranks: all stop after the same step with a complete checkpoint."""
    run = TinyRun(tmp_path, train={"tokens": 256 * 100_000}, log={"validate_every": 0}, checkpoint={"every": 0})
    process = run.start(ranks=2)
    try:
        log, deadline = run.output / "log.jsonl", time.monotonic() + 90
        while not (log.exists() and len(run.losses()) >= 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
    finally:
        (output,) = finish([process])
    steps = len(run.losses())
    assert f"stopped after step {steps}; run the same command again" in output
    assert (run.output / f"step_{steps}" / "DONE").is_file()


def test_distributed_environment(monkeypatch):
    """threads = 0 divides the cores by the ranks of the machine; one rank needs no process group."""
    cores = len(os.sched_getaffinity(0))
    table = TrainTable(global_batch=1, micro_batch=1, tokens=1, device="cpu")
    ranks = start_ranks(table)
    assert (ranks.rank, ranks.size, ranks.threads, ranks.first) == (0, 1, cores, True)
    assert ranks.sum([1.5, 2.0]) == [1.5, 2.0] and ranks.from_first("x") == "x" and ranks.gather(3) == [3]
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert start_ranks(table).threads == 1
    ranks.raise_together(None)
    with pytest.raises(OSError, match="full"):
        ranks.raise_together(OSError("full"))


def test_distributed_buckets_cover_everything_once():
    big = BUCKET_ELEMENTS // 2 + 1
    with torch.device("meta"):
        parameters = [torch.nn.Parameter(torch.empty(n)) for n in (3, big, big, 3 * big, 5)]
    buckets = list(_buckets(parameters))
    assert [p.numel() for bucket in buckets for p in bucket] == [3, big, big, 3 * big, 5]
    assert [len(bucket) for bucket in buckets] == [2, 1, 1, 1]
    assert list(_buckets([])) == []
