"""Sources with weights: shares, evenness of every prefix, each source's own order, what is refused; in the trainer."""

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_token_stream import write_random
from tiny_run import TinyRun, write_shard

from rwkv_ext.data.sampler import Sampler
from rwkv_ext.data.weighted_sampler import PERIOD, WeightedSampler, interleave, samples_per_period
from train.data import TrainingData
from train.distributed import Ranks


def largest_deviation(schedule, counts):
    """How far a source is from its share of any prefix, in samples."""
    turns, period = np.arange(1, len(schedule) + 1), len(schedule)
    return max(
        float(np.abs(np.cumsum(schedule == source) * period - count * turns).max()) / period
        for source, count in enumerate(counts)
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_schedules_are_even(counts):
    schedule = interleave(counts)
    assert np.bincount(schedule, minlength=len(counts)).tolist() == counts
    assert largest_deviation(schedule, counts) <= max(0, 1 - 1 / max(1, 2 * len(counts) - 2)) + 1e-9


@pytest.mark.parametrize("n_sources", [2, 7, 60])
def test_whole_periods_are_even(n_sources):
    weights = (np.random.default_rng(n_sources).random(n_sources) ** 4 + 1e-3).tolist()
    counts = samples_per_period(weights)
    assert sum(counts) == PERIOD
    exact = [Fraction(repr(w)) / sum(Fraction(repr(v)) for v in weights) * PERIOD for w in weights]
    assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))
    schedule = interleave(counts)
    assert np.bincount(schedule).tolist() == counts
    assert largest_deviation(schedule, counts) < 1


def test_weights_are_ratios_of_decimals():
    assert samples_per_period([0.7, 0.15, 0.15]) == [14, 3, 3]
    assert samples_per_period([70, 15, 15]) == samples_per_period([1.4, 0.3, 0.3]) == [14, 3, 3]
    assert samples_per_period([3]) == [1] and samples_per_period([0.1] * 10) == [1] * 10
    assert samples_per_period([65535, 1]) == [65535, 1]
    assert samples_per_period([1.0, math.pi, 2]) == [10671, 33523, 21342]  # of 65536, by largest remainders
    assert samples_per_period([1e300, 1e300]) == [1, 1]
    assert interleave([2, 1, 1]).tolist() == [0, 1, 0, 2] and interleave([1]).tolist() == [0]


def test_weights_that_are_refused():
    for bad in (-1, 0, math.nan, math.inf, -0.0):
        with pytest.raises(ValueError, match=f"weights must be finite numbers above 0, got {bad}; leave out sources"):
            samples_per_period([1, bad])
    with pytest.raises(ValueError, match="weights must be finite numbers above 0, got 10000"):
        samples_per_period([10**400, 1])
    with pytest.raises(ValueError, match="weights must be at least 1/65536 of their sum, inf, got 1e-300"):
        samples_per_period([1e308, 1e308, 1e-300])
    with pytest.raises(ValueError, match="weights must be at least 1/65536 of their sum, 65536, got 0.99; leave that"):
        samples_per_period([65535.01, 0.99])


@pytest.fixture(scope="module")
def samplers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    one, two, *three = write_random(folder, [700, 3000, 500, 40, 900])
    return [Sampler(source, 16) for source in (one, two, three)]


def test_each_source_keeps_its_own_order(samplers):
    weighted = WeightedSampler(samplers, [0.5, 0.2, 0.3])
    assert weighted.counts == [5, 2, 3] and weighted.shares == [0.5, 0.2, 0.3] and weighted.period == 10
    assert weighted.prime == [sampler.prime for sampler in samplers] == [41, 179, 89]
    assert weighted.n_tokens == 700 + 3000 + 1440
    rows = weighted.batch(range(1000))
    places = [weighted.locate(index) for index in range(1000)]
    for source, sampler in enumerate(samplers):
        own = [place[1] for place in places if place[0] == source]
        assert own == list(range(len(own))) and len(own) == 1000 * weighted.counts[source] // 10  # many passes of each
        picked = [place[0] == source for place in places]
        np.testing.assert_array_equal(rows[picked], sampler.batch(range(len(own))))
    np.testing.assert_array_equal(weighted.sample(999), rows[999])
    # Any place at once: no walk from the start.
    far = 10**18 + 7
    source, own = weighted.locate(far)
    assert own == (far // 10) * weighted.counts[source] + weighted.locate(7)[1]
    copy = pickle.loads(pickle.dumps(weighted))
    np.testing.assert_array_equal(copy.batch(range(50)), rows[:50])


def test_one_source_is_its_sampler(samplers):
    weighted = WeightedSampler(samplers[2:], [7])
    np.testing.assert_array_equal(weighted.batch(range(200)), samplers[2].batch(range(200)))


def test_fingerprint_covers_sources_and_shares(samplers):
    prints = [
        WeightedSampler(samplers, [1, 2, 3]).fingerprint(),
        WeightedSampler(samplers, [1, 2, 4]).fingerprint(),
        WeightedSampler(samplers[::-1], [1, 2, 3]).fingerprint(),
        WeightedSampler(samplers[:2], [1, 2]).fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert WeightedSampler(samplers, [0.1, 0.2, 0.3]).fingerprint() == prints[0]


def test_weighted_samplers_that_cannot_be(samplers):
    for few, weights in ((samplers, [1, 2]), ([], [])):
        with pytest.raises(ValueError, match="at least one source, and a weight for each, got"):
            WeightedSampler(few, weights)
    with pytest.raises(ValueError, match=r"samplers must have the same ctx_len, got \[8, 16\]"):
        WeightedSampler([samplers[0], Sampler(samplers[1].stream, 8)], [1, 1])
    with pytest.raises(ValueError, match="sample: index must be 0 or more, got -1"):
        WeightedSampler(samplers, [1, 1, 1]).sample(-1)


@pytest.fixture
def run(tmp_path):
    """A tiny run on two sources: a shard of 60 documents, and a folder of two shards of 20."""
    (tmp_path / "more").mkdir()
    for name in ("a", "b"):
        write_shard(tmp_path / "more" / name, seed=5, documents=20)
    return TinyRun(tmp_path, data={"train": [str(tmp_path / "train"), str(tmp_path / "more")], "weights": [0.75, 0.25]})


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (2, 2)])
def test_trainer_shares_out_the_samples(run, ranks, micro):
    table = {"train": run.config.data.train, "weights": run.config.data.weights}
    config = TinyRun(run.folder, train={"micro_batch": micro}, data=table).config
    parts = [TrainingData(config, Ranks(torch.device("cpu"), 1, rank, ranks)) for rank in range(ranks)]
    one, two = Sampler(run.folder / "train", 32), Sampler(run.folder / "more", 32)
    assert parts[0].sampler.locate(3)[0] == 0
    for first in (0, 8):
        found = sorted(row for part in parts for batch in part.take(first) for row in batch.tokens.tolist())
        mine = [*one.batch(range(first * 3 // 4, first * 3 // 4 + 6)), *two.batch(range(first // 4, first // 4 + 2))]
        assert found == sorted(row[:-1].tolist() for row in mine)
    for part in parts:
        part.close()


def test_trainer_plans_runs_and_resumes(run, tmp_path, capsys):
    assert run.run("--dry-run") == 0
    plan = capsys.readouterr().out
    assert "data        20,100 tokens in 2 sources, samples of 32, mode stream; held out: 7 windows\n" in plan
    assert (
        f"source      {tmp_path / 'train'}: 12,060 tokens, 75.00% of the samples, 359 per pass, 0.20 passes\n" in plan
    )
    assert (
        f"source      {tmp_path / 'more'}: 8,040 tokens in 2 shards, 25.00% of the samples, 239 per pass, 0.10 pas"
        in plan
    )
    assert "length      3,072 tokens = 12 steps; the time" in plan
    assert run.run() == 0
    resumed = TinyRun(tmp_path, data={"train": run.config.data.train, "weights": [0.75, 0.25]},
                      checkpoint={"folder": str(tmp_path / "again")})  # fmt: skip
    run.copy_checkpoint(6, resumed)
    assert resumed.run() == 0 and resumed.losses() == run.losses()
    for change, message in (
        (
            "data.weights=[1, 1]",
            r"resume: data.weights \(the order of samples\) must be \[0.75, 0.25\] as in .*, got \[1.0",
        ),
        ("data.weights=[]", r"resume: data.weights \(the order of samples\) must be \[0.75, 0.25\] as in .*, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            resumed.run("--traceback", "--set", change)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.weights=[1]"], r"data.weights must be empty or have a number for each of the 2 entries of data.train"),
        (["data.weights=[1, -1]"], r"data.weights must be finite numbers above 0, got -1.0"),
        (["data.weights=[1, 1e9]"], r"data.weights must be at least 1/65536 of their sum"),
        (["data.weights=[1, 'a']"], r"data.weights must be a number, got 'a'"),
        (["data.weights=2"], r"data.weights must be a list of numbers, got 2"),
        (["data.prime=5"], r"data.prime must be left out with data.weights, got 5; each source has a prime of its own"),
        (["data.ctx_len=3000"], r'data.train ".*more": ctx_len must be at most a third .*, got ctx_len 3000 for 8040'),
    ],
)
def test_trainer_refuses(run, changes, message):
    with pytest.raises(ValueError, match=message):
        run.run("--traceback", *(part for change in changes for part in ("--set", change)))
