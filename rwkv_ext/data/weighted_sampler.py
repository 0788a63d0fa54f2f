"""Sources with weights: which source gives which sample, a pure function of the sample's number.

Every source has its own slots, prime, cubic order and passes: its k-th sample here is sample k of its own Sampler. A
schedule of up to 65,536 entries, repeated for ever, says whose turn it is. Within every prefix of the samples a source
of share s has given s times their number, less than one more or less: R. Tijdeman's solution of the chairman
assignment problem (Discrete Mathematics 32, 1980). With S sources and d = 1 / (2S - 2), the m-th sample of a source
may come at (m - 1 + d) / s at the earliest and must have come by (m - d) / s + 1; taking the most urgent source that
may come keeps all of these.
"""

import hashlib
import heapq
import math
import operator
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from rwkv_ext.data.sampler import Sampler
from rwkv_ext.data.token_stream import read_windows

PERIOD = 1 << 16  # entries of a schedule at most


def samples_per_period(weights: Sequence[float]) -> list[int]:
    """Return how many samples of a period each source gives; weights are relative.

    The counts are in the ratio of the weights as written in decimals if they then sum up to at most 65,536; otherwise
    they are the nearest 65,536ths by largest remainders. ValueError for weights that are not finite and above 0, or
    below 1/65,536 of their sum.
    """
    for weight in weights:
        if not 0 < weight <= sys.float_info.max:
            raise ValueError(f"weights must be finite numbers above 0, got {weight}; leave out sources of weight 0")
    written = [Fraction(repr(float(weight))) for weight in weights]  # 0.1 is a tenth
    shares = [weight / sum(written) for weight in written]
    for weight, share in zip(weights, shares, strict=True):
        if share * PERIOD < 1:
            need = f"at least 1/{PERIOD} of their sum, {sum(map(float, weights)):g}"
            raise ValueError(f"weights must be {need}, got {weight}; leave that source out or join it with another")
    period = math.lcm(*(share.denominator for share in shares))
    if period > PERIOD:
        period = PERIOD
    counts = [math.floor(share * period) for share in shares]
    left = sorted(range(len(shares)), key=lambda source: counts[source] - shares[source] * period)
    for source in left[: period - sum(counts)]:
        counts[source] += 1
    return counts


def interleave(counts: Sequence[int]) -> np.ndarray:
    """Return the sources of one period in order, int64 [sum of counts]: source j counts[j] times, spread evenly."""
    period, parts = sum(counts), max(1, 2 * len(counts) - 2)
    ready: list[tuple[int, int, int]] = []  # (last turn it may have, source, its number)
    coming = [(1, source, 1) for source in range(len(counts))]  # (first turn it may have, source, its number)
    schedule = np.empty(period, dtype=np.int64)
    for turn in range(1, period + 1):
        while coming and coming[0][0] <= turn:
            _, source, number = heapq.heappop(coming)
            latest = period * (number * parts - 1) // (counts[source] * parts) + 1
            heapq.heappush(ready, (latest, source, number))
        _, source, number = heapq.heappop(ready)
        schedule[turn - 1] = source
        if number < counts[source]:
            earliest = -(-period * (number * parts + 1) // (counts[source] * parts))
            heapq.heappush(coming, (earliest, source, number + 1))
    return schedule


class WeightedSampler:
    """Cut training samples from several sources in given shares. It is used like a Sampler and has no state either.

    Args:
        samplers: one for each source, all with the same ctx_len.
        weights: how often each gives a sample, relative to the others; `samples_per_period` says how they are rounded
            and what is refused.

    Attributes: samplers, ctx_len; n_tokens and dtype of all sources together; of each source prime, shares (of the
    samples) and counts (samples in a period); period.
    """

    def __init__(self, samplers: Sequence[Sampler], weights: Sequence[float]):
        self.samplers = list(samplers)
        if not self.samplers or len(weights) != len(self.samplers):
            need = "there must be at least one source, and a weight for each"
            raise ValueError(f"{need}, got {len(self.samplers)} sources and {len(weights)} weights")
        lengths = {sampler.ctx_len for sampler in self.samplers}
        if len(lengths) > 1:
            raise ValueError(f"samplers must have the same ctx_len, got {sorted(lengths)}")
        self.ctx_len = lengths.pop()
        self.n_tokens = sum(sampler.n_tokens for sampler in self.samplers)
        self.dtype = np.result_type(*(sampler.dtype for sampler in self.samplers))
        self.counts = samples_per_period(weights)
        self.period = sum(self.counts)
        self.shares = [count / self.period for count in self.counts]
        self.prime = [sampler.prime for sampler in self.samplers]
        self._sources = interleave(self.counts)
        self._before = np.empty(self.period, dtype=np.int64)  # samples of the same source earlier in the period
        for source, count in enumerate(self.counts):
            self._before[self._sources == source] = np.arange(count)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, index in that source's Sampler) of sample number index + 1."""
        index = operator.index(index)
        if index < 0:
            raise ValueError(f"sample: index must be 0 or more, got {index}")
        periods, turn = divmod(index, self.period)
        source = int(self._sources[turn])
        return source, periods * self.counts[source] + int(self._before[turn])

    def sample(self, index: int) -> np.ndarray:
        """Return sample number index + 1, for any index >= 0: int64 [ctx_len + 1], inputs and targets."""
        return self.batch([index])[0]

    def batch(self, indices, dtype=np.int64) -> np.ndarray:
        """Return several samples: [n, ctx_len + 1] of int64, or of another type that holds the data's."""
        return read_windows(list(map(self._place, indices)), self.ctx_len + 1, dtype)

    def fingerprint(self) -> str:
        """Return a SHA-256 that names the tokens and the order: equal fingerprints give equal samples."""
        parts = [sampler.fingerprint() for sampler in self.samplers] + list(map(str, self.counts))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _place(self, index: int):
        source, own = self.locate(index)
        return self.samplers[source].stream, self.samplers[source].locate(own)
