"""Time one decoding step at batch 1 against the time to read what it must read, the plain step and the `rwkv` package.

The limit: the bytes of all weights but the embedding, head included, and of the state, read and written, at the speed
of a plain streaming read that is measured in turns with the steps. Weights are random. The check against the plain step
and the package runs first; where it fails, no time is printed.
"""

import argparse
import copy
import gc
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from common import header, measure, table
from memory_read import MemoryRead

from rwkv_ext import RWKV, RWKVConfig

SIZES = {
    "tiny": dict(n_layer=2, n_embd=64),
    "0.1B": dict(n_layer=12, n_embd=768),
    "0.4B": dict(n_layer=24, n_embd=1024),
}
VERSIONS = {"eagle": "5.2", "finch": "6.0"}
# ours, the package's strategy, and how far (RMS) its logits may be from the exact ones of a random model
KINDS = {
    "fp32": (torch.float32, None, "cpu fp32", 1e-3),
    "bf16": (torch.bfloat16, None, "cpu bf16", 0.5),
    "int8": (torch.float32, "int8", "cpu fp32i8", 0.5),
}


def write_model(path: Path, config: RWKVConfig) -> None:
    """Save a model whose activations are of ordinary size everywhere, in fp32."""
    with torch.device("meta"):
        model = RWKV(config)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            short = name.split(".")[-1]
            if short == "time_decay":
                x.uniform_(-6, 0, generator=generator)
            elif short.startswith(("time_mix", "time_maa")) and x.shape[0] == 1:
                x.uniform_(0, 1, generator=generator)
            elif x.dim() > 1:
                inputs = x.shape[-2] if short.endswith(("_w1", "_w2")) else x.shape[-1]
                # Second factors are small beside what they are added to, as trained ones are.
                x.normal_(0, inputs**-0.5 * (0.1 if short.endswith("_w2") else 1), generator=generator)
            else:
                x.fill_(1.0 if short == "weight" else 0.0)
    model.save_pretrained(path, torch.float32)


def load_package(path: Path, strategy: str):
    for name, default in (("RWKV_JIT_ON", "1"), ("RWKV_CUDA_ON", "0"), ("RWKV_V7_ON", "0")):
        os.environ.setdefault(name, default)
    from rwkv.model import RWKV as PackageRWKV

    with mock.patch("builtins.print"):
        return PackageRWKV(str(path), strategy, verbose=False)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@torch.no_grad()
def check(kind: str, model: RWKV, package) -> None:
    """Exit with a message unless three steps are as near to the model in a wider dtype as the plain step's are."""
    dtype, *_, package_bound = KINDS[kind]
    wide = copy.deepcopy(model).to(torch.float64 if dtype == torch.float32 else torch.float32)
    state, plain_state, wide_state, package_state = *(m.initial_state() for m in (model, model, wide)), None
    for token in (11, 22, 33):
        tokens = torch.tensor([token])
        logits = model.step(tokens, state)[0]
        plain = model._plain_step(model.emb(tokens), plain_state)[0]
        exact = wide._plain_step(wide.emb(tokens), wide_state)[0]
        theirs, package_state = package.forward([token], package_state)
        bounds = {"step": (logits, 2 * distance(plain, exact) + 1e-6), "package": (theirs, package_bound)}
        for name, (result, bound) in bounds.items():
            if not (error := distance(result, exact)) < bound:
                sys.exit(f"bench_decode: {kind}: the {name} errs by {error:.2g}, more than {bound:.2g}: no times")


def bench(path: Path, kind: str, threads: list[int], options) -> list[list]:
    dtype, quantize, strategy, *_ = KINDS[kind]
    model = RWKV.from_pretrained(path, dtype=dtype, quantize=quantize)
    package = load_package(path, strategy)
    check(kind, model, package)
    state, plain_state = model.initial_state(), model.initial_state()
    package_state = package.forward([1], None)[1]
    weights = sum(x.nbytes for name, x in model.state_dict().items() if name != "emb.weight")
    needed, token = weights + 2 * sum(x.nbytes for x in state), torch.tensor([7])
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        read = MemoryRead(options.megabytes, count)

        def plain_step():
            with torch.no_grad():
                model._plain_step(model.emb(token), plain_state)

        functions = {
            "read": read,
            "step": lambda: model.step(token, state),
            "again": lambda: model.step(token, state),  # after itself, as in decoding
            "package": lambda: package.forward([7], package_state),
            "plain": plain_step,
        }
        times = measure(functions, options.repeats)
        speed, step = read.bytes / times["read"].best, min(times["step"].best, times["again"].best)
        median = min(times["step"].median, times["again"].median) / needed * (read.bytes / times["read"].median)
        rows.append(
            [
                options.size,
                options.version,
                kind,
                str(count),
                f"{1e3 * step:.2f}",
                f"{1 / step:.1f}",
                f"{needed / step / 1e9:.1f}",
                f"{speed / 1e9:.1f}",
                f"{100 * needed / step / speed:.0f} %",
                f"{100 / median:.0f} %",
                f"{1 / times['package'].best:.1f}",
                f"{times['package'].best / step:.2f}",
                f"{times['plain'].best / step:.2f}",
            ]
        )
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


COLUMNS = [
    *("model", "version", "weights", "threads", "ms / token", "tokens/s", "GB/s", "read GB/s", "of the limit"),
    *("of medians", "`rwkv` tokens/s", "x `rwkv`", "x plain step"),
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.1B")
    parser.add_argument("--version", choices=VERSIONS, default="finch")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=256, help="of the read; several times the last cache")
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args(arguments)
    config = RWKVConfig(version=VERSIONS[options.version], **SIZES[options.size])
    start, rows = header(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pth")
        write_model(path, config)
        for kind in options.kinds:
            rows += bench(path, kind, sorted(set(options.threads)), options)
            gc.collect()
    title = f"# Decoding, batch 1: {options.version} {options.size}, random weights"
    about = (
        "Best of the rounds, everything in turns in each. of the limit: (bytes of all weights but the embedding + "
        "state read and written) / time, as a share of the read speed; of medians: the same of the medians. int8: this "
        "project's rows of integers with activations in fp32, the package's `cpu fp32i8`. Checked first against the "
        "model in a wider dtype."
    )
    text = "\n\n".join([title, start, about, table(COLUMNS, rows)]) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
