"""The plan of a run as text: what --dry-run prints, and the head of every run's output."""

from collections.abc import Iterator

import torch

from rwkv_ext.data.sampler import Sampler
from rwkv_ext.data.weighted_sampler import WeightedSampler
from rwkv_ext.models import RWKV, RWKVConfig
from train.config import Config
from train.data import HeldOut, TrainingData
from train.distributed import Ranks
from train.hardware import memory_estimate
from train.optim import group_of


def plan_lines(
    config: Config, sizes: RWKVConfig, ranks: Ranks, data: TrainingData, held_out: HeldOut | None
) -> list[str]:
    """Describe model, data, batch, length and memory; nothing is allocated for it."""
    with torch.device("meta"):
        model = RWKV(sizes)
    count, train = model.parameter_count(), config.train
    decayed = sum(p.numel() for name, p in model.named_parameters() if group_of(name, p.shape) == "matrix")
    name = {"6.0": "Finch", "5.2": "Eagle"}[sizes.version]
    accumulation = train.accumulation(ranks.size)
    shards = ranks.size if train.sharding == "fsdp" else 1
    micro_tokens = train.micro_batch * config.data.ctx_len
    dtype = "bf16" if train.dtype == "auto" else train.dtype
    memory = memory_estimate(sizes, count, micro_tokens, dtype, train.activation_checkpointing, shards)
    lines = [
        f"model       {name} L{sizes.n_layer} D{sizes.n_embd} V{sizes.vocab_size}: {count:,} parameters, "
        f"{decayed:,} of them with weight decay",
        f"data        {_data(config, data)}, mode {config.data.mode}"
        + (f"; held out: {len(held_out)} windows" if held_out else "; no held-out text"),
        *_source_lines(config, data),
        f"batch       {train.global_batch} windows = {config.step_tokens:,} tokens per step: micro-batch "
        f"{train.micro_batch} x {ranks.size} ranks x {accumulation} passes",
        f"length      {_length(config, data)}",
        f"memory      about {_bytes(sum(memory.values()))} per rank: "
        + ", ".join(f"{key} {_bytes(value)}" for key, value in memory.items()),
        f"device      {ranks.device.type}, {ranks.threads} threads per rank, {train.sharding}",
        f"folder      {config.checkpoint.folder}",
    ]
    return lines


def _data(config: Config, data: TrainingData) -> str:
    sampler, ctx_len = data.sampler, config.data.ctx_len
    if isinstance(sampler, WeightedSampler):
        return f"{sampler.n_tokens:,} tokens in {len(sampler.samplers)} sources, samples of {ctx_len}"
    return f"{_tokens(sampler)}, {sampler.samples_per_pass:,} samples of {ctx_len} per pass"


def _source_lines(config: Config, data: TrainingData) -> Iterator[str]:
    """Say of each source with a weight how much there is and how much of it the run takes."""
    if not isinstance(data.sampler, WeightedSampler):
        return
    samples = config.whole_steps(config.train.tokens) // config.data.ctx_len
    for entry, source, share in zip(config.data.train, data.sampler.samplers, data.sampler.shares, strict=True):
        passes = f", {samples * share / source.samples_per_pass:.2f} passes" if samples else ""
        slots = f"{source.samples_per_pass:,} per pass{passes}"
        yield f"source      {entry}: {_tokens(source)}, {share:.2%} of the samples, {slots}"


def _tokens(sampler: Sampler) -> str:
    shards = len(sampler.stream.shards)
    return f"{sampler.n_tokens:,} tokens" + (f" in {shards:,} shards" if shards > 1 else "")


def _length(config: Config, data: TrainingData) -> str:
    parts = []
    if config.train.minutes:
        parts.append(f"what fits into {config.train.minutes:g} minutes, known after the first steps")
    if config.train.tokens:
        tokens = config.whole_steps(config.train.tokens)
        limit = "at most " if config.train.minutes else ""
        length = f"{limit}{tokens:,} tokens = {tokens // config.step_tokens:,} steps"
        if isinstance(data.sampler, Sampler):
            length += f" = {tokens / config.data.ctx_len / data.sampler.samples_per_pass:.2f} passes"
        parts.append(length)
    return ", ".join(parts) + ("" if config.train.minutes else "; the time is known after the first steps")


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit != "MB" else f"{count:.3g} MB"
        count /= 1000
    return f"{count:,.1f} GB"
