"""How exact the ops are: error of every output and gradient against the fp64 loop, by decay regime and dtype.

    python benchmarks/bench_numerics.py            # the ops beside the loop; draws docs/numerics.png
    python benchmarks/bench_numerics.py --compare --emulated --fla-python fla/bin/python     # beside other algorithms

In the first tables the peer is rwkv_ext.reference in the same dtype: the same loop in plain PyTorch, whose arithmetic
is fp32 too. The second ones are about algorithms: --emulated adds the CUDA kernels, whose source runs on the CPU
(compiled by g++ at the first call), --fla-python flash-linear-attention (fla_interpreter.py says how to install it).
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from numerics_ways import Way, ways

from rwkv_ext import reference, wkv6
from rwkv_ext.testing import decay_regimes, error_ratio, make_inputs, outputs_and_gradients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPE = dict(batch=1, tokens=1024, heads=2, size=64)
COMPARED = dict(batch=1, tokens=512, heads=1, size=64)
LOG_DECAYS = ((-1, 0), (-3, -1), (-6, -3), (-12, -6), (-40, -12))  # bins of -exp(w)


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


def error_text(actual: torch.Tensor, expected: torch.Tensor) -> str:
    ratio = error_ratio(actual, expected)
    if actual.isfinite().all():
        return f"{ratio:.1e}"
    return f"NaN ({100 * (~actual.isfinite()).double().mean():.0f} %)"


def compare(chosen: list[Way], regimes: list[str]) -> None:
    """Print a line per way and regime as it is computed, then y and dw by regime, and dw by decay."""
    print(f"torch {torch.__version__}, {COMPARED}, loss from y and state_out\n")
    names = ("y", "state_out", "dr", "dk", "dv", "dw", "du", "dstate")
    print(f"| data | way | dtype | {' | '.join(names)} |\n{'|---' * (len(names) + 3)}|")
    lines = {name: {} for name in ("y", "dw", "bins")}  # name -> way -> errors
    for regime in regimes:
        for way in chosen:
            inputs = make_inputs("6.0", **COMPARED, regime=regime, dtype=way.dtype)
            exact, actual = outputs_and_gradients(reference.wkv6, inputs.double()), way.run(inputs)
            label = f"{way.name} | {next(name for name, dtype in DTYPES.items() if dtype == way.dtype)}"
            errors = {name: error_text(actual[name], exact[name]) for name in names}
            print(f"| {regime} | {label} | {' | '.join(errors.values())} |", flush=True)
            for name in ("y", "dw"):
                lines[name].setdefault(label, []).append(errors[name])
            if regime == "mixed":
                log_decay = -torch.exp(inputs.w.double())
                bins = [(log_decay > low) & (log_decay <= high) for low, high in LOG_DECAYS]
                lines["bins"][label] = [error_text(actual["dw"][here], exact["dw"][here]) for here in bins]
    heads = {"y": regimes, "dw": regimes, "bins": [f"({low}, {high}]" for low, high in LOG_DECAYS]}
    for name, by_way in lines.items():
        if by_way:
            what = "dw, data mixed, where the log of the decay is in" if name == "bins" else name
            print(f"\n| {what} | dtype | {' | '.join(heads[name])} |\n{'|---' * (len(heads[name]) + 2)}|")
            print("\n".join(f"| {label} | {' | '.join(errors)} |" for label, errors in by_way.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent.parent / "docs" / "numerics.png")
    parser.add_argument("--compare", action="store_true", help="print the tables that compare algorithms instead")
    parser.add_argument("--emulated", action="store_true", help="with --compare: the CUDA kernels on the CPU as well")
    parser.add_argument("--fla-python", type=Path, help="with --compare: the Python that has fla-core and triton")
    parser.add_argument("--regimes", nargs="+", choices=decay_regimes, default=list(decay_regimes))
    args = parser.parse_args()
    if args.compare:
        return compare(ways(args.fla_python, args.emulated), args.regimes)
    if args.emulated or args.fla_python:
        sys.exit("bench_numerics: --emulated and --fla-python belong to --compare")
    results = {name: {r: measure(r, dtype) for r in decay_regimes} for name, dtype in DTYPES.items()}
    print(f"torch {torch.__version__}, {SHAPE}\n")
    print("\n\n".join(table(dtype, rows) for dtype, rows in results.items()))
    draw(results, args.picture)


if __name__ == "__main__":
    main()
