"""The order of samples: RWKV-LM's vectors, permutations, several shards as one file, several ranks, later passes."""

import hashlib
import math
import struct

import numpy as np
import pytest

from rwkv_ext.data.binidx import BinidxReader, BinidxWriter
from rwkv_ext.data.sampler import Sampler, cubic_slot, is_prime, largest_prime, magic_prime, pass_shift

# prime, slots of samples 1 to 6, slot of sample 40320, start of the SHA-256 over slots 1 to 40320 as uint64
VECTORS = [
    (2926181, [1808479, 2763108, 2010037, 1621597, 743938, 1449391], 1326902, "8e59fa5ead224d01"),
    (731531, [452111, 690764, 502501, 405395, 185988, 362353], 423578, "a3c54b15efc965f4"),
    (365759, [226051, 345372, 251233, 202663, 92932, 181069], 246271, "9381d01b2592afa3"),
    (81082817, [50111936, 76564220, 55697200, 44934041, 20615091, 40163515], 11925192, "8be4e9444adc2e23"),
]


def make(path, n_tokens, seed=0):
    with BinidxWriter(path) as writer:
        writer.add_document(np.random.default_rng(seed).integers(0, 65536, n_tokens, dtype=np.uint16))
    return BinidxReader(path)


@pytest.mark.parametrize("prime, first, last, digest", VECTORS, ids=[str(row[0]) for row in VECTORS])
def test_slots_equal_the_vectors(prime, first, last, digest):
    slots = [cubic_slot(prime, ii) for ii in range(1, 40321)]
    assert slots[:6] == first and slots[-1] == last
    assert hashlib.sha256(struct.pack("<40320Q", *slots)).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    "n_tokens, ctx_len, prime",
    [
        (1_498_226_207, 512, 2926181),
        (1_498_226_207, 2048, 731531),
        (1_498_226_207, 4096, 365759),
        (332_115_325_534, 4096, 81082817),
    ],
)
def test_magic_prime_of_known_data(n_tokens, ctx_len, prime):
    assert magic_prime(n_tokens, ctx_len) == prime
    assert magic_prime(np.int64(n_tokens), np.int32(ctx_len)) == prime


def test_primes_by_trial():
    small = [n for n in range(2000) if n > 1 and all(n % d for d in range(2, n))]
    assert [n for n in range(2000) if is_prime(n)] == small
    for limit in range(2, 2000):
        assert largest_prime(limit) == max(p for p in small if p <= limit and p % 3 == 2)
    with pytest.raises(ValueError, match="largest_prime: limit must be at least 2, got 1"):
        largest_prime(1)


@pytest.mark.parametrize("prime", [2, 5, 11, 107, 1013])
def test_a_pass_visits_every_slot_once(prime):
    assert sorted(cubic_slot(prime, ii) for ii in range(1, prime + 1)) == list(range(prime))


def test_slots_are_exact_for_any_size():
    prime = 2**61 - 1  # 1 mod 3, so no permutation, but its products pass every machine word
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    for ii in (10**6, 10**15, np.int64(3_000_000_000), 2**70):
        assert cubic_slot(prime, ii) == (factor * int(ii) ** 3) % prime
    assert cubic_slot(np.int64(81082817), np.uint32(40320)) == 11925192


def test_one_shard_is_the_plain_formula(tmp_path):
    reader = make(tmp_path / "shard", 64 * 130 + 17)
    sampler = Sampler(reader, ctx_len=64)
    prime = magic_prime(reader.n_tokens, 64)
    assert sampler.prime == sampler.samples_per_pass == prime == 113
    tokens = np.asarray(reader.tokens)
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    for index in range(prime):
        start = (factor * (index + 1) ** 3) % prime * 64
        sample = sampler.sample(index)
        assert sample.dtype == np.int64 and sample.shape == (65,)
        np.testing.assert_array_equal(sample, tokens[start : start + 65])
    np.testing.assert_array_equal(sampler.batch(range(40)), [sampler.sample(i) for i in range(40)])
    assert Sampler([reader], 64).fingerprint() == sampler.fingerprint()


@pytest.mark.parametrize("n_tokens", range(3 * 8, 12 * 8))
def test_every_sample_of_small_data_lies_inside(tmp_path, n_tokens):
    reader = make(tmp_path / "shard", n_tokens)
    sampler = Sampler(reader, ctx_len=8)
    assert sampler.prime == magic_prime(n_tokens, 8)
    for index in range(5 * sampler.prime):
        start = sampler.locate(index)
        assert 0 <= start and start + 9 <= n_tokens
        assert len(sampler.sample(index)) == 9


def test_samples_of_a_step_do_not_depend_on_the_ranks(tmp_path):
    sampler = Sampler(make(tmp_path / "shard", 8 * 3000), ctx_len=8)

    def steps(world_size, micro_batch):
        for step in range(20):
            rows = []
            for rank in range(world_size):
                first = step * 16 + rank * micro_batch
                rows.append(sampler.batch(range(first, first + micro_batch)))
            yield sorted(map(tuple, np.concatenate(rows).tolist()))

    single = list(steps(1, 16))
    assert list(steps(8, 2)) == list(steps(4, 4)) == list(steps(16, 1)) == single
    # Two accumulated halves of a step are the step: numbering is all there is.
    halves = [sampler.batch(range(8 * half, 8 * half + 8)) for half in range(40)]
    assert [sorted(map(tuple, np.concatenate(halves[2 * i : 2 * i + 2]).tolist())) for i in range(20)] == single


def test_several_shards_are_cut_like_one_file(tmp_path):
    sizes = [8 * 20 + 1, 5, 8 * 7, 8 * 30 + 3, 8 * 50]
    readers = [make(tmp_path / str(i), size, seed=i) for i, size in enumerate(sizes)]
    whole = np.concatenate([reader.tokens for reader in readers])
    sampler = Sampler(readers, ctx_len=8)
    assert sampler.n_tokens == len(whole) == 865 and sampler.n_slots == 108
    assert sampler.prime == magic_prime(865, 8) == 107
    for index in range(107):
        start = sampler.locate(index)
        assert start == 8 * cubic_slot(107, index + 1)
        np.testing.assert_array_equal(sampler.sample(index), whole[start : start + 9])
    assert Sampler(readers[::-1], 8).fingerprint() != sampler.fingerprint()


def test_later_passes_cut_elsewhere_and_reach_what_the_prime_leaves_over(tmp_path):
    # 44 slots, of which p = 41 take part in a pass; the last token has no slot. A border of shards lies inside slot 21.
    readers = [make(tmp_path / "one", 16 * 21 + 7), make(tmp_path / "two", 16 * 22 + 10)]
    sampler = Sampler(readers, ctx_len=16)
    n_tokens = 16 * 43 + 17
    assert (sampler.n_tokens, sampler.n_slots, sampler.prime) == (n_tokens, 44, 41)
    passes = [[sampler.locate(q * 41 + i) for i in range(41)] for q in range(60)]
    assert all(len(set(places)) == 41 for places in passes)
    assert len({tuple(sorted(places)) for places in passes}) == 60
    assert all(0 <= start <= n_tokens - 17 for places in passes for start in places)
    seen = np.zeros(n_tokens, bool)
    for start in sum(passes, []):
        seen[start : start + 17] = True
    assert seen.all()  # to the last token
    shift = pass_shift(1, 16)
    assert passes[1][0] == 16 * ((cubic_slot(41, 42) + 41) % 44) + shift


def test_slots_of_passes_follow_each_other_in_a_ring(tmp_path):
    sampler = Sampler(make(tmp_path / "shard", 8 * 11), ctx_len=8)  # 10 slots, p = 5
    slots = [{sampler.locate(5 * q + i) // 8 for i in range(5)} for q in range(4)]
    assert slots == [{0, 1, 2, 3, 4}, {5, 6, 7, 8, 9}] * 2


def test_shifts_spread_evenly_and_are_fixed_for_ever():
    assert [pass_shift(q, 512) for q in range(6)] == [0, 316, 120, 437, 241, 46]
    for passes in (2, 5, 20, 100):
        shifts = sorted(pass_shift(q, 1 << 30) for q in range(passes))
        gaps = np.diff([*shifts, 1 << 30])
        assert gaps.min() > (1 << 30) / passes / 3 and gaps.max() < (1 << 30) / passes * 2.7


def test_given_prime(tmp_path):
    reader = make(tmp_path / "shard", 8 * 100)
    assert Sampler(reader, 8, prime=83).locate(0) == 8 * cubic_slot(83, 1)
    for prime in (97, 91, 1, 4):
        with pytest.raises(
            ValueError, match=f"prime must be a prime number that is 2 mod 3, got {prime}; leave it out"
        ):
            Sampler(reader, 8, prime=prime)
    with pytest.raises(
        ValueError, match="prime must be at most 99, the samples of 8 tokens in the data, got 101; is it"
    ):
        Sampler(reader, 8, prime=101)


def test_too_little_data(tmp_path):
    reader = make(tmp_path / "shard", 3 * 512 - 1)
    message = "ctx_len must be at most a third of the data's tokens, got ctx_len 512 for 1535 tokens; use a shorter"
    with pytest.raises(ValueError, match=message):
        Sampler(reader, 512)
    with pytest.raises(ValueError, match=message):
        magic_prime(1535, 512)
    with pytest.raises(ValueError, match="got ctx_len 512 for 0 tokens"):
        Sampler([], 512)
    assert Sampler(make(tmp_path / "more", 3 * 512), 512).prime == 2


@pytest.mark.parametrize("ctx_len", [0, -1, 1.5, "512", None])
def test_bad_ctx_len(tmp_path, ctx_len):
    with pytest.raises(ValueError, match=f"ctx_len must be a positive integer, got {ctx_len!r}"):
        Sampler(make(tmp_path / "shard", 100), ctx_len)


def test_bad_index(tmp_path):
    sampler = Sampler(make(tmp_path / "shard", 100), 8)
    with pytest.raises(ValueError, match="sample: index must be 0 or more, got -1"):
        sampler.sample(-1)
    with pytest.raises(TypeError, match="float"):
        sampler.sample(1.0)


def test_fingerprint_covers_data_and_order(tmp_path):
    reader = make(tmp_path / "shard", 1000)
    samplers = [
        Sampler(reader, 8),
        Sampler(reader, 9),
        Sampler(reader, 8, prime=83),
        Sampler([reader, reader], 8),
    ]
    samplers.append(Sampler(make(tmp_path / "other", 1000, seed=1), 8))
    assert len({sampler.fingerprint() for sampler in samplers}) == 5
