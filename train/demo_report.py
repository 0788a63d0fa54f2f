"""The end of the demo: the exported model beside the baselines on all held-out text, samples, where everything is."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkv_ext import RWKV, WorldTokenizer
from rwkv_ext.generate import generate
from train.config import Config
from train.data import HeldOut
from train.demo_corpus import Corpus
from train.distributed import start_ranks
from train.hardware import choose_dtype
from train.loop import evaluate
from train.metrics import read_log

ALL_WINDOWS = "data.validation_windows=0"  # the --set that measures all of the held-out text
PYTHON_PROMPTS = ("import", "class", "    def __init__(self")  # no space at the end: tokens begin with theirs
PROMPT_CHARACTERS = 40
SAMPLE_TOKENS = 160
SAMPLING = {"temperature": 0.8, "top_p": 0.9}


@dataclass(frozen=True)
class Result:
    """How well one way to predict the held-out text does; nats is None for what knows no tokens."""

    name: str
    nats: float | None
    bits_per_byte: float


def judge(config: Config, weights: Path, baselines: dict) -> tuple[RWKV, list[Result]]:
    """Return the exported model and the results, best first, on the windows that config.data.validation_windows says.

    Every window starts from an empty state, as in training. baselines are what train.demo.measure_baselines returns.
    """
    ranks = start_ranks(config.train)
    model = RWKV.from_pretrained(weights, device=ranks.device, dtype=torch.float32)
    tokens = config.train.micro_batch * config.data.ctx_len
    bf16 = choose_dtype(config.train.dtype, ranks.device, tokens, config.model.n_embd) == "bf16"
    nats, bits = evaluate(
        model,
        HeldOut(config, ranks),
        WorldTokenizer().byte_lengths,
        ranks,
        lambda: torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=bf16),
    )
    sizes = f"Finch, {config.model.n_layer} layers of {config.model.n_embd}"
    results = [Result(sizes, nats, bits)]
    results += [Result(name, value, value * bits / nats) for name, value in baselines["report"].items()]
    xz = baselines["xz"]
    results.append(Result("xz -9e, knowing the training text", None, 8 * xz["added"] / xz["text"]))
    results.append(Result("xz -9e, the held-out text alone", None, 8 * xz["alone"] / xz["text"]))
    return model, sorted(results, key=lambda result: result.bits_per_byte)


def table(results: list[Result]) -> list[str]:
    """Format results as a Markdown table that is aligned as it stands."""
    lines = [f"| {'held-out text':<34} | nats per token | bits per byte |"]
    lines.append(f"|{'-' * 36}|---------------:|--------------:|")
    for result in results:
        nats = "" if result.nats is None else f"{result.nats:.3f}"
        lines.append(f"| {result.name:<34} | {nats:>14} | {result.bits_per_byte:>13.3f} |")
    return lines


def prompts(corpus: Corpus, python: bool) -> tuple[str, ...]:
    """Return three beginnings: of Python, or of held-out documents."""
    if python:
        return PYTHON_PROMPTS
    return tuple(document.data.decode()[:PROMPT_CHARACTERS] for document in corpus.held_out[:3])


def write_samples(model: RWKV, beginnings: Sequence[str]) -> list[str]:
    """Let the model go on from each beginning; return the texts, beginnings included. The same on every run."""
    tokenizer = WorldTokenizer()
    torch.set_num_threads(1)  # a token of a small model has too little work to share, and waiting for it costs most
    return [
        prompt + "".join(generate(model, tokenizer, prompt, max_tokens=SAMPLE_TOKENS, seed=number, **SAMPLING))
        for number, prompt in enumerate(beginnings)
    ]


def report_lines(
    out: Path, corpus: Corpus, results: list[Result], samples: list[str], minutes: float, command: list[str]
) -> list[str]:
    """Return the report in Markdown; minutes is what the whole demo took, command the trainer's."""
    folder = out / "finch"
    log = [record for record in read_log(folder / "log.jsonl") if "loss" in record]
    last = log[-1]
    by_name = {result.name: result for result in results}
    model = next(result for result in results if result.name.startswith("Finch"))
    gain = by_name["bigram"].nats - model.nats
    size = sum(len(document.data) for document in corpus.held_out)
    speed = last["tokens"] / last["seconds"]
    lines = [
        "# make demo",
        "",
        f"A Finch (RWKV-6) learnt {last['tokens']:,} tokens of {corpus.source} in {last['seconds'] / 60:.1f} minutes "
        f"({speed:,.0f} tokens/s, {last['step']:,} steps); `make demo` ran for {minutes:.1f} minutes.",
        f"Nobody trained on the held-out text: {len(corpus.held_out)} documents, {size:,} bytes.",
        "",
        *table(results),
        "",
        f"The model is {abs(gain):.2f} nats per token {'better' if gain > 0 else 'worse'} than the bigram: "
        f"it gives the next token {math.exp(gain):.1f} times the bigram's probability (geometric mean).",
        "",
        f"## What it writes (temperature {SAMPLING['temperature']}, top-p {SAMPLING['top_p']})",
    ]
    for sample in samples:
        lines += ["", "```", sample.rstrip(), "```"]
    lines += ["", "## Where everything is", ""]
    lines += [f"- {what}: {path}" for what, path in places(out, folder)]
    lines += ["", "## What to try next", ""]
    lines += [f"- {what}: `{command}`" for what, command in next_steps(out, folder, command)]
    return lines


def places(out: Path, folder: Path) -> list[tuple[str, str]]:
    """Return (what, path) of everything the demo wrote."""
    checkpoint = max(folder.glob("step_*"), key=lambda path: int(path.name[5:]), default=folder)
    return [
        ("loss curve", f"{folder / 'loss.png'}"),
        ("model, as released RWKV models are stored", f"{folder / 'final.pth'}"),
        ("checkpoint to go on from", f"{checkpoint}"),
        ("its configuration, complete", f"{checkpoint / 'config.toml'}"),
        ("every step's numbers", f"{folder / 'log.jsonl'}"),
        ("token shards", f"{out / 'shards' / 'train'}.bin and .idx, {out / 'shards' / 'held_out'}.bin and .idx"),
        ("their text", f"{out / 'text'}"),
        ("this report", f"{out / 'report.md'}"),
    ]


def next_steps(out: Path, folder: Path, command: list[str]) -> list[tuple[str, str]]:
    """Return (what, command) of what a user may do now; each works as it stands, from the folder the demo ran in."""
    program = Path(command[0]).with_name("rwkv-ext")
    return [
        ("more text from this model", f"{program} generate {folder / 'final.pth'} class --threads 1"),
        ("train for an hour", "make demo MINUTES=60"),
        ("text of your own", "make demo DATA=path/to/folder"),
        ("look into the shards", f"{program} data check {out / 'shards' / 'train'}"),
        ("the trainer by itself, to change anything with --set", shlex.join([*command, "--dry-run"])),
    ]
