"""How fast samples come from shards: random windows in the cubic order, beside NumPy's memmap and torch's DataLoader.

    python benchmarks/bench_data.py FOLDER --prepare                    # writes shards of --gigabytes, twice
    python benchmarks/bench_data.py FOLDER --output benchmarks/results/amd-epyc_2026-11_data.md

Every way gives the same batches of inputs and targets, int64 tensors [B, T], which is checked first. The peers do what
RWKV-LM's dataset does: one memory map, one window after the other, inputs and targets as tensors, stacked.
"""

import argparse
import ctypes
import mmap
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from common import header, table

from rwkv_ext.data.binidx import HEADER, MAGIC, shard_files
from rwkv_ext.data.sampler import Sampler
from rwkv_ext.data.token_stream import TokenStream
from train.data import make_batch

DOCUMENT = 1000  # tokens
BLOCK = 10_000_000  # tokens written at once
FEW_MAPS = 64
COLD_BATCH = 32
BUSY_GPU = 989e12 / (6 * 0.19e9)  # tokens/s of a 0.1B Finch (0.19 B parameters) if an H200 ran at its bf16 peak
ABOUT = """Tokens a second, the best of {rounds} rounds in which all ways take turns; all ways gave equal batches.

- Data: {gigabytes:g} GB of random uint16 tokens as one shard, and the same as {shards:,} shards.
- ours: the trainer's path, `Sampler.batch` and `make_batch`, in this process; many shards: as one stream; few maps: of
  which {few} stay mapped.
- memmap loop: numpy.memmap and RWKV-LM's formula, window by window, `torch.tensor` of inputs and targets, stacked, in
  this process. DataLoader: the same in torch's DataLoader with 0 or 2 worker processes.
- busy GPU: {need:,.0f} tokens/s, what a 0.1B Finch (0.19 B parameters, 6 operations a parameter and token) would take
  on an H200 at its peak of 989 TFLOPS in bf16. A real run takes less."""
WARM = "## Everything in the page cache"
COLD = """## Nothing in the page cache

As with a file larger than memory: before each round the files are dropped from the cache (posix_fadvise DONTNEED; at
most {stayed:.1%} of them stayed), then {samples} samples are read in batches of {batch}. NumPy's map reads ahead where
a window is not in memory (the disk's setting: here {readahead} KB, often 128); a stream's maps do not, and ask for a
whole batch at once."""


def prepare(folder: Path, gigabytes: float, shards: int) -> None:
    """Write the same random tokens as FOLDER/one and as FOLDER/many/*."""
    n_tokens = int(gigabytes * 5e8) // (shards * DOCUMENT) * shards * DOCUMENT
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "many").mkdir(parents=True)
    generator = np.random.default_rng(0)
    with open(shard_files(folder / "one")[0], "wb") as file:
        for begin in range(0, n_tokens, BLOCK):
            file.write(generator.integers(1, 65530, min(BLOCK, n_tokens - begin), np.uint16).data)
        os.fsync(file.fileno())
    tokens = np.memmap(shard_files(folder / "one")[0], np.uint16, "r")
    write_index(folder / "one", n_tokens)
    for number, part in enumerate(np.split(tokens, shards)):
        prefix = folder / "many" / f"{number:05d}"
        with open(shard_files(prefix)[0], "wb") as file:
            file.write(part.data)
            os.fsync(file.fileno())
        write_index(prefix, len(part))


def write_index(prefix: Path, n_tokens: int) -> None:
    count = n_tokens // DOCUMENT
    with open(shard_files(prefix)[1], "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
        file.write(np.full(count, DOCUMENT, "<i4").data)
        file.write((2 * DOCUMENT * np.arange(count, dtype="<i8")).data)
        file.write(np.arange(count + 1, dtype="<i8").data)


class Windows(torch.utils.data.Dataset):
    """The peers' dataset: window number i by RWKV-LM's formula from one numpy.memmap."""

    def __init__(self, path: Path, ctx_len: int, prime: int):
        self.tokens, self.ctx_len, self.prime = np.memmap(path, np.uint16, "r"), ctx_len, prime
        self.factor = int(prime * (5**0.5 - 1) / 2)

    def __len__(self) -> int:
        return self.prime

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = (self.factor * (index + 1) ** 3) % self.prime * self.ctx_len
        window = self.tokens[start : start + self.ctx_len + 1].astype(int)
        return torch.tensor(window[:-1], dtype=torch.long), torch.tensor(window[1:], dtype=torch.long)


def ours(sampler, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for first in range(0, 1 << 40, batch):
        made = make_batch(sampler.batch(range(first, first + batch), sampler.dtype), "stream", torch.device("cpu"))
        yield made.tokens, made.targets


def memmap_loop(windows: Windows, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for first in range(0, len(windows) - batch, batch):
        rows = [windows[index] for index in range(first, first + batch)]
        yield torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


def make_ways(samplers: dict, ctx_len: int, batch: int, path: Path) -> dict[str, Callable[[], Iterator]]:
    """Return each way's start: a function that returns an iterator of batches, with files of its own."""

    def windows() -> Windows:
        return Windows(path, ctx_len, samplers["ours"].prime)

    def loader(workers: int) -> Iterator:
        ahead = 4 if workers else None
        return iter(torch.utils.data.DataLoader(windows(), batch, num_workers=workers, prefetch_factor=ahead))

    def copy(name: str) -> Iterator:
        return ours(pickle.loads(pickle.dumps(samplers[name])), batch)

    return {
        **{name: partial(copy, name) for name in samplers},
        "memmap loop": lambda: memmap_loop(windows(), batch),
        "DataLoader 0": lambda: loader(0),
        "DataLoader 2": lambda: loader(2),
    }


def check_equal(ways: dict[str, Callable[[], Iterator]]) -> None:
    """Stop unless all ways give the same four batches."""
    expected = list(islice(ways["memmap loop"](), 4))
    for name, way in ways.items():
        for mine, other in zip(expected, islice(way(), 4), strict=True):
            if not all(torch.equal(a, b) for a, b in zip(mine, other, strict=True)):
                raise SystemExit(f"{name}: not the batches of the memmap loop")


def warm(ways: dict[str, Callable[[], Iterator]], rounds: int, seconds: float) -> dict[str, float]:
    """Return the most tokens a second of each way: they take turns, each for `seconds` a round."""
    best = dict.fromkeys(ways, 0.0)
    iterators = {name: way() for name, way in ways.items()}
    for iterator in iterators.values():
        next(iterator)
    for _ in range(rounds):
        for name, iterator in iterators.items():
            tokens, begin = 0, time.perf_counter()
            while (spent := time.perf_counter() - begin) < seconds:
                tokens += next(iterator)[0].numel()
            best[name] = max(best[name], tokens / spent)
    return best


def drop(folder: Path) -> float:
    """Drop the folder's files from the page cache; return the share that stayed."""
    pages = stayed = 0
    for path in folder.rglob("*.bin"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
                count = -(-len(mapped) // mmap.PAGESIZE)
                there = (ctypes.c_ubyte * count)()
                address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
                ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), there)
                pages, stayed = pages + count, stayed + int((np.frombuffer(there, np.uint8) & 1).sum())
    return stayed / pages


def cold(ways: dict[str, Callable[[], Iterator]], folder: Path, samples: int, rounds: int) -> tuple[dict, float]:
    """Return {way: [tokens/s, MB read from the disk for a MB of samples]} of the best round, and drop()'s worst."""
    found, cached = {}, 0.0
    for _ in range(rounds):
        for name in ("ours", "many shards", "memmap loop"):
            iterator = ways[name]()  # maps nothing that is in use yet: what is mapped and read would not be dropped
            cached = max(cached, drop(folder))
            disk, begin = resource.getrusage(resource.RUSAGE_SELF).ru_inblock, time.perf_counter()
            tokens = sum(next(iterator)[0].numel() for _ in range(samples // COLD_BATCH))
            spent = time.perf_counter() - begin
            disk = 512 * (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - disk)
            del iterator
            found[name] = max(found.get(name, [0.0]), [tokens / spent, disk / (2 * tokens)])
    return found, cached


def make_samplers(folder: Path, ctx_len: int) -> dict:
    single, many = Sampler(folder / "one", ctx_len), TokenStream(folder / "many")
    few_maps = pickle.loads(pickle.dumps(many))
    few_maps.max_maps = FEW_MAPS
    return {
        "ours": single,
        "many shards": Sampler(many, ctx_len),
        "many, few maps": Sampler(pickle.loads(pickle.dumps(few_maps)), ctx_len),
    }


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the shards that --prepare writes")
    parser.add_argument("--prepare", action="store_true", help="write the shards and exit; the folder is emptied")
    parser.add_argument("--gigabytes", type=float, default=3, help="of tokens, written twice (default: 3)")
    parser.add_argument("--shards", type=int, default=1000, help="of the many (default: 1000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each way in a round, warm (default: 0.3)")
    parser.add_argument("--samples", type=int, default=96, help="in a cold round (default: 96)")
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args(arguments)
    if options.prepare:
        return prepare(options.folder, options.gigabytes, options.shards)
    start, path = header(), shard_files(options.folder / "one")[0]
    samplers = {ctx_len: make_samplers(options.folder, ctx_len) for ctx_len in (512, 4096)}
    for file in options.folder.rglob("*.bin"):
        file.read_bytes()  # into the page cache
    rows, cold_rows, stayed = [], [], 0.0
    for ctx_len, batch in ((512, 16), (512, 128), (4096, 8), (4096, 32)):
        ways = make_ways(samplers[ctx_len], ctx_len, batch, path)
        check_equal(ways)
        speed = warm(ways, options.rounds, options.seconds)
        millions = [rate / 1e6 for rate in speed.values()]
        rows.append([ctx_len, batch, *millions, speed["ours"] / speed["memmap loop"], speed["ours"] / BUSY_GPU])
        print(*rows[-1], flush=True)
    for ctx_len in (512, 4096):
        ways = make_ways(samplers[ctx_len], ctx_len, COLD_BATCH, path)
        found, cached = cold(ways, options.folder, options.samples, options.rounds)
        stayed = max(stayed, cached)
        for name, (rate, disk) in found.items():
            cold_rows.append([ctx_len, name, rate / 1e6, disk, rate / found["memmap loop"][0], rate / BUSY_GPU])
            print(*cold_rows[-1], flush=True)
    stream = samplers[512]["many shards"].stream
    facts = dict(rounds=options.rounds, gigabytes=stream.n_tokens / 5e8, shards=len(stream.shards), need=BUSY_GPU)
    device = os.stat(options.folder).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    readahead = setting.read_text().strip() if setting.exists() else "unknown"
    columns = ["T", "B", *(f"{name}: M tokens/s" for name in ways), "ours / memmap loop", "ours / busy GPU"]
    cold_columns = ["T", "way", "M tokens/s", "MB read for a MB", "/ memmap loop", "/ busy GPU"]
    parts = ["# Reading samples", start, ABOUT.format(few=FEW_MAPS, **facts), WARM, table(columns, rows)]
    cold_text = COLD.format(samples=options.samples, batch=COLD_BATCH, stayed=stayed, readahead=readahead)
    report = "\n\n".join([*parts, cold_text, table(cold_columns, cold_rows)]) + "\n"
    print(report)
    if options.output:
        options.output.write_text(report)


if __name__ == "__main__":
    main()
