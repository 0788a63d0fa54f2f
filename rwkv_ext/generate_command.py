"""rwkv-ext generate: text from a checkpoint on stdout, piece by piece or as JSON, and the speed on stderr."""

import argparse
import collections
import json
import os
import sys
import time
from pathlib import Path

import torch

from .doctor import gpu_problem
from .generate import check_state, generate_batch
from .generation import BatchGeneration, GenerateOptions
from .generation.continuation import check_seed
from .generation.files import check_state_sizes
from .models import RWKV, RWKVState
from .tokenizer import WorldTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="an Eagle or Finch checkpoint")
    add("prompt", nargs="?", help="text to continue; - reads stdin, byte for byte; without it a document starts")
    add("--prompts", metavar="FILE", help="several prompts, one per line, \\n being a new line; implies --json")
    add("--max-tokens", type=int, default=256, help="at most so many tokens (default 256)")
    add("--temperature", type=float, default=1.0, help="0 takes the most probable token (default 1)")
    add("--top-p", type=float, default=0.7, help="nucleus of this probability, 1 is off (default 0.7)")
    add("--top-k", type=int, default=0, help="the k most probable tokens, 0 is off (default 0)")
    add("--min-p", type=float, default=0.0, help="tokens so many times as probable as the best, 0 is off (default 0)")
    add("--typical-p", type=float, default=1.0, help="locally typical tokens of this probability, 1 is off (default 1)")
    add("--temperature-first", action="store_true", help="temperature before the choice, as in Hugging Face's order")
    add("--presence-penalty", type=float, default=0.0, help="subtracted from logits of tokens used")
    add("--frequency-penalty", type=float, default=0.0, help="subtracted once per use of a token")
    add("--penalty-decay", type=float, default=1.0, help="how much of a use still counts a token later (default 1)")
    add("--penalty-exempt", action="append", type=_id_or_rwkv, default=[], metavar="ID",
        help="a token without penalties, may be repeated; rwkv: blanks and digits, as in the rwkv package")  # fmt: skip
    add("--ban", action="append", type=int, default=[], metavar="ID", help="never this token; may be repeated")
    add("--bias", action="append", type=_bias, default=[], metavar="ID=NUMBER",
        help="added to a token's logit; may be repeated")  # fmt: skip
    add("--seed", type=int, help="an integer makes the text repeatable; prompt i of several draws with seed + i")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end before this text, \\n being a new line; may be repeated")  # fmt: skip
    add("--stop-token", action="append", type=int, metavar="ID", help="end at this token; may be repeated (default 0)")
    add("--json", action="store_true", help="one JSON object per prompt, as it ends, instead of its text")
    add("--logprobs", type=int, metavar="N", help="with --json: log-probabilities of the tokens and of the N best")
    add("--time-state", metavar="FILE", help="start every text from these tuned initial states (att.time_state)")
    add("--state-in", metavar="FILE", help="go on from this state (RWKVState.save, --state-out)")
    add("--state-out", metavar="FILE", help="write the state after the text, after Ctrl-C as well")
    add("--dtype", choices=DTYPES, help="of the weights (default: as in the file)")
    add("--quantize", choices=("int8",), help="turn the matrices to int8 while loading: half of bfloat16")
    add("--device", help="such as cpu or cuda:0 (default: a GPU that has kernels, else cpu)")
    add("--threads", type=int, help="CPU threads (default: all)")


def run(args) -> int:
    """Print the text; 0, or 130 after Ctrl-C."""
    # What generate() would refuse is refused before gigabytes are loaded.
    options = _options(args)
    if args.seed is not None:
        check_seed("--seed", args.seed)
    prompts = _prompts(args)
    state = None if args.state_in is None else RWKVState.load(args.state_in)
    check_state(state, prompts)
    if args.state_out is not None and not Path(args.state_out).absolute().parent.is_dir():
        raise ValueError(f"--state-out must be a file in a folder that exists, got {args.state_out}; make the folder")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    try:
        dtype, device = DTYPES.get(args.dtype), _device(args.device)
        model = RWKV.from_pretrained(args.model, device, dtype, time_state=args.time_state, quantize=args.quantize)
        if state is not None:
            check_state_sizes("rwkv-ext generate --state-in", args.state_in, state, model.config)
            state = state.to(model.head.weight.device, model.head.weight.dtype)
        batch = generate_batch(model, WorldTokenizer(), prompts, seed=args.seed, state=state, **options.as_arguments())
        printer = _JsonLines(batch, prompts) if args.json or args.prompts else _Text(batch)
        status = _print(batch, printer)
        if args.state_out is not None and batch.state is not None:
            batch.state.save(args.state_out)
        return status
    except KeyboardInterrupt:  # while loading
        print("interrupted", file=sys.stderr)
        return 130


def _options(args) -> GenerateOptions:
    if args.logprobs is not None and not (args.json or args.prompts):
        raise ValueError("--logprobs needs --json, which has a place for them")
    exempt = args.penalty_exempt
    if "rwkv" in exempt and len(exempt) > 1:
        raise ValueError("--penalty-exempt must be rwkv or token ids, got both")
    return GenerateOptions(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        typical_p=args.typical_p,
        temperature_first=args.temperature_first,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        penalty_decay=args.penalty_decay,
        penalty_exempt="rwkv" if exempt == ["rwkv"] else exempt,
        ban=args.ban,
        logit_bias=dict(args.bias),
        stop=[text.replace("\\n", "\n") for text in args.stop],
        stop_tokens=(0,) if args.stop_token is None else args.stop_token,
        logprobs=args.logprobs,
    )


def _prompts(args) -> list[bytes]:
    if args.prompts is None:
        return [sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt or "")]
    if args.prompt is not None:
        raise ValueError(f"--prompts must be the only source of prompts, got {args.prompt!r} as well")
    try:
        content = Path(args.prompts).read_bytes()
    except OSError as error:
        raise ValueError(f"--prompts must be a readable file, got {args.prompts} ({error.strerror})") from error
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    if not lines:
        raise ValueError(f"--prompts must have at least one line, got the empty file {args.prompts}")
    return [line.removesuffix(b"\r").replace(b"\\n", b"\n") for line in lines]


def _id_or_rwkv(text: str) -> int | str:
    if text != "rwkv" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a token id or rwkv, got {text!r}")
    return text if text == "rwkv" else int(text)


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ID=NUMBER, such as 11=-2.5, got {text!r}") from None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cpu" if gpu_problem() else "cuda")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # how torch reports what it does not know, or lacks
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be a device of this machine, such as cpu, got {name!r} ({reason})") from error
    return device


class _Text:
    """Prints the text of a batch of one as it comes, and a final new line in any case."""

    def __init__(self, batch: BatchGeneration):
        self._row, self._printed = batch.rows[0], 0  # characters

    def show(self, piece: str) -> None:
        self._printed += len(piece)  # before: an interruption between the two would print it twice
        print(piece, end="", flush=True)

    def end(self, is_interrupted: bool) -> None:
        self.show(self._row.text[self._printed :])
        # After ^C, which the terminal shows, a new line in any case.
        if is_interrupted or not self._row.text.endswith("\n"):
            print(flush=True)


class _JsonLines:
    """Prints a JSON object for every row, in order, as soon as it and those before it have ended."""

    def __init__(self, batch: BatchGeneration, prompts: list[bytes]):
        self._batch, self._prompts, self._printed = batch, prompts, 0

    def show(self, piece: str) -> None:
        rows = self._batch.rows
        while self._printed < len(rows) and rows[self._printed].finish_reason is not None:
            self._print_next()

    def end(self, is_interrupted: bool) -> None:
        while self._printed < len(self._batch.rows):
            self._print_next()

    def _print_next(self) -> None:
        number, row = self._printed, self._batch.rows[self._printed]
        facts = {
            "prompt": self._prompts[number].decode("utf-8", "replace"),
            "text": row.text,
            "finish_reason": row.finish_reason,
            "seed": row.seed,
            "prompt_tokens": row.prompt_tokens,
            "tokens": row.tokens,
        }
        if self._batch.options.logprobs is not None:
            facts["logprobs"] = [one._asdict() for one in row.logprobs]
        self._printed += 1
        print(json.dumps(facts, ensure_ascii=False), flush=True)


def _print(batch: BatchGeneration, printer: _Text | _JsonLines) -> int:
    """Print the texts as they are decided, all of them after Ctrl-C too, and the speed."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ? instead of ending the text
    start, interruption = time.perf_counter(), None
    try:
        try:
            for _, piece in batch:
                printer.show(piece)
        except KeyboardInterrupt:
            interruption = "Ctrl-C"
        seconds = time.perf_counter() - start - batch.prefill_seconds
        printer.end(interruption is not None)
    except BrokenPipeError:  # the reader has had enough, as head has; nothing may be written at exit either
        interruption, seconds = "closed output", time.perf_counter() - start - batch.prefill_seconds
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    reasons = collections.Counter(row.finish_reason or interruption for row in batch.rows)
    ends = [reason if len(batch.rows) == 1 else f"{reason} ({count})" for reason, count in reasons.items()]
    print(
        f"prompt: {_speed(sum(row.prompt_tokens for row in batch.rows), batch.prefill_seconds)}; "
        f"output: {_speed(sum(len(row.tokens) for row in batch.rows), seconds)}; "
        f"ended by {', '.join(ends)}",
        file=sys.stderr,
    )
    return 130 if interruption == "Ctrl-C" else 0


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s)"
