"""The training loop: one optimizer step, one validation, and fit(), which repeats them until tokens or time are up."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import monotonic

import numpy as np
import torch
from torch import nn

from train.checkpoint import CheckpointStore, Progress
from train.config import Config
from train.data import Batch, HeldOut, TrainingData
from train.display import Display, Reading
from train.distributed import Ranks, reshard, sum_gradients
from train.interrupt import Interrupt
from train.metrics import MetricsLog
from train.optim import clipped_step, gradient_norm, set_learning_rate
from train.plot import draw_loss
from train.schedule import learning_rate, steps_that_fit

CALIBRATION_STEPS = 20  # before the first guess of how long a run with a time limit may be
CLOSING_SHARE = 0.02  # of the time limit, for the last checkpoint and the export
SETTLING_STEPS = 3  # not timed: first touches of memory, thread pools


@dataclass
class Run:
    """Everything fit() works with, built by train.pretrain."""

    config: Config
    config_text: str
    identity: dict
    ranks: Ranks
    model: nn.Module
    optimizer: torch.optim.AdamW
    data: TrainingData
    held_out: HeldOut | None
    token_bytes: np.ndarray | None
    progress: Progress
    store: CheckpointStore
    log: MetricsLog
    display: Display
    flops_per_token: int
    """Forward and backward."""
    peak_flops: float
    """Of all ranks together."""
    started: float
    """time.monotonic() when this process began."""

    def autocast(self) -> AbstractContextManager:
        """bf16 products over fp32 weights, or nothing."""
        enabled = self.progress.dtype == "bf16"
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=enabled)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    batches: list[Batch],
    step: int,
    step_tokens: int,
    grad_clip: float,
    ranks: Ranks,
    autocast: Callable[[], AbstractContextManager],
    signal: Callable[[], float] = lambda: 0.0,
) -> tuple[float, float, float]:
    """Take optimizer step number `step` on this rank's batches; the learning rates are set already.

    The loss (and L2Wrap with it) is divided by step_tokens, the tokens of all ranks, and gradients are summed: any
    split into ranks and micro-batches gives the same gradient up to rounding. Returns (mean loss, gradient norm before
    clipping, sum of signal() over the ranks), equal on all ranks. Raises FloatingPointError on all ranks, with weights
    and moments untouched, if loss or norm is not finite.
    """
    losses = []
    for batch in batches:
        with autocast():
            loss, _ = model(batch.tokens, cu_seqlens=batch.cu_seqlens, targets=batch.targets)
        share = batch.targets.numel() / step_tokens
        (loss * share).backward()
        losses.append(loss.detach().double() * share)
    sum_gradients(model, ranks)
    norm = gradient_norm(model).item()
    local = torch.stack(losses).tolist()
    loss, signals = ranks.sum([sum(local), signal()])
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        raise FloatingPointError(_not_finite(step, loss, norm, local, batches, ranks))
    clipped_step(optimizer, norm, grad_clip)
    optimizer.zero_grad()
    return loss, norm, signals


def _not_finite(
    step: int, loss: float, norm: float, local: list[float], batches: list[Batch], ranks: Ranks
) -> str:
    bad = [f"{b.samples[0]}-{b.samples[-1]}" for x, b in zip(local, batches, strict=True) if not math.isfinite(x)]
    used = (batches[0].samples[0], batches[-1].samples[-1])
    reports = ranks.gather((bad, used))
    where = [f"rank {rank}, samples {', '.join(ranges)}" for rank, (ranges, _) in enumerate(reports) if ranges]
    if not where:
        first, last = min(used[0] for _, used in reports), max(used[1] for _, used in reports)
        where = [f"every loss is finite; ranks 0 to {len(reports) - 1}, samples {first}-{last}"]
    return (
        f"step {step}: loss is {loss}, gradient norm is {norm} ({'; '.join(where)}); the weights were not changed; "
        "lower optim.lr or optim.beta2 and run again to go on from the last checkpoint"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    held_out: HeldOut,
    token_bytes: np.ndarray | None,
    ranks: Ranks,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[float, float | None]:
    """Return (nats per token, bits per byte) over the fixed windows.

    token_bytes[id] is the number of bytes a token stands for; without it there are no bits per byte.
    """
    nats = tokens = size = 0.0
    for batch, counts in held_out.batches():
        with autocast():
            loss, _ = model(batch.tokens, cu_seqlens=batch.cu_seqlens, targets=batch.targets)
        if counts:
            nats += loss.double().item() * batch.targets.numel()
            tokens += batch.targets.numel()
            if token_bytes is not None:
                size += float(token_bytes[batch.targets.cpu().numpy()].sum(dtype=np.int64))
    reshard(model)
    nats, tokens, size = ranks.sum([nats, tokens, size])
    return nats / tokens, nats / math.log(2) / size if size else None


def fit(run: Run) -> bool:
    """Train from run.progress to the end; return False if it was interrupted (the checkpoint is saved either way)."""
    config, progress, ranks = run.config, run.progress, run.ranks
    optim, step_tokens = config.optim, config.step_tokens
    earlier = progress.seconds
    pace = Pace()
    validation_seconds = validate(run) if progress.step == 0 else 0.0
    with Interrupt(announce=ranks.first) as interrupt:
        while not progress.total_tokens or progress.tokens < progress.total_tokens:
            begin = monotonic()
            rate = learning_rate(
                progress.step, progress.tokens, progress.total_tokens, step_tokens,
                optim.lr, optim.lr_final, optim.warmup_steps, optim.warmup_floor,
            )  # fmt: skip
            set_learning_rate(run.optimizer, rate)
            batches = run.data.take(progress.next_sample)
            loss, norm, stop = train_step(
                run.model, run.optimizer, batches, progress.step + 1, step_tokens,
                optim.grad_clip, ranks, run.autocast, lambda: float(interrupt.requested),
            )  # fmt: skip
            progress.step += 1
            progress.tokens += step_tokens
            progress.next_sample += config.train.global_batch
            pace.add(monotonic() - begin)
            progress.seconds = earlier + monotonic() - run.started
            if config.train.minutes:
                recalibrate(run, pace, validation_seconds)
            report(run, loss, norm, rate, pace, validation_seconds)

            ended = 0 < progress.total_tokens <= progress.tokens
            if ended or _due(progress.step, config.log.validate_every):
                validation_seconds = validate(run)
            if ended or stop:
                save(run)
                return ended
            if _due(progress.step, config.checkpoint.every):
                try:
                    save(run)
                except OSError as error:
                    # What was learnt is in memory: go on, someone may free the disk before the next save.
                    run.display.note(f"WARNING: {error.strerror}. Training goes on and will try again.")
    return True


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Pace:
    """Seconds per optimizer step: the last one's, and the mean over this process's steps but the first few."""

    def __init__(self) -> None:
        self.steps, self.last, self._timed, self._seconds = 0, 0.0, 0, 0.0

    def add(self, seconds: float) -> None:
        """Count one step."""
        self.steps += 1
        self.last = seconds
        if self.steps > SETTLING_STEPS:
            self._timed += 1
            self._seconds += seconds

    @property
    def seconds(self) -> float:
        """The mean, or the last step's time while there is none."""
        return self._seconds / self._timed if self._timed else self.last


def recalibrate(run: Run, pace: Pace, validation_seconds: float) -> None:
    """Set the end of a run with a time limit: rank 0 measures, and the cosine follows. Kept in the checkpoint."""
    progress, config = run.progress, run.config
    if pace.steps < CALIBRATION_STEPS:
        return
    limit = 60 * config.train.minutes
    steps = steps_that_fit(
        limit - progress.seconds, pace.seconds, validation_seconds, config.log.validate_every, CLOSING_SHARE * limit
    )
    total = progress.tokens + steps * config.step_tokens
    if config.train.tokens:
        total = min(total, config.whole_steps(config.train.tokens))
    progress.total_tokens = run.ranks.from_first(total)


def report(run: Run, loss: float, norm: float, rate: float, pace: Pace, validation_seconds: float) -> None:
    """Log and show one step."""
    if not run.ranks.first:
        return
    progress, config = run.progress, run.config
    left = None
    if progress.total_tokens:
        steps = (progress.total_tokens - progress.tokens) // config.step_tokens
        validations = steps / config.log.validate_every if config.log.validate_every else 0
        left = steps * pace.seconds + (validations + 1) * validation_seconds
    speed = config.step_tokens / pace.last
    run.log.record(
        progress.step, progress.tokens, loss=loss, lr=rate, grad_norm=norm, tokens_per_second=round(speed, 1),
        mfu=round(speed * run.flops_per_token / run.peak_flops, 4), data_wait=round(run.data.waited / pace.last, 4),
        seconds=round(progress.seconds, 2),
    )  # fmt: skip
    total_steps = progress.total_tokens // config.step_tokens
    speed = config.step_tokens / pace.seconds
    mfu = speed * run.flops_per_token / run.peak_flops
    run.display.step(
        Reading(
            progress.step, progress.tokens, progress.total_tokens, total_steps, loss, rate, norm, speed, mfu, left,
            run.data.waited / pace.last,
        )  # fmt: skip
    )


def validate(run: Run) -> float:
    """Measure the held-out windows, log, show and draw the result; return the seconds it took."""
    if run.held_out is None:
        return 0.0
    begin = monotonic()
    loss, bits = evaluate(run.model, run.held_out, run.token_bytes, run.ranks, run.autocast)
    if run.ranks.first:
        run.log.record(run.progress.step, run.progress.tokens, validation_loss=loss, bits_per_byte=bits)
        run.display.validation(run.progress.step, loss, bits)
        draw(run)
    return monotonic() - begin


def draw(run: Run) -> None:
    """Draw loss.png; a full disk costs the picture, not the run."""
    if run.ranks.first and run.config.log.picture:
        folder = run.store.folder
        try:
            draw_loss(folder / "log.jsonl", folder / "loss.png", run.config.log.baselines, title=folder.name)
        except OSError as error:
            run.display.note(f"WARNING: {folder / 'loss.png'} could not be drawn ({error}).")


def save(run: Run) -> None:
    """Write a checkpoint and say where."""
    path = run.store.save(run.model, run.optimizer, run.progress, run.identity, run.config_text)
    run.display.note(f"saved {path}")
