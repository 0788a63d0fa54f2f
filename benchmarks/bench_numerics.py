"""How exact the ops are: error of every output and gradient against the fp64 loop, by decay regime and dtype.

    python benchmarks/bench_numerics.py            # prints the tables of docs/numerics.md and draws docs/numerics.png

The peer is rwkv_ext.reference in the same dtype: the same loop in plain PyTorch, whose arithmetic is fp32 too.
"""

import argparse
from pathlib import Path

import matplotlib
import torch

from rwkv_ext import reference, wkv6
from rwkv_ext.testing import decay_regimes, error_ratio, make_inputs, outputs_and_gradients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPE = dict(batch=1, tokens=1024, heads=2, size=64)


def measure(regime: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Return name -> (error of wkv6, error of the PyTorch loop in the same dtype)."""
    inputs = make_inputs("6.0", **SHAPE, regime=regime, dtype=dtype)
    exact = outputs_and_gradients(reference.wkv6, inputs.double())
    ours, loop = outputs_and_gradients(wkv6, inputs), outputs_and_gradients(reference.wkv6, inputs)
    return {name: (error_ratio(ours[name], x), error_ratio(loop[name], x)) for name, x in exact.items()}


def table(dtype: str, rows: dict[str, dict[str, tuple[float, float]]]) -> str:
    names = list(next(iter(rows.values())))
    lines = [f"| {dtype} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for regime, errors in rows.items():
        lines.append(f"| {regime} | " + " | ".join(f"{a:.1e} ({b:.1e})" for a, b in errors.values()) + " |")
    return "\n".join(lines)


def draw(results, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    for offset, (dtype, rows) in enumerate(results.items()):
        names = [f"{regime}\n{name}" for regime, errors in rows.items() for name in ("y", "dw") if name in errors]
        pairs = [errors[name] for errors in rows.values() for name in ("y", "dw")]
        places = [i + (offset - 1) * 0.2 for i in range(len(names))]
        axes.plot(places, [ours for ours, _ in pairs], "o", label=f"wkv6 {dtype}", color=f"C{offset}")
        axes.plot(places, [loop for _, loop in pairs], "_", ms=12, label=f"PyTorch loop {dtype}", color=f"C{offset}")
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("relative rms error against fp64")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent.parent / "docs" / "numerics.png")
    args = parser.parse_args()
    results = {name: {r: measure(r, dtype) for r in decay_regimes} for name, dtype in DTYPES.items()}
    print(f"torch {torch.__version__}, {SHAPE}\n")
    print("\n\n".join(table(dtype, rows) for dtype, rows in results.items()))
    draw(results, args.picture)


if __name__ == "__main__":
    main()
