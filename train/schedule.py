"""Learning rate and run length as pure functions: a resumed run needs no scheduler state, only tokens and steps."""

import math


def learning_rate(
    step: int,
    tokens: int,
    total_tokens: int,
    step_tokens: int,
    lr: float,
    lr_final: float,
    warmup_steps: int,
    warmup_floor: float,
) -> float:
    """Return the rate of optimizer step `step` (from 0), before which `tokens` tokens were seen.

    Cosine from lr to lr_final over the tokens after warm-up, times floor + (1 - floor) step / warmup_steps during it
    (arXiv 2404.05892, appendix H, has floor 0.2; the newest official code 0.01). total_tokens = 0 means not known yet:
    the cosine has not begun.
    """
    warmup_tokens = warmup_steps * step_tokens
    progress = 0.0
    if total_tokens > 0:
        progress = (tokens - warmup_tokens) / max(1, total_tokens - warmup_tokens)
        progress = min(1.0, max(0.0, progress))
    ratio = lr_final / lr
    rate = lr * ((1 + ratio) / 2 + (1 - ratio) / 2 * math.cos(math.pi * progress))
    if step < warmup_steps:
        rate *= warmup_floor + (1 - warmup_floor) * step / warmup_steps
    return rate


def steps_that_fit(
    seconds_left: float, step_seconds: float, validation_seconds: float, validate_every: int, closing_seconds: float
) -> int:
    """Return how many more optimizer steps fit into seconds_left, with their validations and what closes the run."""
    usable = seconds_left - validation_seconds - closing_seconds
    per_step = step_seconds + (validation_seconds / validate_every if validate_every else 0.0)
    return max(0, int(usable / max(per_step, 1e-9)))
