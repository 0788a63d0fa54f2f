"""Batches of a run: which samples a step takes, how windows become model inputs, and the held-out windows.

A step takes the next global_batch samples, whatever the number of ranks and the micro-batch; only their distribution
over ranks and forward passes changes.
"""

import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic

import numpy as np
import torch

from rwkv_ext.data.sampler import Sampler
from rwkv_ext.data.token_stream import TokenStream, open_maps, read_windows
from rwkv_ext.data.weighted_sampler import WeightedSampler
from train.config import Config
from train.distributed import Ranks

END_OF_DOCUMENT = 0


@dataclass(frozen=True)
class Batch:
    """One forward pass: tokens and targets [B, T] ([1, B T] when packed), and the sample numbers (from 1) in it."""

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None
    samples: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        """Return it on `device`; from pinned memory the copy is left to the GPU, after what it has to do already."""
        tensors = (self.tokens, self.targets, self.cu_seqlens)
        return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in tensors), self.samples)


def make_batch(windows: np.ndarray, mode: str, device: torch.device, samples: Sequence[int] = ()) -> Batch:
    """Turn windows [B, T + 1] into a Batch in the host's memory, pinned if `device` is a GPU.

    "stream": B rows of T tokens. "packed": one row of B T tokens in which a sequence (with a state of its own) ends
    after every token 0 and at the end of every window; the target of a token 0 is still the first token after it.
    """
    tokens, targets = windows[:, :-1], windows[:, 1:]
    cu_seqlens = None
    if mode == "packed":
        width = tokens.shape[1]
        tokens, targets = tokens.reshape(1, -1), targets.reshape(1, -1)
        edges = np.union1d(np.flatnonzero(tokens[0] == END_OF_DOCUMENT) + 1, np.arange(0, tokens.size + 1, width))
        cu_seqlens = _host_tensor(edges, device)
    return Batch(_host_tensor(tokens, device), _host_tensor(targets, device), cu_seqlens, tuple(samples))


def _host_tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.empty(values.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    tensor.numpy()[...] = values
    return tensor


class TrainingData:
    """The batches of this rank. A thread reads [data] prefetch steps ahead of the loop, and its errors reach the loop.

    Attributes: sampler; waited, the seconds that the last `take` had to wait.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        """Open the shards; FileNotFoundError or ValueError from the stream or the sampler names what is wrong."""
        self._config, self._ranks = config, ranks
        self._accumulation = config.train.accumulation(ranks.size)
        self.sampler = make_sampler(config)
        self.waited = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: deque[tuple[int, Future]] = deque()  # (next_sample, its batches), in the order of the steps

    def take(self, next_sample: int) -> list[Batch]:
        """Return this rank's batches of the step that uses samples next_sample + 1 ... + global_batch, on its device.

        What reading these samples raised in the thread is raised here.
        """
        begin = monotonic()
        if not self._ahead or self._ahead[0][0] != next_sample:
            self._drop()
        self._read_ahead(next_sample)
        batches = [batch.to(self._ranks.device) for batch in self._ahead.popleft()[1].result()]
        self._read_ahead(next_sample + self._config.train.global_batch)
        self.waited = monotonic() - begin
        return batches

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self, next_sample: int) -> None:
        """Have the thread read from this step on."""
        for step in range(len(self._ahead), self._config.data.prefetch):
            first = next_sample + step * self._config.train.global_batch
            self._ahead.append((first, self._thread.submit(self._read, first)))

    def _drop(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _read(self, next_sample: int) -> list[Batch]:
        """Read the whole step at once, so that the disk is asked for all of it before anything is waited for."""
        config, ranks, micro = self._config, self._ranks, self._config.train.micro_batch
        firsts = [next_sample + (index * ranks.size + ranks.rank) * micro for index in range(self._accumulation)]
        windows = self.sampler.batch([first + row for first in firsts for row in range(micro)], self.sampler.dtype)
        batches = []
        for first, rows in zip(firsts, windows.reshape(len(firsts), micro, -1), strict=True):
            check_vocabulary(rows, config.model.vocab_size, f"samples {first + 1}-{first + micro}")
            batches.append(make_batch(rows, config.data.mode, ranks.device, range(first + 1, first + micro + 1)))
        return batches


def check_vocabulary(windows: np.ndarray, vocab_size: int, where: str) -> None:
    """ValueError if a token has no row in the model's embedding."""
    least, largest = int(windows.min(initial=0)), int(windows.max(initial=0))
    if largest >= vocab_size or least < 0:
        wrong = least if least < 0 else largest
        raise ValueError(
            f"model.vocab_size must be above every token id, got {vocab_size} and token {wrong} in {where}; "
            "use the vocabulary the shards were made with"
        )


def check_shards(stream: TokenStream, vocab_size: int) -> None:
    """ValueError if a token in 16 places of a shard has no row; what a run reads is checked as it is read."""
    for shard in stream.shards:
        size = min(4096, shard.n_tokens)
        for start in np.linspace(0, shard.n_tokens - size, 16, dtype=np.int64):
            check_vocabulary(stream.read(shard.first + int(start), size), vocab_size, f"shard {shard.prefix}")


def make_sampler(config: Config) -> Sampler | WeightedSampler:
    """Open the training shards and return their order: of one stream, or with weights of a stream for each entry."""
    table = config.data
    entries = table.train if table.weights else [table.train]
    samplers = []
    for entry in entries:
        stream = TokenStream(entry, max(1, open_maps() // len(entries)))
        check_shards(stream, config.model.vocab_size)
        try:
            samplers.append(Sampler(stream, table.ctx_len, table.prime))
        except ValueError as error:
            raise ValueError(f"data.train {json.dumps(entry)}: {error}") from None
    return WeightedSampler(samplers, table.weights) if table.weights else samplers[0]


class HeldOut:
    """A fixed set of windows of the validation shards: the same in every validation, for any number of ranks."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._stream = TokenStream(config.data.validation)
        width, n_tokens = config.data.ctx_len, self._stream.n_tokens
        n_slots = max(0, n_tokens - 1) // width
        if not n_slots:
            raise ValueError(
                f"data.validation must hold a window of ctx_len + 1 = {width + 1} tokens, got {n_tokens} tokens; "
                "use more text or a smaller ctx_len"
            )
        count = min(n_slots, config.data.validation_windows or n_slots)
        self._starts = [index * n_slots // count * width for index in range(count)]

    def __len__(self) -> int:
        return len(self._starts)

    def batches(self):
        """Yield (Batch, counts) for this rank; counts is False for a repeat that only keeps the ranks in step."""
        micro, ranks = self._config.train.micro_batch, self._ranks
        for first in range(0, len(self._starts), micro * ranks.size):
            start = first + ranks.rank * micro
            chosen = self._starts[start : start + micro]
            places = [(self._stream, at) for at in chosen or self._starts[:1]]
            windows = read_windows(places, self._config.data.ctx_len + 1, self._stream.dtype)
            check_vocabulary(windows, self._config.model.vocab_size, "the validation shards")
            yield make_batch(windows, self._config.data.mode, ranks.device).to(ranks.device), bool(chosen)
