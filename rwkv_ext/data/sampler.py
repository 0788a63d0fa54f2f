"""The order of training samples, a pure function of the sample's number: RWKV-LM's cubic permutation.

A sample is ctx_len + 1 tokens. Sample number ii, from 1, starts at token slot(ii) * ctx_len of the stream:
    slot(ii) = int(p * (sqrt(5) - 1) / 2) * ii**3 mod p
with p the largest prime that is 2 mod 3 and fits the data. Cubing permutes the integers mod such p, so each
run of p samples (a pass) visits p slots once, in scattered order; one number is all a run needs to resume,
with any number of ranks.

Pass 0 is RWKV-LM's order exactly. RWKV-LM then repeats the same cuts for ever; here pass q > 0 moves every
cut by frac(q * golden ratio) * ctx_len tokens, and takes the p slots that follow, in a ring, those of pass
q - 1. So later passes see new pieces, and the slots that p leaves over have their turn.
"""

import hashlib
import math
import operator
from collections.abc import Sequence

import numpy as np

from rwkv_ext.data.binidx import BinidxReader

GOLDEN = 0x9E3779B97F4A7C15  # the golden ratio's fraction, times 2**64: its multiples spread evenly


def is_prime(n: int) -> bool:
    if n < 2 or any(n % d == 0 and n > d for d in (2, 3)):
        return False
    return all(n % d and n % (d + 2) for d in range(5, math.isqrt(n) + 1, 6))  # 6k - 1 and 6k + 1


def largest_prime(limit: int) -> int:
    """Return the largest prime p <= limit with p mod 3 = 2, at least 2; ValueError for a limit below 2."""
    if limit < 2:
        raise ValueError(f"largest_prime: limit must be at least 2, got {limit}")
    p = limit - (limit - 2) % 3
    while not is_prime(p):
        p -= 3
    return p


def magic_prime(n_tokens: int, ctx_len: int) -> int:
    """Return RWKV-LM's `magic_prime`: the largest prime p = 2 mod 3 with p <= n_tokens // ctx_len - 1.

    ValueError where the data is too short for that: 3 * ctx_len tokens are the least.
    """
    _check_enough(n_tokens, n_tokens // _check_ctx_len(ctx_len) - 1, ctx_len)
    return largest_prime(n_tokens // ctx_len - 1)


def cubic_slot(prime: int, ii: int) -> int:
    """Return the slot of sample number ii >= 1, in 0 .. prime - 1. Exact for any size: Python's integers."""
    prime, ii = operator.index(prime), operator.index(ii)  # numpy's integers would overflow
    factor = int(prime * ((math.sqrt(5) - 1) / 2))  # RWKV-LM's own expression, in double precision
    return factor * pow(ii, 3, prime) % prime


class Sampler:
    """Cut training samples from one shard or from several, which count as one row of slots.

    Shard j has (tokens_j - 1) // ctx_len slots; no sample crosses from one shard into the next. For a single
    shard the order is RWKV-LM's. The samples of an optimizer step depend on its sample numbers alone, not on
    how ranks share them.

    Args:
        readers: a BinidxReader or a sequence of them; their order matters.
        ctx_len: tokens a sample predicts; a sample has one more.
        prime: the `magic_prime` of an older run; None computes the largest that fits.

    Attributes: prime, samples_per_pass (equal to it), n_tokens.
    """

    def __init__(self, readers: BinidxReader | Sequence[BinidxReader], ctx_len: int, prime=None):
        self.readers = [readers] if isinstance(readers, BinidxReader) else list(readers)
        self.ctx_len = _check_ctx_len(ctx_len)
        self.n_tokens = sum(reader.n_tokens for reader in self.readers)
        slots = [max(0, reader.n_tokens - 1) // ctx_len for reader in self.readers]
        self._first_slot = np.cumsum([0, *slots])  # [shards + 1]
        self.n_slots = int(self._first_slot[-1])
        # RWKV-LM's limit for one shard; the slots lost at the ends of several may lower it.
        limit = min(self.n_tokens // ctx_len - 1, self.n_slots)
        if prime is None:
            _check_enough(self.n_tokens, limit, ctx_len)
            prime = largest_prime(limit)
        self.prime = self.samples_per_pass = self._check_prime(prime)

    def sample(self, index: int) -> np.ndarray:
        """Return sample number index + 1, for any index >= 0: int64 [ctx_len + 1], inputs and targets."""
        shard, start = self.locate(index)
        return self.readers[shard].tokens[start : start + self.ctx_len + 1].astype(np.int64)

    def batch(self, indices) -> np.ndarray:
        """Return several samples: int64 [n, ctx_len + 1]."""
        out = np.empty((len(indices), self.ctx_len + 1), dtype=np.int64)
        for row, index in zip(out, indices, strict=True):
            shard, start = self.locate(index)
            row[:] = self.readers[shard].tokens[start : start + self.ctx_len + 1]
        return out

    def locate(self, index: int) -> tuple[int, int]:
        """Return (shard, first token in it) of sample number index + 1."""
        index = operator.index(index)
        if index < 0:
            raise ValueError(f"sample: index must be 0 or more, got {index}")
        number = index // self.prime
        slot = (cubic_slot(self.prime, index + 1) + number * self.prime) % self.n_slots
        shard = int(np.searchsorted(self._first_slot, slot, side="right")) - 1
        start = (slot - int(self._first_slot[shard])) * self.ctx_len + pass_shift(number, self.ctx_len)
        # Shifted, the last slot of a shard may no longer fit: it moves back to the shard's end.
        return shard, min(start, self.readers[shard].n_tokens - 1 - self.ctx_len)

    def fingerprint(self) -> str:
        """Return a SHA-256 that names the data and the order: equal fingerprints give equal samples."""
        parts = [reader.fingerprint() for reader in self.readers] + [str(self.ctx_len), str(self.prime)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _check_prime(self, prime: int) -> int:
        prime = operator.index(prime)
        if not is_prime(prime) or prime % 3 != 2:
            advice = "leave it out to have it computed"
            raise ValueError(f"Sampler: prime must be a prime number that is 2 mod 3, got {prime}; {advice}")
        if prime > self.n_slots:
            most = f"{self.n_slots}, the samples of {self.ctx_len} tokens in the data"
            advice = "is it the prime of another data set or ctx_len?"
            raise ValueError(f"Sampler: prime must be at most {most}, got {prime}; {advice}")
        return prime


def pass_shift(number: int, ctx_len: int) -> int:
    """Return by how many tokens, 0 .. ctx_len - 1, a pass moves the cuts; 0 for pass 0."""
    return (number * GOLDEN % 2**64) * ctx_len >> 64


def _check_ctx_len(ctx_len: int) -> int:
    if not isinstance(ctx_len, int | np.integer) or ctx_len < 1:
        raise ValueError(f"ctx_len must be a positive integer, got {ctx_len!r}")
    return operator.index(ctx_len)


def _check_enough(n_tokens: int, limit: int, ctx_len: int) -> None:
    if limit < 2:
        got = f"ctx_len {ctx_len} for {n_tokens} tokens"
        advice = "use a shorter ctx_len or more data"
        raise ValueError(f"ctx_len must be at most a third of the data's tokens, got {got}; {advice}")
