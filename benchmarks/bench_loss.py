"""Time linear_cross_entropy against its three matrix products and against torch's F.linear + F.cross_entropy.

The roofline is the products alone, each as one call over all tokens with its output allocated before. The check against
torch runs first; where it fails, no time is printed.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import header, measure, table

from rwkv_ext.losses import linear_cross_entropy


def make(tokens: int, width: int, vocab: int, dtype: torch.dtype, device: str):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device=device) / width**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (tokens,), device=device)


def check(hidden, weight, targets):
    """Exit with a message unless loss and gradients agree with torch's in the same dtype."""
    expected = F.cross_entropy(F.linear(hidden, weight), targets)
    loss = linear_cross_entropy(hidden, weight, targets, l2wrap=0)
    tolerance = 1e-5 if hidden.dtype == torch.float32 else 0.02
    pairs = [(loss, expected), *zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected)), strict=True)]
    for got, want in pairs:
        error = ((got.double() - want.double()).norm() / want.double().norm()).item()
        if not error < tolerance:
            sys.exit(f"bench_loss: wrong result, relative error {error:.2g} in {hidden.dtype}: no times")


def products(hidden, weight):
    """Return the three products as functions over buffers that exist already."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = hidden @ weight.t()
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    return [
        lambda: torch.mm(hidden, weight.t(), out=logits),
        lambda: torch.mm(logits, weight, out=grad_hidden),
        lambda: torch.mm(logits.t(), hidden, out=grad_weight),
    ]


def bench(dtype, width, options):
    hidden, weight, targets = make(options.tokens, width, options.vocab, dtype, options.device)
    check(hidden, weight, targets)
    matmuls = products(hidden, weight)
    logits = F.linear(hidden, weight).detach().requires_grad_()
    master = weight.detach().float().requires_grad_()

    def step(loss):
        loss.backward()
        hidden.grad = weight.grad = master.grad = logits.grad = None

    functions = {
        "products": lambda: [multiply() for multiply in matmuls],
        "torch cross_entropy alone": lambda: step(F.cross_entropy(logits, targets)),
        "torch linear + cross_entropy": lambda: step(F.cross_entropy(F.linear(hidden, weight), targets)),
        "linear_cross_entropy": lambda: step(linear_cross_entropy(hidden, weight, targets)),
    }
    if dtype != torch.float32:
        functions["linear_cross_entropy, fp32 weight"] = lambda: step(linear_cross_entropy(hidden, master, targets))
    for chunk in options.chunks:
        functions[f"linear_cross_entropy, chunk {chunk}"] = lambda chunk=chunk: step(
            linear_cross_entropy(hidden, weight, targets, chunk=chunk)
        )
    times = measure(functions, options.repeats, options.cpu_time)
    roofline, flops = times["products"], 6e-9 * options.tokens * width * options.vocab
    return [
        [
            str(dtype).removeprefix("torch."),
            width,
            name,
            time,
            time.median / roofline.median,
            time.best / roofline.best,
            round(flops / time.best) if "alone" not in name else "",
        ]
        for name, time in times.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 256, 768])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--chunks", type=int, nargs="*", default=[], help="also time these chunk sizes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU time instead of time passed; needs --threads 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    title = f"# linear_cross_entropy: {options.tokens} tokens, V = {options.vocab}, forward and backward"
    clock = "CPU time of one thread" if options.cpu_time else "time passed"
    about = (
        f"{clock}. products: z = hidden weight^T, z weight and z^T hidden, each one call over all tokens into memory "
        "that exists, the least any way of computing the loss and its gradients must do."
    )
    start = header()
    rows = []
    for dtype in options.dtypes:
        for width in options.widths:
            rows += bench(getattr(torch, dtype), width, options)
    columns = ["dtype", "D", "what", "ms: median (best .. worst)", "x products: median", "best", "GFLOP/s"]
    text = "\n\n".join([title, start, about, table(columns, rows)]) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
