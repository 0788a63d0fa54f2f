"""The order of training samples, a pure function of the sample's number: RWKV-LM's cubic permutation.

A sample is ctx_len + 1 tokens of a stream: one shard, or several back to back. Number ii, from 1, starts at token
slot(ii) * ctx_len:
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

import numpy as np

from rwkv_ext.data.token_stream import TokenStream, read_windows

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
    """Cut training samples from a stream of tokens; from one shard or several, the order is RWKV-LM's for one file.

    Slots are cut across the borders of shards, so shards give the samples of the one shard merged from them. The
    samples of an optimizer step depend on its sample numbers alone, not on how ranks share them. A sampler has no
    state: it can be pickled, forked and shared by threads.

    Args:
        data: a TokenStream, or what one is made of: a shard's name, a folder, a BinidxReader, a sequence of them.
        ctx_len: tokens a sample predicts; a sample has one more.
        prime: the `magic_prime` of an older run; None computes the largest that fits.

    Attributes: stream, ctx_len, n_tokens, n_slots, dtype (of the stream); prime, samples_per_pass (equal to it).
    """

    def __init__(self, data, ctx_len: int, prime: int | None = None):
        self.stream = data if isinstance(data, TokenStream) else TokenStream(data)
        self.ctx_len = _check_ctx_len(ctx_len)
        self.n_tokens, self.dtype = self.stream.n_tokens, self.stream.dtype
        self.n_slots = max(0, self.n_tokens - 1) // self.ctx_len
        if prime is None:
            prime = magic_prime(self.n_tokens, ctx_len)
        self.prime = self.samples_per_pass = self._check_prime(prime)

    def sample(self, index: int) -> np.ndarray:
        """Return sample number index + 1, for any index >= 0: int64 [ctx_len + 1], inputs and targets."""
        return self.batch([index])[0]

    def batch(self, indices, dtype=np.int64) -> np.ndarray:
        """Return several samples: [n, ctx_len + 1] of int64, or of another type that holds the data's."""
        return read_windows([(self.stream, self.locate(index)) for index in indices], self.ctx_len + 1, dtype)

    def locate(self, index: int) -> int:
        """Return the stream's position of the first token of sample number index + 1."""
        index = operator.index(index)
        if index < 0:
            raise ValueError(f"sample: index must be 0 or more, got {index}")
        number = index // self.prime
        slot = (cubic_slot(self.prime, index + 1) + number * self.prime) % self.n_slots
        # Shifted, the last slot may no longer fit: it moves back to the end.
        return min(slot * self.ctx_len + pass_shift(number, self.ctx_len), self.n_tokens - 1 - self.ctx_len)

    def fingerprint(self) -> str:
        """Return a SHA-256 that names the tokens and the order: equal fingerprints give equal samples."""
        parts = [self.stream.fingerprint(), str(self.ctx_len), str(self.prime)]
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
