"""From logits to the next token: top-k, top-p, min-p, typical-p, temperature, one draw. Pure functions, no state.

Order and rules follow the `rwkv` package: top-p, top-k and min-p each choose tokens from the softmax at temperature 1,
a token must be chosen by all, and temperature then reshapes the survivors only. typical-p, which that package lacks,
chooses among the survivors before temperature. Three differences to the package: top_p >= 1 means off (there, the
rounded sum of the probabilities often misses 1.0 and the choice collapses to the most probable token); tokens equal
to the last one that top-k keeps are kept too; temperature 0 takes the lowest of equal ids.

temperature_first is the order of Hugging Face's generate(): temperature, top-k, top-p, min-p, typical-p, each choosing
from what the one before left, made to sum to 1 again. The one difference: tokens equal to the last one kept are kept.

Shapes: logits [..., V] in any float dtype; results are computed in fp32 (fp64 for fp64). On a CPU every row's result
has the same bits whatever the other rows are: rows of a batch are sampled as they would be alone.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 2**32 - 1
_FIRST_GUESS = 256  # tokens of a nucleus looked for before trying more; sorting all of 65536 takes milliseconds


def check_options(
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    temperature_first: bool = False,
) -> None:
    """Raise ValueError that names the first option out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sampling: temperature must be >= 0 and finite, got {temperature}; 0 takes the best token")
    if not top_p >= 0:
        raise ValueError(f"sampling: top_p must be >= 0, got {top_p}; 1 turns it off")
    if not 0 <= top_k < math.inf or top_k != int(top_k):
        raise ValueError(f"sampling: top_k must be a whole number >= 0, got {top_k}; 0 turns it off")
    if not 0 <= min_p <= 1:
        raise ValueError(f"sampling: min_p must be from 0 to 1, got {min_p}; 0 turns it off")
    if not typical_p > 0:
        raise ValueError(f"sampling: typical_p must be > 0, got {typical_p}; 1 turns it off")


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    temperature_first: bool = False,
) -> Tensor:
    """Return the distribution [..., V] that sample() draws from.

    top_p: the smallest set of most probable tokens whose probabilities reach top_p, and their equals; 0 leaves the
    most probable alone. top_k: the k most probable tokens and their equals; 0 is off. min_p: tokens at least min_p
    times as probable as the most probable one; 0 is off. typical_p: the smallest set of tokens whose surprise is
    nearest to the entropy and whose probabilities reach typical_p; 1 is off. temperature 0 puts everything on the
    most probable token, the lowest id among equals. A logit of -inf bans a token.
    Raises ValueError for logits that hold nan or +inf, or nothing but -inf, and as check_options does.
    """
    check_options(temperature, top_p, top_k, min_p, typical_p)
    logits = _wide(logits)
    largest = logits.amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError(
            f"sampling: logits must be finite, or -inf where banned, got {largest.flatten().tolist()} as the largest; "
            "the weights or the state of the model have overflowed, or every token is banned"
        )
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    # A tiny temperature may overflow to -inf, which is right: the largest logit stays 0. Rounded to 0 it would be nan.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    logits = logits - largest
    if temperature_first:
        logits, temperature = logits / temperature, 1.0
    survivors = logits
    if 0 < top_k < logits.shape[-1]:
        survivors = _from(logits, logits.topk(int(top_k)).values[..., -1:])
    if top_p < 1:
        source = survivors if temperature_first else logits
        survivors = _from(survivors, _cutoff(source, source.softmax(-1), top_p))
    if min_p > 0:
        survivors = survivors.masked_fill(logits < math.log(min_p), -math.inf)
    if typical_p < 1:
        survivors = _typical(survivors, typical_p)
    return (survivors / temperature).softmax(-1)


def sample(logits: Tensor, *, generator: torch.Generator | None = None, **options) -> Tensor:
    """Draw one token id per row of logits [..., V]; int64 [...]. options are those of probabilities().

    Each row takes one random number from generator (a CPU generator, whatever the device of logits; None is
    torch's global one), so the same seed draws the same tokens on every device, as far as the logits are equal.
    """
    rows = logits.shape[:-1]
    keys = torch.randint(2**63 - 1, rows, generator=generator, device="cpu")
    chances = probabilities(logits, **options).reshape(-1, logits.shape[-1])
    return pick(chances, keys.flatten().tolist()).view(rows)


def draw_key(seed: int, position: int) -> int:
    """Return the key of 64 bits with which a text of this seed draws its token number `position`.

    A hash, not a generator: it has no state to carry along, so a text that was saved, forked or interrupted goes on
    as it would have, and the texts of a batch draw as they would alone.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest(), "little")


def pick(probabilities: Tensor, keys: Sequence[int]) -> Tensor:
    """Draw a token id, int64 [B], from each row of probabilities [B, V] with its key of 64 bits, as of draw_key().

    A race: token i arrives after an exponential waiting time of rate p_i, drawn for (key, i), and the first one wins.
    Probabilities that differ by rounding then give another token only where two arrive at nearly the same moment. A
    number that is looked up in cumulative sums, the common way, would be near one of 65536 borders a thousand times
    as often.
    """
    ids = torch.arange(probabilities.shape[-1], device=probabilities.device)
    possible = probabilities > 0
    if not possible.all():
        ids = ids[possible.any(0)]
        probabilities = probabilities[:, ids]
    return ids[(probabilities / _waiting_times(keys, ids)).argmax(-1)]


def _waiting_times(keys: Sequence[int], ids: Tensor) -> Tensor:
    """Return an exponential variate, fp64 [B, len(ids)], for every key and id: the same on every device."""
    low = torch.tensor([key & _WORD for key in keys], device=ids.device)[:, None]
    high = torch.tensor([key >> 32 & _WORD for key in keys], device=ids.device)[:, None]
    words = _mix(_mix(ids ^ low).bitwise_xor_(high))
    return words.double().add_(0.5).mul_(2.0**-32).log_().neg_()


def _mix(words: Tensor) -> Tensor:
    """Scatter numbers of 32 bits, held in int64, one to one: each bit of the result depends on all bits given.

    In place. The multipliers are odd and below 2**31, so that products stay within int64.
    """
    words.bitwise_xor_(words >> 15).mul_(0x2C1B3C6D).bitwise_and_(_WORD)
    words.bitwise_xor_(words >> 12).mul_(0x297A2D39).bitwise_and_(_WORD)
    return words.bitwise_xor_(words >> 15)


def _from(logits: Tensor, cutoff: Tensor) -> Tensor:
    return logits.masked_fill(logits < cutoff, -math.inf)


def _cutoff(keys: Tensor, p: Tensor, mass: float) -> Tensor:
    """Return the key [..., 1] of the token at which the sum of p, largest keys first, reaches mass."""
    count, vocab = _FIRST_GUESS, keys.shape[-1]
    while True:
        best = keys.topk(min(count, vocab))
        cumulative = p.gather(-1, best.indices).cumsum(-1, dtype=torch.float64)
        if count >= vocab or (cumulative[..., -1] >= mass).all():
            break
        count *= 16
    last = (cumulative < mass).sum(-1, keepdim=True).clamp(max=best.values.shape[-1] - 1)
    return best.values.gather(-1, last)


def _typical(logits: Tensor, mass: float) -> Tensor:
    """Ban all but the smallest set of tokens nearest to the typical surprise, the entropy, that reaches mass."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    # cumsum adds one row as it adds many; torch.sum splits a single long row between threads.
    entropy = -torch.where(p > 0, p * log_p, 0).cumsum(-1, dtype=torch.float64)[..., -1:].to(log_p)
    nearness = -(-log_p - entropy).abs()
    # A banned token is infinitely far; so may the cutoff be, by rounding, but then it bans nothing that was left.
    return logits.masked_fill(nearness < _cutoff(nearness, p, mass), -math.inf)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
