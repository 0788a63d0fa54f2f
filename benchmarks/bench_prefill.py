"""Time reading a prompt with a Finch model on the CPU against the PyPI package rwkv, both in one run.

Both load the same file of random weights, take the same T tokens from the start of a text and return the logits of the
last one. The check runs first (fp32: logits within 2e-4 of the peer's largest; bf16: as near to fp32 as the peer's bf16
is); where it fails, no time is printed. The peer's dtypes are those of its CPU strategies.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("RWKV_JIT_ON", "1")
os.environ.setdefault("RWKV_CUDA_ON", "0")
os.environ.pop("RWKV_V7_ON", None)

import torch  # noqa: E402
from bench_train import random_model  # noqa: E402
from common import header, measure, table  # noqa: E402

from rwkv_ext import RWKV, RWKVConfig, wkv6  # noqa: E402
from rwkv_ext.host_memory import keep_freed_memory  # noqa: E402

SIZES = {"0.1B": (12, 768), "0.4B": (24, 1024)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def save_random(folder: Path, layers: int, width: int) -> Path:
    """Save in fp32: the peer normalises the embedding in the file's dtype."""
    path = folder / "model.pth"
    random_model(RWKVConfig(n_layer=layers, n_embd=width)).save_pretrained(path, torch.float32)
    return path


def load_peer(path: Path, dtype: str):
    from rwkv.model import RWKV as Peer

    with contextlib.redirect_stdout(io.StringIO()):
        return Peer(str(path), f"cpu {dtype}")


def prefill(model: RWKV, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits after the last token."""
    with torch.no_grad():
        hidden, _ = model.hidden(tokens[None])
        return model.head(hidden[0, -1])


def check(ours: dict, peers: dict, tokens: torch.Tensor):
    want = peers["fp32"](tokens)
    error = {
        name: {dtype: ((f(tokens).float() - want).norm() / want.norm()).item() for dtype, f in models.items()}
        for name, models in (("ours", ours), ("peer", peers))
    }
    if not error["ours"]["fp32"] < 2e-4:
        sys.exit(f"bench_prefill: wrong fp32 logits, relative error {error['ours']['fp32']:.2g}: no times")
    if "bf16" in ours and not error["ours"]["bf16"] < 1.5 * error["peer"]["bf16"]:
        sys.exit(f"bench_prefill: wrong bf16 logits, relative errors {error}: no times")


def floor(config: RWKVConfig, tokens: int, dtype: torch.dtype):
    """Return functions for the layers' products, one torch.mm each into memory that exists, and for WKV alone."""
    width, att, ffn = config.n_embd, config.dim_att, config.dim_ffn
    shapes = 5 * [(width, att)] + [(width, ffn), (ffn, width), (width, width)]
    shapes += [(width, 5 * config.mix_rank), *5 * [(config.mix_rank, width)], (width, config.decay_rank)]
    shapes += [(config.decay_rank, att)]
    calls = []
    for k, n in shapes:
        x, out = torch.randn(tokens, k).to(dtype), torch.empty(tokens, n, dtype=dtype)
        weights = [torch.randn(n, k).to(dtype) for _ in range(config.n_layer)]  # as many as there are: they are read
        calls += [lambda x=x, w=w, out=out: torch.mm(x, w.t(), out=out) for w in weights]
    r, k, v = (torch.randn(1, tokens, config.n_head, config.head_size).to(dtype) for _ in range(3))
    w, u = torch.randn(r.shape) - 3, torch.randn(r.shape[2:])
    return (
        lambda: [call() for call in calls],
        lambda: [wkv6(r, k, v, w, u) for _ in range(config.n_layer)],
    )


def bench(size: str, options, folder: Path) -> list[list]:
    path = save_random(folder, *SIZES[size])
    models = {dtype: RWKV.from_pretrained(path, dtype=kind) for dtype, kind in DTYPES.items()}
    peers = {dtype: load_peer(path, dtype) for dtype in DTYPES}
    ours = {dtype: lambda ids, m=m: prefill(m, ids) for dtype, m in models.items()}
    theirs = {dtype: lambda ids, m=m: m.forward(ids.tolist(), None)[0] for dtype, m in peers.items()}
    rows = []
    for tokens in options.tokens:
        ids = torch.randint(65536, (tokens,), generator=torch.Generator().manual_seed(tokens))
        check(ours, theirs, ids)
        functions = {f"rwkv {dtype}": lambda f=f, ids=ids: f(ids) for dtype, f in theirs.items()}
        functions |= {f"rwkv_ext {dtype}": lambda f=f, ids=ids: f(ids) for dtype, f in ours.items()}
        for dtype, kind in DTYPES.items():
            products, wkv = floor(models[dtype].config, tokens, kind)
            functions |= {f"products {dtype}, torch.mm": products, f"WKV {dtype}": wkv}
        times = measure(functions, options.repeats, options.cpu_time)
        best = {name: time.best for name, time in times.items()}
        peer = min(best[f"rwkv {dtype}"] for dtype in DTYPES)
        for name, time in times.items():
            dtype = name.split()[1].rstrip(",")
            rows.append(
                [
                    size,
                    tokens,
                    name,
                    str(time),
                    round(tokens / time.best),
                    best[f"rwkv {dtype}"] / time.best,
                    peer / time.best,
                ]
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["0.1B"], choices=list(SIZES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU time instead of time passed; needs --threads 1")
    parser.add_argument("--keep-freed-memory", action="store_true", help="call rwkv_ext.host_memory first: for both")
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep_freed_memory:
        keep_freed_memory()
    start = header()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for size in options.sizes for row in bench(size, options, Path(folder))]
    clock = "CPU time of one thread" if options.cpu_time else "time passed"
    columns = [
        "size",
        "T",
        "what",
        "ms: median (best .. worst)",
        "tokens/s",
        "x rwkv, same dtype",
        "x rwkv, its best dtype",
    ]
    about = f"{clock}; peer: rwkv {version('rwkv')} (JIT on, no CUDA). Ratios are of the best times; above 1 is faster."
    title = "# Prefill on the CPU: Finch " + ", ".join(options.sizes)
    text = "\n\n".join([title, start, about, table(columns, rows)])
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
