"""What the demo's model is compared with on the held-out text: a unigram, a bigram and xz.

Both token models are counted on the training shard and are distributions over the whole vocabulary of V tokens:
    unigram  p(t)   = (c(t) + alpha) / (n + alpha V)
    bigram   p(t|s) = (c(s, t) + kappa d(s) p(t)) / (c(s) + kappa d(s))       p(t) where c(s) = 0
with c(s) the times something followed s and d(s) the number of different tokens that did. The bigram interpolates
c(s, t) / c(s) with the unigram, whose weight is kappa d(s) / (c(s) + kappa d(s)) (kappa = 1: Witten and Bell 1991);
on Python source this beats one weight for all contexts. alpha and kappa are chosen from ALPHAS and KAPPAS on the last
tenth of the training shard, with counts of the rest; then everything is counted. Losses are nats per token.
"""

import lzma
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from train.config import Config
from train.data import HeldOut
from train.distributed import Ranks

ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0)
KAPPAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
DEVELOPMENT_SHARE = 0.1


@dataclass(frozen=True)
class NgramBaseline:
    """Counts of a training stream and the two smoothing constants; see the file's head."""

    vocab_size: int
    alpha: float
    kappa: float
    unigrams: np.ndarray
    """int64 [V]: c(t)."""
    contexts: np.ndarray
    """int64 [V]: c(s)."""
    followers: np.ndarray
    """int64 [V]: d(s)."""
    pairs: np.ndarray
    """int64, ascending: s V + t of every pair that occurs."""
    pair_counts: np.ndarray
    """int64: c(s, t)."""

    @classmethod
    def fit(cls, tokens: np.ndarray, vocab_size: int) -> "NgramBaseline":
        """Choose alpha and kappa on the end of `tokens` [n >= 10], then count all of it."""
        cut = len(tokens) - max(1, int(DEVELOPMENT_SHARE * len(tokens)))
        trial = cls.count(tokens[:cut], vocab_size, ALPHAS[0], KAPPAS[0])
        before, after = tokens[cut - 1 : -1], tokens[cut:]
        alpha = min(ALPHAS, key=lambda value: replace(trial, alpha=value).unigram_nats(after).mean())
        trial = replace(trial, alpha=alpha)
        kappa = min(KAPPAS, key=lambda value: replace(trial, kappa=value).bigram_nats(before, after).mean())
        return cls.count(tokens, vocab_size, alpha, kappa)

    @classmethod
    def count(cls, tokens: np.ndarray, vocab_size: int, alpha: float, kappa: float) -> "NgramBaseline":
        """Count the tokens and the pairs of neighbours of one stream [n]."""
        tokens = np.asarray(tokens, dtype=np.int64)
        pairs, pair_counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
        unigrams = np.bincount(tokens, minlength=vocab_size)
        contexts = np.bincount(tokens[:-1], minlength=vocab_size)
        followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
        return cls(vocab_size, alpha, kappa, unigrams, contexts, followers, pairs, pair_counts)

    def unigram_nats(self, tokens: np.ndarray) -> np.ndarray:
        """Return -ln p(t) of every token, fp64 in the shape of tokens."""
        return -np.log(self._unigram(tokens))

    def bigram_nats(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return -ln p(t|s) of every token t of `after` behind the s at its place in `before`, fp64 in their shape."""
        wanted = before.astype(np.int64) * self.vocab_size + after
        at = np.searchsorted(self.pairs, wanted).clip(max=len(self.pairs) - 1)
        joint = np.where(self.pairs[at] == wanted, self.pair_counts[at], 0)
        weight = np.where(self.contexts[before] > 0, self.kappa * self.followers[before], 1.0)
        return -np.log((joint + weight * self._unigram(after)) / (self.contexts[before] + weight))

    def nats_per_token(self, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
        """Return the mean loss of both on the same tokens, {"unigram": .., "bigram": ..}."""
        losses = {"unigram": self.unigram_nats(after), "bigram": self.bigram_nats(before, after)}
        return {name: float(nats.mean()) for name, nats in losses.items()}

    def _unigram(self, tokens: np.ndarray) -> np.ndarray:
        return (self.unigrams[tokens] + self.alpha) / (self.unigrams.sum() + self.alpha * self.vocab_size)


def held_out_tokens(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Return (the token before, the token) of everything a run of config measures in a validation, int64 [n] each."""
    batches = [batch for batch, _ in HeldOut(config, Ranks(torch.device("cpu"))).batches()]
    return tuple(torch.cat([part.flatten() for part in parts]).numpy() for parts in zip(
        *((batch.tokens, batch.targets) for batch in batches), strict=True
    ))  # fmt: skip


def xz_bytes(train: Iterable[bytes], held_out: Iterable[bytes]) -> tuple[int, int]:
    """Return xz's bytes for the held-out text (documents joined): by itself, and given the training text.

    The second is xz(train + held out) - xz(train): what the held-out text adds where the training text is known. All
    with preset 9 extreme; its dictionary of 64 MiB reaches back over the demo's largest text.
    """
    known, new = b"".join(train), b"".join(held_out)
    with ThreadPoolExecutor() as threads:  # lzma releases the interpreter
        both, first, alone = threads.map(_xz, (known + new, known, new))
    return alone, both - first


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
