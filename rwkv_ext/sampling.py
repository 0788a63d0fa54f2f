"""From logits to the next token: penalties, top-k, top-p, temperature, one draw. Pure functions, no state.

Order and rules follow the `rwkv` package: top-p and top-k each choose tokens from the softmax at temperature 1, a
token must be chosen by both, and temperature then reshapes the survivors only. Three differences: top_p >= 1 means
off (there, the rounded sum of the probabilities often misses 1.0 and the choice collapses to the most probable
token); tokens equal to the last one that top-k keeps are kept too; temperature 0 takes the lowest of equal ids.

Shapes: logits [..., V] in any float dtype; results are computed in fp32 (fp64 for fp64).
"""

import math

import torch
from torch import Tensor

_FIRST_GUESS = 256  # tokens of a nucleus looked for before trying more; sorting all of 65536 takes milliseconds


def check_options(
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> None:
    """Raise ValueError that names the first option out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sampling: temperature must be >= 0 and finite, got {temperature}; 0 takes the best token")
    if not top_p >= 0:
        raise ValueError(f"sampling: top_p must be >= 0, got {top_p}; 1 turns it off")
    if not 0 <= top_k < math.inf or top_k != int(top_k):
        raise ValueError(f"sampling: top_k must be a whole number >= 0, got {top_k}; 0 turns it off")
    for name, penalty in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
        if not math.isfinite(penalty):
            raise ValueError(f"sampling: {name} must be finite, got {penalty}; 0 turns it off")


def penalize(logits: Tensor, counts: Tensor, presence_penalty: float, frequency_penalty: float) -> Tensor:
    """Return logits lowered by presence_penalty + count * frequency_penalty where a token's count [..., V] is not 0."""
    return _wide(logits) - (counts > 0) * presence_penalty - counts * frequency_penalty


def probabilities(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Return the distribution [..., V] that sample() draws from.

    top_p: the smallest set of most probable tokens whose probabilities reach top_p, and their equals; 0 leaves the
    most probable alone. top_k: the k most probable tokens and their equals; 0 is off. temperature 0 puts everything
    on the most probable token, the lowest id among equals. A logit of -inf bans a token.
    Raises ValueError for logits that hold nan or +inf, or nothing but -inf, and as check_options does.
    """
    check_options(temperature, top_p, top_k)
    logits = _wide(logits)
    largest = logits.amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError(
            f"sampling: logits must be finite, or -inf where banned, got {largest.flatten().tolist()} as the largest; "
            "the weights or the state of the model have overflowed, or every token is banned"
        )
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    logits = logits - largest
    cutoff = torch.full_like(largest, -math.inf)
    if 0 < top_k < logits.shape[-1]:
        cutoff = logits.topk(int(top_k)).values[..., -1:]
    if top_p < 1:
        cutoff = cutoff.maximum(_nucleus_cutoff(logits, top_p))
    # A tiny temperature may overflow to -inf, which is right: the largest logit stays 0. Rounded to 0 it would be nan.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    return (logits.masked_fill(logits < cutoff, -math.inf) / temperature).softmax(-1)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token id per row of logits [..., V]; int64 [...].

    Each row takes one random number from generator (a CPU generator, whatever the device of logits; None is
    torch's global one), so the same seed draws the same tokens on every device, as far as the logits are equal.
    """
    cumulative = probabilities(logits, temperature, top_p, top_k).cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(*cumulative.shape[:-1], 1, dtype=torch.float64, generator=generator)
    # The first token whose cumulative sum exceeds the threshold, hence never one of probability 0.
    return torch.searchsorted(cumulative, uniform.to(logits.device) * cumulative[..., -1:], right=True).squeeze(-1)


def _nucleus_cutoff(logits: Tensor, top_p: float) -> Tensor:
    """Return the logit [..., 1] of the token at which the sum of sorted probabilities reaches top_p."""
    normalizer = logits.logsumexp(-1, keepdim=True)
    count, vocab = _FIRST_GUESS, logits.shape[-1]
    while True:
        candidates = logits.topk(min(count, vocab)).values
        cumulative = (candidates - normalizer).exp().cumsum(-1, dtype=torch.float64)
        if count >= vocab or (cumulative[..., -1] >= top_p).all():
            break
        count *= 16
    last = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=candidates.shape[-1] - 1)
    return candidates.gather(-1, last)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
