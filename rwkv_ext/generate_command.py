"""rwkv-ext generate: text from a .pth file on stdout, piece by piece, and the speed on stderr."""

import os
import sys
import time

import torch

from .doctor import gpu_problem
from .generate import check_seed, generate
from .generation import GenerateOptions
from .models import RWKV
from .tokenizer import WorldTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser) -> None:
    parser.add_argument("model", metavar="MODEL.pth", help="an Eagle or Finch checkpoint")
    parser.add_argument("prompt", nargs="?", default="", help="text to continue; - reads stdin, byte for byte; "
                        "without it the model starts a document")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=256, help="at most so many tokens (default 256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (default 1)")
    parser.add_argument("--top-p", type=float, default=0.7, help="nucleus of this probability, 1 is off (default 0.7)")
    parser.add_argument("--top-k", type=int, default=0, help="the k most probable tokens, 0 is off (default 0)")
    parser.add_argument("--presence-penalty", type=float, default=0.0, help="subtracted from logits of tokens used")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, help="subtracted once per use of a token")
    parser.add_argument("--seed", type=int, help="an integer makes the text repeatable")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end before this text, \\n being a new line; may be repeated")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as in the file)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU that has kernels, else cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")


def run(args) -> int:
    """Print the text; 0, or 130 after Ctrl-C."""
    penalties = (args.presence_penalty, args.frequency_penalty)
    stop = [text.replace("\\n", "\n") for text in args.stop]
    # What generate() would refuse is refused before gigabytes are loaded.
    GenerateOptions(args.max_tokens, args.temperature, args.top_p, args.top_k, *penalties, stop)
    check_seed(args.seed)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    prompt = sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt)
    try:
        model = RWKV.from_pretrained(args.model, _device(args.device), DTYPES.get(args.dtype))
        generation = generate(
            model, WorldTokenizer(), prompt, args.max_tokens, args.temperature, args.top_p, args.top_k, *penalties,
            seed=args.seed, stop=stop,
        )  # fmt: skip
        return _stream(generation)
    except KeyboardInterrupt:  # while loading
        print("interrupted", file=sys.stderr)
        return 130


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


def _stream(generation) -> int:
    """Print the pieces as they come, a final new line in any case, and the speed."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ? instead of ending the text
    start, newline, interruption = time.perf_counter(), False, None
    try:
        for piece in generation:
            print(piece, end="", flush=True)
            newline = piece.endswith("\n")
    except KeyboardInterrupt:
        interruption, newline = "Ctrl-C", False
    except BrokenPipeError:  # the reader has had enough, as head has; nothing may be written at exit either
        interruption = "closed output"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    seconds = time.perf_counter() - start - generation.prefill_seconds
    if not newline:
        print(flush=True)
    print(
        f"prompt: {_speed(generation.prompt_tokens, generation.prefill_seconds)}; "
        f"output: {_speed(len(generation.tokens), seconds)}; "
        f"ended by {interruption or generation.finish_reason}",
        file=sys.stderr,
    )
    return 130 if interruption == "Ctrl-C" else 0


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s)"
