"""Time an optimizer step on the CPU against its matrix products and WKV alone, timed in the same run.

The products are those of the step (forward, and both gradients), each as one torch.mm or torch.bmm into memory that
exists; WKV is the op, forward and backward. The rest is what a step could do without: norms, token shift, gates,
softmax, casts, the optimizer. The check against plain PyTorch runs first; where it fails, no time is printed.
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from common import ROOT, header, measure, table

from rwkv_ext import RWKV, RWKVConfig, _layer_registration, linear_cross_entropy, wkv5, wkv6
from rwkv_ext.host_memory import keep_freed_memory
from rwkv_ext.matrix_product import linear

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from train.optim import clipped_step, gradient_norm  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_model(config: RWKVConfig) -> RWKV:
    """Return a model none of whose matrices are zero, as the recipe for training leaves some."""
    torch.manual_seed(0)
    model = RWKV(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and not p.any():
                p.normal_(std=0.5 / p.shape[-1] ** 0.5)
    return model


class Step:
    """One optimizer step as train/loop.py takes it: autocast over fp32 weights for bf16."""

    def __init__(self, config: RWKVConfig, batch: int, tokens: int, dtype: str):
        self.model, self.bf16 = random_model(config), dtype == "bf16"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.99), eps=1e-8, fused=True)
        ids = torch.randint(config.vocab_size, (batch, tokens + 1))
        self.tokens, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def loss(self) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            return self.model(self.tokens, targets=self.targets)[0]

    def gradients(self) -> list[torch.Tensor]:
        loss = self.loss()
        return [loss.detach(), *torch.autograd.grad(loss, list(self.model.parameters()))]

    def update(self):
        """The optimizer alone, on whatever the gradients are."""
        self.optimizer.step()

    def __call__(self):
        self.loss().backward()
        clipped_step(self.optimizer, gradient_norm(self.model).item(), 1.0)
        self.optimizer.zero_grad()


def check(config: RWKVConfig, dtype: str):
    """Exit unless loss and all gradients are as near to those of plain PyTorch in fp32 as plain PyTorch in dtype is."""

    def plain_gradients(step):
        with patch.object(_layer_registration, "_built", False), torch.backends.mkldnn.flags(enabled=step.bf16):
            return step.gradients()

    step, exact = (Step(config, 2, 96, kind) for kind in (dtype, "fp32"))
    rows = zip(step.gradients(), plain_gradients(step), plain_gradients(exact), strict=True)
    for name, (got, plain, want) in zip(["loss", *dict(step.model.named_parameters())], rows, strict=True):
        error, bound = (((x - want).norm() / want.norm().clamp(min=1e-20)).item() for x in (got, plain))
        if not error < 1.5 * bound + 1e-4:
            sys.exit(f"bench_train: wrong result, relative error of {name} {error:.2g} in {dtype}: no times")


def product_shapes(config: RWKVConfig, rows: int) -> list[tuple[int, int, int, int, int]]:
    """Return (times, batch, rows, in, out) of a forward pass's products; a batch of 1 is a plain one."""
    width, att, ffn, layers = config.n_embd, config.dim_att, config.dim_ffn, config.n_layer
    shapes = [
        (4 * layers, 1, rows, width, att),
        (layers, 1, rows, att, width),
        (layers, 1, rows, width, ffn),
        (layers, 1, rows, ffn, width),
        (layers, 1, rows, width, width),
        (1, 1, rows, width, config.vocab_size),
    ]
    if config.version == "6.0":
        shapes += [
            (layers, 1, rows, width, 5 * config.mix_rank),
            (layers, 5, rows, config.mix_rank, width),
            (layers, 1, rows, width, config.decay_rank),
            (layers, 1, rows, config.decay_rank, att),
        ]
    return shapes


def products_alone(config: RWKVConfig, rows: int, dtype: torch.dtype, by_linear: bool = False):
    """Return a function that multiplies everything a step multiplies: by torch, or by the package's linear()."""
    calls = []
    for times, batch, m, k, n in product_shapes(config, rows):
        x, w, dy = (torch.randn(batch, *s).to(dtype) for s in ((m, k), (n, k), (m, n)))
        outputs = [torch.empty(batch, *s, dtype=dtype) for s in ((m, n), (m, k), (n, k))]
        operands = ((x, w.mT), (dy, w), (dy.mT, x))
        for out, (a, b) in zip(outputs, operands, strict=True):
            if batch > 1:
                calls += times * [lambda a=a, b=b, out=out: torch.bmm(a, b, out=out)]
            elif by_linear and n < config.vocab_size:
                calls += times * [lambda a=a[0], b=b[0]: linear(a, b.t())]
            else:
                calls += times * [lambda a=a[0], b=b[0], out=out[0]: torch.mm(a, b, out=out)]
    return lambda: [call() for call in calls]


def wkv_alone(config: RWKVConfig, batch: int, tokens: int, dtype: torch.dtype):
    shape = (batch, tokens, config.n_head, config.head_size)
    r, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    w = (torch.randn(shape if config.version == "6.0" else shape[2:]) - 3).requires_grad_()
    u = torch.randn(shape[2:]).requires_grad_()
    op, dy = wkv6 if config.version == "6.0" else wkv5, torch.randn(shape).to(dtype)

    def run():
        for _ in range(config.n_layer):
            torch.autograd.grad(op(r, k, v, w, u)[0], (r, k, v, w, u), dy)

    return run


def loss_alone(config: RWKVConfig, rows: int, dtype: torch.dtype):
    hidden = torch.randn(rows, config.n_embd).to(dtype).requires_grad_()
    weight = (torch.randn(config.vocab_size, config.n_embd) / config.n_embd**0.5).requires_grad_()
    targets = torch.randint(config.vocab_size, (rows,))
    return lambda: torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))


def bench(config: RWKVConfig, dtype: str, options) -> list[list]:
    check(config, dtype)
    rows, kind = options.batch * options.tokens, DTYPES[dtype]
    step = Step(config, options.batch, options.tokens, dtype)
    functions = {
        "step": step,
        "products": products_alone(config, rows, kind),
        "WKV": wkv_alone(config, options.batch, options.tokens, kind),
        "loss, its products included": loss_alone(config, rows, kind),
    }
    if dtype == "fp32":
        functions["products, layers by linear()"] = products_alone(config, rows, kind, by_linear=True)
    if options.plain:

        def plain_step():
            with (
                patch.object(_layer_registration, "_built", False),
                torch.backends.mkldnn.flags(enabled=dtype == "bf16"),
            ):
                step()

        functions["step, layers and loss in plain PyTorch"] = plain_step
    times = measure(functions, options.repeats, options.cpu_time)
    floor = times["products"].best + times["WKV"].best
    by_linear = times.get("products, layers by linear()")
    lines = [[dtype, name, str(time), time.best / floor] for name, time in times.items()]
    lines.append([dtype, "step / (products + WKV)", "", times["step"].best / floor])
    if by_linear:
        ratio = times["step"].best / (by_linear.best + times["WKV"].best)
        lines.append([dtype, "step / (products by linear() + WKV)", "", ratio])
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", default="6.0", choices=["5.2", "6.0"])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--plain", action="store_true", help="also time the step with layers and loss in plain PyTorch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU time instead of time passed; needs --threads 1")
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as train/pretrain.py does
    config = RWKVConfig(version=options.version, n_layer=options.layers, n_embd=options.width, vocab_size=options.vocab)
    name = "Finch" if options.version == "6.0" else "Eagle"
    title = f"# A training step on the CPU: {name}, L {options.layers}, D {options.width}, V {options.vocab}, "
    title += f"B {options.batch}, T {options.tokens}"
    clock = "CPU time of one thread" if options.cpu_time else "time passed"
    about = (
        f"{clock}. step: forward, backward, clipping, AdamW, as train/pretrain.py takes it (bf16: autocast over fp32 "
        "weights). products: every product of the step and its gradients, one torch.mm or torch.bmm each. The "
        "ratios are of the best times."
    )
    start = header()
    rows = [row for dtype in options.dtypes for row in bench(config, dtype, options)]
    text = "\n\n".join(
        [title, start, about, table(["dtype", "what", "ms: median (best .. worst)", "x (products + WKV)"], rows)]
    )
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
