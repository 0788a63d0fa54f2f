"""Checkpoints: bit-exact resume after a kill or Ctrl-C, refusals, damaged folders, full disks."""

import json
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
from tiny_run import TinyRun

import train.checkpoint
from train.metrics import read_log


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 12 steps that nothing interrupted, with checkpoints at 6 and 12."""
    run = TinyRun(tmp_path_factory.mktemp("whole"))
    assert run.run() == 0
    return run


def same_result(a: TinyRun, b: TinyRun) -> None:
    assert a.losses() == b.losses() and a.validations() == b.validations()
    one, other = a.weights(), b.weights()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moments(run: TinyRun, step: int) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(run.output / f"step_{step}", run.folder / "moments.pt")
    return torch.load(run.folder / "moments.pt")


def test_train_resume_is_bit_exact(whole, tmp_path, capsys):
    run = TinyRun(tmp_path)
    whole.copy_checkpoint(6, run)
    assert run.run() == 0
    assert "step_6: step 6, 1,536 tokens" in capsys.readouterr().out
    same_result(run, whole)
    one, other = moments(run, 12), moments(whole, 12)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {name.rsplit(".", 1)[1] for name in one if name.startswith("optim.")} == {"step", "exp_avg", "exp_avg_sq"}
    events = [json.loads(line) for line in (run.output / "log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if "event" in e] == ["start", "resume"]


def test_train_checkpoint_folder(whole):
    step = whole.output / "step_12"
    assert {path.name for path in step.iterdir()} == {"__0_0.distcp", ".metadata", "config.toml", "state.json", "DONE"}
    state = json.loads((step / "state.json").read_text())
    assert state["progress"] == {
        "step": 12, "tokens": 3072, "next_sample": 96, "total_tokens": 3072, "dtype": "fp32",
        "limits": [0.0, 3072], "seconds": state["progress"]["seconds"],
    }  # fmt: skip
    assert state["ranks"] == 1 and state["threads"] == 1
    assert (step / "config.toml").read_text() == whole.path.read_text()


def test_train_finished_run_does_nothing_more(whole, capsys):
    before = whole.losses()
    assert whole.run() == 0
    assert "finished: 12 steps" in capsys.readouterr().out and whole.losses() == before


def test_train_keeps_the_newest(tmp_path):
    run = TinyRun(tmp_path, checkpoint={"every": 2, "keep": 2})
    assert run.run() == 0
    assert sorted(path.name for path in run.output.iterdir() if path.is_dir()) == ["step_10", "step_12"]


def test_train_incomplete_folder_is_ignored(whole, tmp_path):
    """Without DONE a folder does not count, and what an interrupted save left is cleared away."""
    run = TinyRun(tmp_path)
    whole.copy_checkpoint(6, run)
    shutil.copytree(run.output / "step_6", run.output / "step_9")
    (run.output / "step_9" / "DONE").unlink()
    (run.output / ".step_9.partial").mkdir()
    assert run.run() == 0
    same_result(run, whole)
    assert not list(run.output.glob(".step_*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.ctx_len=16", r"resume: data.ctx_len must be 32 as in .*step_6, got 16; restore it, or set"),
        ("data.prime=5", r"resume: data.prime must be 359 as in .*step_6, got 5"),
        ("data.mode=packed", r"resume: data.mode must be 'stream' as in .*step_6, got 'packed'"),
        ("data.train=held_out", r"resume: data.prime must be 359 as in"),
        ("model.n_layer=3", r"resume: model.n_layer must be 2 as in .*step_6, got 3"),
        ("model.n_embd=64", r"resume: model.n_embd must be 32 as in .*step_6, got 64"),
        ("checkpoint.resume=false", r"checkpoint.folder must not hold a checkpoint when checkpoint.resume is false"),
    ],
)
def test_train_resume_refuses_another_run(whole, tmp_path, monkeypatch, change, message):
    run = TinyRun(tmp_path)
    whole.copy_checkpoint(6, run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run.run("--traceback", "--set", change)
    if not change.startswith("checkpoint."):  # --dry-run compares with the newest checkpoint as well
        with pytest.raises(ValueError, match=message):
            run.run("--traceback", "--dry-run", "--set", change)


def test_train_resume_refuses_an_order_of_older_versions(whole, tmp_path, capsys):
    run = TinyRun(tmp_path)
    whole.copy_checkpoint(6, run)
    path, done = (run.output / "step_6" / name for name in ("state.json", "DONE"))
    state, sizes = json.loads(path.read_text()), json.loads(done.read_text())
    del state["identity"]["data.weights (the order of samples)"]
    path.write_text(json.dumps(state, indent=1))
    sizes["bytes"]["state.json"] = path.stat().st_size
    done.write_text(json.dumps(sizes))
    assert run.run() == 1
    error = capsys.readouterr().err
    assert "step_6 does not say its data.weights (the order of samples): an older version saved it, whose" in error
    assert "finish that run with the version that began it, or set checkpoint.folder to a new folder" in error


def test_train_resume_knows_merged_shards(whole, tmp_path):
    """The run that stood on one shard goes on from that shard's parts, in a folder."""
    from rwkv_ext.data.shards import split_evenly

    run = TinyRun(tmp_path)
    whole.copy_checkpoint(6, run)
    split_evenly(tmp_path / "train", tmp_path / "parts" / "part", 5)
    assert run.run("--set", f"data.train={tmp_path / 'parts'}") == 0
    same_result(run, whole)


def test_train_resume_tells_what_changes_without_harm(whole, tmp_path, capsys):
    run = TinyRun(tmp_path)
    whole.copy_checkpoint(6, run)
    assert run.run("--dry-run") == 0
    assert f"would go on from {run.output / 'step_6'}" in capsys.readouterr().out
    assert run.run("--set", "train.dtype=bf16") == 0
    assert "train.dtype is bf16 now, not fp32: the losses will differ a little" in capsys.readouterr().out


def test_train_resume_refuses_other_data_of_the_same_size(whole, tmp_path):
    from tiny_run import write_shard

    run = TinyRun(tmp_path)
    whole.copy_checkpoint(6, run)
    for name in ("train.bin", "train.idx"):
        (tmp_path / name).unlink()
    write_shard(tmp_path / "train", seed=7)
    with pytest.raises(ValueError, match=r"resume: data.train \(its fingerprint\) must be '[0-9a-f]{64}' as in"):
        run.run("--traceback")


def test_train_resume_refuses_a_damaged_checkpoint(whole, tmp_path):
    run = TinyRun(tmp_path)
    whole.copy_checkpoint(6, run)
    weights = run.output / "step_6" / "__0_0.distcp"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"must have {size} bytes, got {size - 1}; the checkpoint is damaged: remove"):
        run.run("--traceback")
    weights.unlink()
    with pytest.raises(ValueError, match=rf"must have {size} bytes, got no file; the checkpoint is damaged"):
        run.run("--traceback")


def test_train_longer_run_goes_on(whole, tmp_path, capsys):
    run = TinyRun(tmp_path, train={"tokens": 256 * 14, "threads": 2})
    whole.copy_checkpoint(12, run)
    assert run.run() == 0
    output = capsys.readouterr().out
    assert "the run ends at 3,584 tokens now, not 3,072" in output
    assert "saved with 1 ranks x 1 threads" in output
    assert run.losses()[:12] == whole.losses() and len(run.losses()) == 14


def test_train_other_time_limit_goes_on(tmp_path, capsys):
    """A finished run with a time limit goes on when the limits grow, and only then."""
    limits = {"minutes": 60.0, "tokens": 256 * 3}
    assert TinyRun(tmp_path, train=limits).run("--set", "train.minutes=0") == 0
    run = TinyRun(tmp_path, train=limits)
    assert run.run() == 0 and len(run.losses()) == 3
    assert "the run has 60 minutes in all now" in capsys.readouterr().out
    assert run.run("--set", "train.tokens=5888") == 0 and len(run.losses()) == 23
    assert run.run("--set", "train.tokens=5888") == 0 and len(run.losses()) == 23
    assert run.run("--set", "train.tokens=9999", "--set", "train.minutes=0.0001") == 0 and len(run.losses()) == 23
    assert "finished: 23 steps" in capsys.readouterr().out


def test_train_disk_full_while_saving(whole, tmp_path, capsys):
    """The kernel refuses a file above 100 kB: training goes on, the end is an error with advice, step_6 is intact."""
    run = TinyRun(tmp_path, checkpoint={"every": 3})
    whole.copy_checkpoint(6, run)
    before = {path.name: path.read_bytes() for path in (run.output / "step_6").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert run.run() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    captured = capsys.readouterr()
    assert "WARNING: checkpoint: " in captured.out and "step_9 could not be saved" in captured.out
    assert "error: checkpoint: " in captured.err and "step_12 could not be saved (" in captured.err
    assert "; step_6 is intact; free space on that disk, or move " in captured.err
    assert {path.name: path.read_bytes() for path in (run.output / "step_6").iterdir()} == before
    assert [path.name for path in run.output.iterdir() if "step_" in path.name] == ["step_6"]
    assert len(run.losses()) == 12
    assert run.run() == 0  # there is room again
    exported = run.weights()
    assert all(torch.equal(exported[name], tensor) for name, tensor in whole.weights().items())


def test_train_disk_too_small_is_seen_before_writing(tmp_path, monkeypatch, capsys):
    run = TinyRun(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(train.checkpoint.shutil, "disk_usage", lambda path: usage)
    assert run.run() == 1
    error = capsys.readouterr().err
    assert "GB needed, 0.00 GB free); there is no earlier checkpoint; free space on that disk" in error
    assert not list(run.output.glob("*step_*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_train_interrupted_process_goes_on_bit_for_bit(number, whole, tmp_path):
    """Ctrl-C saves and exits with 0; after kill -9 the run goes on from the last checkpoint."""
    run = TinyRun(tmp_path, train={"tokens": 256 * 4000}, checkpoint={"every": 3}, log={"validate_every": 0})
    process = run.start()
    try:
        wait_for_step(run, process, 4)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 0, output
        assert "Stopping: the checkpoint is saved after this step. Ctrl-C again quits at once." in output
        assert "run the same command again to go on from there" in output
        assert len(run.losses()) == newest_step(run)
    saved = newest_step(run)
    assert saved >= 3
    steps = saved + 3
    assert run.run("--set", f"train.tokens={256 * steps}") == 0
    resumed = [r for r in read_log(run.output / "log.jsonl") if "loss" in r]
    reference = TinyRun(tmp_path, train={"tokens": 256 * 4000}, checkpoint={"folder": str(tmp_path / "reference")},
                        log={"validate_every": 0})  # fmt: skip
    # The first part has the long run's cosine, the rest the short one's: do the same without the interruption.
    stop_after(reference, saved)
    assert reference.run("--set", f"train.tokens={256 * steps}") == 0
    expected = [r for r in read_log(reference.output / "log.jsonl") if "loss" in r]
    keys = ("step", "loss", "lr", "grad_norm")
    assert [[r[k] for k in keys] for r in resumed] == [[r[k] for k in keys] for r in expected]
    assert all(torch.equal(reference.weights()[name], tensor) for name, tensor in run.weights().items())


def newest_step(run: TinyRun) -> int:
    return max(int(path.name[5:]) for path in run.output.glob("step_*") if (path / "DONE").exists())


def stop_after(run: TinyRun, steps: int) -> None:
    """Run exactly `steps` steps of the long schedule by a request at that step, through the real save."""
    import train.loop

    original = train.loop.train_step

    def stopping(*arguments):
        *rest, signal_ = arguments
        return original(*rest, lambda: float(arguments[3] == steps))

    train.loop.train_step = stopping
    try:
        assert run.run() == 0
    finally:
        train.loop.train_step = original


def wait_for_step(run: TinyRun, process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        log = run.output / "log.jsonl"
        if log.exists() and sum('"loss"' in line for line in log.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not reach its first steps")
