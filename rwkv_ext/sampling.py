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

import numpy as np
import torch
from torch import Tensor

_WORD = 2**32 - 1
_FIRST_GUESS = 256  # tokens of a nucleus that are looked for before all 65536 are sorted


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
        survivors = logits.masked_fill(logits < logits.topk(int(top_k)).values[..., -1:], -math.inf)
    if top_p < 1:
        p = (survivors if temperature_first else logits).softmax(-1)
        survivors = survivors.masked_fill(p < _nucleus(p, top_p), -math.inf)
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
    low = torch.tensor([key & _WORD for key in keys], device=probabilities.device)
    high = torch.tensor([key >> 32 & _WORD for key in keys], device=probabilities.device)
    possible = probabilities > 0
    if possible.all():
        ids = torch.arange(probabilities.shape[-1], device=probabilities.device)
        return (probabilities / _waiting_times(low[:, None], high[:, None], ids)).argmax(-1)
    row, ids = possible.nonzero(as_tuple=True)  # every racer of every row, one after the other
    rates = probabilities[row, ids] / _waiting_times(low[row], high[row], ids)
    best = rates.new_zeros(len(keys)).scatter_reduce_(0, row, rates, "amax")
    won = rates == best[row]
    none = torch.full((len(keys),), probabilities.shape[-1], device=ids.device)
    return none.scatter_reduce_(0, row[won], ids[won], "amin")


def _waiting_times(low: Tensor, high: Tensor, ids: Tensor) -> Tensor:
    """Return an exponential variate, fp64, for every key (in two words) and id: the same on every device."""
    words = _mix(_mix(ids ^ low).bitwise_xor_(high))
    return words.double().add_(0.5).mul_(2.0**-32).log_().neg_()


def _mix(words: Tensor) -> Tensor:
    """Scatter numbers of 32 bits, held in int64, one to one: each bit of the result depends on all bits given.

    In place. The multipliers are odd and below 2**31, so that products stay within int64.
    """
    words.bitwise_xor_(words >> 15).mul_(0x2C1B3C6D).bitwise_and_(_WORD)
    words.bitwise_xor_(words >> 12).mul_(0x297A2D39).bitwise_and_(_WORD)
    return words.bitwise_xor_(words >> 15)


def _nucleus(p: Tensor, mass: float) -> Tensor:
    """Return the probability [..., 1] of the token at which the sum of p, largest first, reaches mass."""
    rows = p.reshape(-1, p.shape[-1])
    cutoff, is_reached = _where_reached(best := rows.topk(min(_FIRST_GUESS, p.shape[-1])).values, best, mass)
    if not is_reached.all():
        every = _sorted(rows[~is_reached])
        cutoff[~is_reached], _ = _where_reached(every, every, mass)
    return cutoff.view(*p.shape[:-1], 1)


def _where_reached(keys: Tensor, p: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Return the key [B, 1] at which the sums of p [B, K] reach mass, the last one if none does, and whether [B]."""
    cumulative = p.cumsum(-1, dtype=torch.float64)
    place = (cumulative < mass).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    return keys.gather(-1, place), cumulative[:, -1] >= mass


def _typical(logits: Tensor, mass: float) -> Tensor:
    """Ban all but the smallest set of tokens nearest to the typical surprise, the entropy, that reaches mass."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    # cumsum adds one row as it adds many; torch.sum splits a single long row between threads.
    entropy = -torch.where(p > 0, p * log_p, 0).cumsum(-1, dtype=torch.float64)[..., -1:].to(log_p)
    distance = (-log_p - entropy).abs()  # of a banned token infinite
    order = _order(distance)
    nearest, their_p = (x.gather(-1, order).reshape(-1, x.shape[-1]) for x in (distance, p))
    cutoff, _ = _where_reached(nearest, their_p, mass)
    return logits.masked_fill(distance > cutoff.view(entropy.shape), -math.inf)


def _sorted(p: Tensor) -> Tensor:
    """Return p [B, V], largest first."""
    if p.is_cpu:  # numpy has vector instructions for it: thirty times faster
        return torch.from_numpy(np.sort(p.detach().numpy(), axis=-1)).flip(-1)
    return p.sort(-1, descending=True).values


def _order(distance: Tensor) -> Tensor:
    """Return the indices [..., V] that sort distance, smallest first."""
    if distance.is_cpu:
        return torch.from_numpy(np.argsort(distance.detach().numpy(), axis=-1))
    return distance.argsort(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
