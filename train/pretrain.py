"""Pretrain an Eagle or Finch model on token shards.

    torchrun --nproc-per-node 8 train/pretrain.py CONFIG.toml [--set table.key=value]... [--dry-run]
    python train/pretrain.py CONFIG.toml                                               (one process)

Run the same command again to go on from the newest checkpoint of [checkpoint] folder. Read train() below first.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

# OpenMP's threads spin while they wait. Beside another job on the same two cores both then crawl: 3,450 tokens/s fell
# to 140. With a short spin two jobs get 980 each, and one alone loses 9 %. libgomp reads this when torch loads it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

if __package__ in (None, ""):  # started as a script: make `train` importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rwkv_ext import _load
from rwkv_ext.host_memory import keep_freed_memory
from rwkv_ext.models import RWKV, RWKVConfig
from rwkv_ext.tokenizer import WorldTokenizer
from train.checkpoint import CheckpointStore, Progress, check_identity, complete_checkpoints
from train.config import Config
from train.config_file import dump_config, load_config
from train.data import HeldOut, TrainingData
from train.display import Display
from train.distributed import Ranks, shard_model, start_ranks
from train.hardware import choose_dtype, peak_flops
from train.loop import Run, draw, fit
from train.metrics import MetricsLog
from train.optim import make_optimizer
from train.plan import plan_lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after printing what went wrong and what to do about it."""
    parser = argparse.ArgumentParser(prog="pretrain.py", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="TOML file; examples in train/configs")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override one key")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and exit")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    args = parser.parse_args(argv)
    started = monotonic()
    if _load.error:
        print(f"error: {_load.error}", file=sys.stderr)
        return 1
    try:
        ranks = None
        config = load_config(args.config, args.set)
        ranks = start_ranks(config.train)
        train(config, ranks, args.dry_run, started)
        ranks.stop()
    except (ValueError, OSError, FloatingPointError) as error:
        if args.traceback:
            raise
        rank = int(os.environ.get("RANK", "0"))
        if ranks is not None or rank == 0:  # a mistake in the file is the same on every rank
            text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else error
            print(f"{'' if rank == 0 else f'[rank {rank}] '}error: {text}", file=sys.stderr, flush=True)
        return 1
    except (RuntimeError, MemoryError) as error:
        text = explain(error, ranks)
        if args.traceback or text is None:
            raise
        print(f"[rank {os.environ.get('RANK', '0')}] error: {text}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:  # in a step it is Interrupt's
        print("interrupted between steps; run the same command again to go on", file=sys.stderr, flush=True)
        return 130
    return 0


def explain(error: RuntimeError | MemoryError, ranks: Ranks | None) -> str | None:
    """Return what happened and what to do, or None for an error that is not the user's."""
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
    if memory:
        return (
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'Python'}); lower train.micro_batch, set "
            "train.activation_checkpointing = true or take a smaller model (--dry-run estimates the memory), then run "
            "again to go on from the last checkpoint"
        )
    if ranks is not None and ranks.size > 1 and "onnection" in str(error):
        return "another rank ended; its message says why"
    return None


def train(config: Config, ranks: Ranks, dry_run: bool, started: float) -> None:
    """Open the data, build the model, resume, train and export; or print the plan."""
    data = TrainingData(config, ranks)
    held_out = HeldOut(config, ranks) if config.data.validation else None
    sizes = RWKVConfig(**config.model.sizes())
    plan = plan_lines(config, sizes, ranks, data, held_out)
    identity = run_identity(config, sizes, data)
    if dry_run:
        data.close()
        for checkpoint in complete_checkpoints(Path(config.checkpoint.folder))[-1:]:
            check_identity(checkpoint, CheckpointStore.read_state(checkpoint)["identity"], identity)
            plan.append(f"would go on from {checkpoint}")
        if ranks.first:
            print("\n".join(plan))
        return

    store = CheckpointStore(config.checkpoint.folder, config.checkpoint.keep, ranks)
    display = Display(ranks.first, config.log.every)
    try:
        for line in plan:
            display.note(line)
        progress, checkpoint = find_start(config, ranks, store, identity, display)
        micro_tokens = config.train.micro_batch * config.data.ctx_len
        if config.train.dtype != "auto" or not progress.dtype:
            chosen = ranks.from_first(choose_dtype(config.train.dtype, ranks.device, micro_tokens, sizes.n_embd))
            if progress.dtype not in ("", chosen):
                display.note(f"train.dtype is {chosen} now, not {progress.dtype}: the losses will differ a little")
            progress.dtype = chosen
        if ranks.device.type == "cpu":
            keep_freed_memory()
        model = build_model(config, sizes, ranks)
        flops_per_token = model.flops_per_token()
        shard_model(model, config.train, ranks)
        optimizer = make_optimizer(model, config.optim)
        if checkpoint:
            store.load(checkpoint, model, optimizer)
        peak, peak_source = peak_flops(ranks.device, progress.dtype, micro_tokens, sizes.n_embd)
        display.note(f"number format {progress.dtype}; MFU relative to {ranks.size} x {peak_source}")
        log = MetricsLog(store.folder, config.log.tensorboard, progress.step) if ranks.first else None
        if log:
            log.event("resume" if checkpoint else "start", progress.step if checkpoint else -1)
        token_bytes = WorldTokenizer().byte_lengths if config.data.vocabulary == "world" else None

        run = Run(
            config, dump_config(config), identity, ranks, model, optimizer, data, held_out, token_bytes, progress,
            store, log, display, flops_per_token, peak * ranks.size, started,
        )  # fmt: skip
        finished = fit(run)
        draw(run)
        if finished:
            path = store.folder / "final.pth"
            export(model, sizes, path, config.checkpoint.export_dtype, ranks)
            display.note(f"finished: {progress.step} steps, {progress.tokens:,} tokens; the model is {path}")
        else:
            display.note(f"stopped after step {progress.step}; run the same command again to go on from there")
    finally:
        display.close()
        data.close()
        store.close()
    if log:
        log.close()


def run_identity(config: Config, sizes: RWKVConfig, data: TrainingData) -> dict[str, Any]:
    """Return what must not change between a checkpoint and its resume, by the name of the key that decides it."""
    return {
        **{f"model.{key}": value for key, value in asdict(sizes).items()},
        "data.mode": config.data.mode,
        "data.ctx_len": config.data.ctx_len,
        "data.weights (the order of samples)": config.data.weights,
        "data.prime": data.sampler.prime,
        "data.train (its fingerprint)": data.sampler.fingerprint(),
    }


def find_start(
    config: Config, ranks: Ranks, store: CheckpointStore, identity: dict[str, Any], display: Display
) -> tuple[Progress, Path | None]:
    """Return where the run stands and the checkpoint to load, if there is one."""
    total = 0 if config.train.minutes else config.whole_steps(config.train.tokens)
    limits = [config.train.minutes, config.train.tokens]
    checkpoint = store.newest()
    if checkpoint is None:
        return Progress(total_tokens=total, limits=limits), None
    if not config.checkpoint.resume:
        raise ValueError(
            f"checkpoint.folder must not hold a checkpoint when checkpoint.resume is false, got {checkpoint}; "
            "set checkpoint.resume = true to go on from it, or choose another folder"
        )
    state = store.read_state(checkpoint)
    check_identity(checkpoint, state["identity"], identity)
    progress = Progress(**state["progress"])
    display.note(f"resuming from {checkpoint}: step {progress.step}, {progress.tokens:,} tokens")
    if (state["ranks"], state["threads"], state["torch"]) != (ranks.size, ranks.threads, torch.__version__):
        display.note(
            f"saved with {state['ranks']} ranks x {state['threads']} threads and torch {state['torch']}, now "
            f"{ranks.size} x {ranks.threads} and {torch.__version__}: the same samples, but sums may round differently"
        )
    if total and total != progress.total_tokens:
        display.note(f"the run ends at {total:,} tokens now, not {progress.total_tokens:,}: the cosine is another one")
        progress.total_tokens = total
    if config.train.minutes and progress.limits != limits:
        display.note(f"the run has {config.train.minutes:g} minutes in all now: its length is chosen anew")
        spent = progress.seconds >= 60 * config.train.minutes
        spent |= 0 < config.train.tokens <= progress.tokens
        progress.total_tokens = progress.tokens if spent else 0
    progress.limits = limits
    return progress, checkpoint


def build_model(config: Config, sizes: RWKVConfig, ranks: Ranks) -> RWKV:
    """Create the model with its initial weights in fp32; every rank draws the same numbers."""
    with torch.device("meta"):
        model = RWKV(sizes)
    model.to_empty(device=ranks.device)
    generator = torch.Generator(ranks.device).manual_seed(config.train.seed)
    model.init_weights(config.model.init, generator=generator, lr_init=config.optim.lr)
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


def export(model: RWKV, sizes: RWKVConfig, path: Path, dtype: str, ranks: Ranks) -> None:
    """Write the weights as a .pth file that every RWKV tool loads; OSError on all ranks if that fails."""
    if hasattr(model, "unshard"):  # FSDP2: collect the pieces on rank 0
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        with torch.device("meta"):
            model = RWKV(sizes)
        if ranks.first:
            model.load_state_dict(weights, assign=True)
    error = None
    if ranks.first:
        try:
            model.save_pretrained(path, torch.bfloat16 if dtype == "bf16" else torch.float32)
        except OSError as problem:
            error = problem
    ranks.raise_together(error)


if __name__ == "__main__":
    sys.exit(main())
