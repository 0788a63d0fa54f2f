"""What changes logits before sampling: bans and biases, the same for every token, and penalties for tokens used before.

Shapes: logits [B, V]; one row per text.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

EXEMPT_IN_RWKV = " \t0123456789"


class Penalties:
    """The tokens that B texts have used, and what that takes from their logits.

    presence   subtracted from the logit of every token used before, however long ago
    frequency  subtracted times the token's count
    decay      every count is multiplied by it as a token comes; the newest token counts 1
    exempt     ids that neither touches; or "rwkv": the tokens whose text is part of " \\t0123456789" are not counted
               but do get presence, for ever, as in the `rwkv` package
    """

    def __init__(self, presence: float, frequency: float, decay: float, exempt: str | Iterable[int], tokenizer):
        self.presence, self.frequency, self.decay = presence, frequency, decay
        self._uncounted = rwkv_exempt(tokenizer) if exempt == "rwkv" else sorted(exempt)
        self._unused = [] if exempt == "rwkv" else self._uncounted
        self._counts: Tensor | None = None  # [B, V]
        self._used: Tensor | None = None  # [B, V]

    @property
    def are_off(self) -> bool:
        return not (self.presence or self.frequency)

    def start(self, logits: Tensor) -> None:
        """Begin with texts that have used nothing, as many as logits [B, V] has rows."""
        if self.are_off:
            return
        vocab = logits.shape[-1]  # may be smaller than the tokenizer's
        self._counts = torch.zeros(logits.shape, device=logits.device)
        self._used = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        self._weights = torch.ones(vocab, device=logits.device)
        self._usable = torch.ones(vocab, dtype=torch.bool, device=logits.device)
        self._weights[[token for token in self._uncounted if token < vocab]] = 0
        self._usable[[token for token in self._unused if token < vocab]] = False

    def apply(self, logits: Tensor) -> Tensor:
        """Return the lowered logits."""
        return logits if self.are_off else logits - self._used * self.presence - self._counts * self.frequency

    def count(self, tokens: Tensor) -> None:
        """Note the newest token of every text, tokens [B]."""
        if not self.are_off:
            rows = torch.arange(len(tokens), device=tokens.device)
            self._counts *= self.decay
            self._counts[rows, tokens] += self._weights[tokens]
            self._used[rows, tokens] |= self._usable[tokens]

    def replay(self, row: int, tokens: list[int]) -> None:
        """Count the tokens of one text that had begun before; the counts have the bits they had there."""
        if self.are_off or not tokens:
            return
        ids, places = torch.tensor(tokens, device=self._counts.device).unique(return_inverse=True)
        counts, weights = torch.zeros(ids.shape, device=ids.device), self._weights[ids]
        for place in places.tolist():
            counts *= self.decay
            counts[place] += weights[place]
        self._counts[row, ids] = counts
        self._used[row, ids] = self._usable[ids]

    def select(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        if not self.are_off:
            self._counts, self._used = self._counts[rows], self._used[rows]


def rwkv_exempt(tokenizer) -> list[int]:
    """Return the ids of the tokens whose text is part of EXEMPT_IN_RWKV."""
    text = EXEMPT_IN_RWKV
    parts = {text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    return sorted(ids[0] for part in parts if len(ids := tokenizer.encode(part)) == 1)


def fixed_bias(logits: Tensor, tokenizer, bias: Mapping[int, float], ban: Iterable[int], allowed: Iterable[int]):
    """Return what is added to all logits [B, V], as [V]: the biases, and -inf for what must not be sampled.

    That is every id of ban, and the ids that stand for no bytes, unless they are among allowed (the stop tokens);
    id 0, the end of a document, is not banned by itself.
    """
    vocab = logits.shape[-1]
    lengths = torch.zeros(vocab, dtype=torch.uint8)
    known = torch.from_numpy(tokenizer.byte_lengths.copy())[:vocab]
    lengths[: len(known)] = known
    undecodable = lengths == 0
    undecodable[[0, *(token for token in allowed if token < vocab)]] = False
    added = torch.zeros(vocab)
    for token, value in bias.items():
        added[token] = value
    added[sorted(ban)] = -math.inf
    return added.masked_fill(undecodable, -math.inf).to(logits.device)
