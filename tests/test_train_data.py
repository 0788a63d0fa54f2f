"""The trainer's data: reading ahead, whose samples are whose, held-out windows, errors of the thread, waiting."""

import threading
import time

import numpy as np
import pytest
import torch
from tiny_run import TinyRun, write_shard

from rwkv_ext.data.sampler import Sampler
from train.data import HeldOut, TrainingData, check_vocabulary, make_batch
from train.display import Reading
from train.distributed import Ranks

RANKS = Ranks(torch.device("cpu"))


@pytest.fixture
def data(tmp_path):
    opened = TrainingData(TinyRun(tmp_path, data={"prefetch": 3}).config, RANKS)
    yield opened
    opened.close()


def watch(data, monkeypatch, before=lambda indices: None):
    """Return the list of what the thread reads: the first sample of each step, after before(indices) let it pass."""
    steps, original = [], data.sampler.batch

    def batch(indices, dtype):
        assert threading.current_thread().name.startswith("batches")
        before(indices)
        steps.append(indices[0])
        return original(indices, dtype)

    monkeypatch.setattr(data.sampler, "batch", batch)
    return steps


def settle(steps, count):
    deadline = time.monotonic() + 20
    while len(steps) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)  # for what should not come
    return steps


def rows(batches):
    return torch.cat([batch.tokens for batch in batches]).numpy()


def test_steps_are_read_ahead(data, monkeypatch):
    steps = watch(data, monkeypatch)
    data.take(0)
    assert settle(steps, 4) == [0, 8, 16, 24]
    data.take(8)
    assert settle(steps, 5) == [0, 8, 16, 24, 32]
    expected = Sampler(data.sampler.stream, 32).batch(range(16, 24))
    np.testing.assert_array_equal(rows(data.take(16)), expected[:, :-1])


def test_another_place_is_read_anew(data):
    whole = Sampler(data.sampler.stream, 32)
    for first in (0, 800, 808, 0, 8, 0):
        np.testing.assert_array_equal(rows(data.take(first)), whole.batch(range(first, first + 8))[:, :-1])


def test_steps_that_nobody_will_take_are_not_read(data, monkeypatch):
    gate = threading.Semaphore(1)
    steps = watch(data, monkeypatch, lambda indices: gate.acquire())
    data.take(0)
    threading.Timer(0.1, gate.release, [100]).start()
    data.take(800)
    assert 800 in settle(steps, 5) and 16 not in steps and 24 not in steps


def test_errors_of_the_thread_reach_the_loop(data, monkeypatch):
    """At the step they belong to, not before, and the steps after it can still be read."""

    def break_the_third(indices):
        if indices[0] == 16:
            raise OSError("the disk is gone")

    watch(data, monkeypatch, break_the_third)
    data.take(0)
    data.take(8)
    with pytest.raises(OSError, match="the disk is gone"):
        data.take(16)
    np.testing.assert_array_equal(rows(data.take(24)), Sampler(data.sampler.stream, 32).batch(range(24, 32))[:, :-1])


def test_waiting_is_measured(data, monkeypatch):
    gate = threading.Semaphore(0)
    steps = watch(data, monkeypatch, lambda indices: gate.acquire())
    threading.Timer(0.3, gate.release, [100]).start()
    data.take(0)
    waited = data.waited
    settle(steps, 4)
    data.take(8)
    assert 0.1 < waited and data.waited < waited


def test_closing_leaves_no_thread(tmp_path):
    before = threading.active_count()
    data = TrainingData(TinyRun(tmp_path).config, RANKS)
    data.take(0)
    data.close()
    assert threading.active_count() == before


def test_the_log_and_the_line_say_what_was_waited_for(tmp_path):
    run = TinyRun(tmp_path, train={"tokens": 8 * 32 * 3})
    assert run.run() == 0
    waits = [record["data_wait"] for record in run.steps()]
    assert len(waits) == 3 and all(0 <= wait < 1 for wait in waits)
    reading = Reading(7, 700, 1000, 10, 2.5, 1e-3, 0.5, 1234.0, 0.31, 3661.0, 0.125)
    assert reading.line().endswith("left 1:01:01  waiting for data 12.5%")
    reading.data_wait = 0.009
    assert reading.line().endswith("left 1:01:01")


def test_held_out_windows_lie_evenly_over_all_shards(tmp_path):
    (tmp_path / "more").mkdir()
    for name, documents in (("a", 1), ("b", 3)):
        write_shard(tmp_path / "more" / name, seed=3, documents=documents)
    run = TinyRun(tmp_path, data={"validation": [str(tmp_path / "held_out"), str(tmp_path / "more")],
                                  "validation_windows": 10})  # fmt: skip
    held_out = HeldOut(run.config, RANKS)
    whole = Sampler([tmp_path / "held_out", tmp_path / "more"], 32).stream
    n_slots = (10 * 201 - 1) // 32
    starts = [i * n_slots // 10 * 32 for i in range(10)]
    found = np.concatenate([batch.tokens.numpy() for batch, _ in held_out.batches()])
    np.testing.assert_array_equal(found, [whole.read(start, 32) for start in starts])


@pytest.mark.parametrize("mode", ["stream", "packed"])
def test_batches_are_the_windows(mode):
    """Stream mode leaves rows alone; packed mode joins them and starts a sequence at each window and after each 0."""
    windows = np.random.default_rng(1).integers(0, 4, (5, 18))
    batch = make_batch(windows, mode, RANKS.device, range(31, 36))
    assert batch.samples == (31, 32, 33, 34, 35) and batch.tokens.is_contiguous() and batch.targets.is_contiguous()
    np.testing.assert_array_equal(batch.tokens.reshape(5, 17), windows[:, :-1])
    np.testing.assert_array_equal(batch.targets.reshape(5, 17), windows[:, 1:])
    if mode == "stream":
        assert batch.cu_seqlens is None and batch.tokens.shape == (5, 17)
        return
    ends = {0, 85} | {17 * row for row in range(5)} | {i + 1 for i, t in enumerate(batch.tokens[0].tolist()) if t == 0}
    assert batch.cu_seqlens.tolist() == sorted(ends) and batch.tokens.shape == (1, 85)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (2, 2), (4, 1)])
def test_train_samples_of_a_step(tmp_path, ranks, micro):
    """Every split takes samples 1-8, then 9-16, each once."""
    run = TinyRun(tmp_path, train={"micro_batch": micro})
    parts = [TrainingData(run.config, Ranks(RANKS.device, rank=rank, size=ranks)) for rank in range(ranks)]
    sampler = parts[0].sampler
    for first in (0, 8):
        batches = [batch for part in parts for batch in part.take(first)]
        assert sorted(n for batch in batches for n in batch.samples) == list(range(first + 1, first + 9))
        for batch in batches:
            expected = np.stack([sampler.sample(n - 1) for n in batch.samples])
            assert torch.equal(torch.cat((batch.tokens, batch.targets[:, -1:]), 1), torch.from_numpy(expected))
    for part in parts:
        part.close()


def test_train_held_out_windows_do_not_depend_on_ranks(tmp_path):
    run = TinyRun(tmp_path, data={"validation_windows": 7})
    found = {}
    for size in (1, 3):
        parts = [list(HeldOut(run.config, Ranks(RANKS.device, rank=rank, size=size)).batches()) for rank in range(size)]
        assert len({len(part) for part in parts}) == 1, "every rank runs the same number of forward passes"
        found[size] = sorted(row for part in parts for batch, counts in part if counts for row in batch.tokens.tolist())
    assert found[1] == found[3] and len(found[1]) == 7
    everything = TinyRun(tmp_path, data={"validation_windows": 0})
    assert len(HeldOut(everything.config, Ranks(RANKS.device))) == (6 * 201 - 1) // 32


def test_train_token_beyond_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="vocab_size must be above .*, got 100 and token 127 in samples 1-2"):
        check_vocabulary(np.array([[3, 127]]), 100, "samples 1-2")
    with pytest.raises(ValueError, match="vocab_size must be above .*, got 100 and token -1 in samples 1-2"):
        check_vocabulary(np.array([[3, -1, 99]]), 100, "samples 1-2")
    check_vocabulary(np.array([[0, 99]]), 100, "samples 1-2")


def test_train_vocabulary_of_validation_shards(tmp_path):
    write_shard(tmp_path / "wide", seed=2, documents=3, vocab=300)
    run = TinyRun(tmp_path, data={"validation": str(tmp_path / "wide")})
    with pytest.raises(ValueError, match="got 128 and token 29[0-9] in the validation shards"):
        list(HeldOut(run.config, Ranks(RANKS.device)).batches())
