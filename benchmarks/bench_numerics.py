"""How exact the ops are: error of every output and gradient against the fp64 loop, by decay regime and dtype.

    python benchmarks/bench_numerics.py            # the CPU kernels, the loop in PyTorch and the log-cumsum form
    python benchmarks/bench_numerics.py --write    # and into docs/numerics.md, its picture and benchmarks/results
    python benchmarks/bench_numerics.py --compare --emulated --fla-python fla/bin/python     # beside other algorithms

The loop is rwkv_ext.reference in the same dtype: plain PyTorch, whose arithmetic is fp32 too (fp64 for fp64). --compare
is about other algorithms: --emulated adds the CUDA kernels, whose source runs on the CPU (compiled by g++ at the
first call), --fla-python flash-linear-attention (fla_interpreter.py says how to install it).
"""

import argparse
import re
import sys
import time
from pathlib import Path

import matplotlib
import torch
from common import header
from numerics_ways import Way, cpu_ways, ways

from rwkv_ext import reference, wkv5
from rwkv_ext.testing import decay_bins, decay_regimes, error_ratio, make_inputs, outputs_and_gradients

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPE = dict(batch=1, tokens=512, heads=1, size=64)
NAMES = ("y", "state_out", "dr", "dk", "dv", "dw", "du", "dstate")
BLOCK = ("<!-- made by benchmarks/bench_numerics.py --write -->\n", "<!-- end -->\n")
Errors = dict[str, dict[str, dict[str, str]]]  # regime -> way -> output -> error


def error_text(actual: torch.Tensor, expected: torch.Tensor) -> str:
    ratio = error_ratio(actual, expected)
    if not actual.isfinite().all():
        return f"NaN ({100 * (~actual.isfinite()).double().mean():.2g} %)"
    return f"{ratio:.1e}" if ratio else "0"


def measure(chosen: list[Way], regimes, show=lambda regime, label, errors: None) -> tuple[Errors, dict]:
    """Return the errors of every way in every regime, and way -> bin of the decay -> error of dw in regime mixed."""
    errors, bins = {}, {}
    for regime in regimes:
        for way in chosen:
            inputs = make_inputs("6.0", **SHAPE, regime=regime, dtype=way.dtype)
            exact, actual = outputs_and_gradients(reference.wkv6, inputs.double()), way.run(inputs)
            label = f"{way.name} | {next(name for name, dtype in DTYPES.items() if dtype == way.dtype)}"
            found = {name: error_text(actual[name], exact[name]) for name in NAMES}
            errors.setdefault(regime, {})[label] = found
            show(regime, label, found)
            if regime == "mixed":
                parts = list(decay_bins(inputs.w))[:5]
                bins[label] = {bin: error_text(actual["dw"][here], exact["dw"][here]) for bin, here in parts}
    return errors, bins


def worst_of_eagle(dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Return output -> the largest errors over the regimes of wkv5 and of the loop, one decay per channel."""
    worst = dict.fromkeys(NAMES, (0.0, 0.0))
    for regime in decay_regimes:
        inputs = make_inputs("5.2", **SHAPE, regime=regime, dtype=dtype)
        exact = outputs_and_gradients(reference.wkv5, inputs.double())
        both = [outputs_and_gradients(op, inputs) for op in (wkv5, reference.wkv5)]
        for name in NAMES:
            found = (error_ratio(x[name], exact[name]) for x in both)
            worst[name] = tuple(map(max, worst[name], found))
    return worst


def head(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def regime_table(dtype: str, errors: Errors) -> str:
    """A row for every regime and way, a column for every output."""
    lines = [head(f"Finch, {dtype}", "", *NAMES)]
    for regime, by_way in errors.items():
        for label, found in by_way.items():
            if (way := label.split(" |")[0]) != "PyTorch loop" or dtype != "fp64":  # which is what all is judged by
                lines.append(f"| {regime} | {way} | {' | '.join(found.values())} |")
    return "\n".join(lines)


def eagle_table() -> str:
    lines = [head("Eagle, worst regime", *NAMES)]
    for dtype, torch_dtype in DTYPES.items():
        cells = [f"{a:.1e} ({b:.1e})" if b else f"{a:.1e}" for a, b in worst_of_eagle(torch_dtype).values()]
        lines.append(f"| {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison(errors: Errors, bins: dict) -> dict[str, str]:
    """Return title -> table: y and dw by regime, and dw by decay."""
    by_title = {name: {label: [errors[r][label][name] for r in errors] for label in next(iter(errors.values()))}
                for name in ("y", "dw")}  # fmt: skip
    tables = {name: (list(errors), rows) for name, rows in by_title.items()}
    if bins:
        rows = {label: list(found.values()) for label, found in bins.items()}
        tables["dw, data mixed, where the decay is in"] = (list(next(iter(bins.values()))), rows)
    return {
        title: "\n".join([head(title, "dtype", *columns), *(f"| {x} | {' | '.join(row)} |" for x, row in rows.items())])
        for title, (columns, rows) in tables.items()
    }


def draw(results: dict[str, Errors], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    marks = {"rwkv_ext, CPU": "o", "PyTorch loop": "_", "log-cumsum form": "x"}
    for offset, (dtype, errors) in enumerate(results.items()):
        places = {f"{regime}\n{name}": (regime, name) for regime in errors for name in ("y", "dw")}
        for way, mark in marks.items():
            points = []
            for place, (regime, name) in enumerate(places.values()):
                text = errors[regime][f"{way} | {dtype}"][name]
                if not text.startswith("NaN") and text != "0":
                    points.append((place + (offset - 1.5) * 0.15, float(text)))
            if points:
                axes.plot(*zip(*points), mark, ms=5 if mark != "_" else 10, color=f"C{offset}", label=f"{way} {dtype}")
    axes.set_xticks(range(len(places)), places, fontsize=7)
    axes.set_yscale("log")
    axes.set_ylim(top=10)  # the log-cumsum form's dw goes on to 1e4
    axes.set_ylabel("relative rms error against fp64")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=6, ncols=4)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def between(text: str, new: str) -> str:
    """Return text with what lies between the marks of BLOCK replaced."""
    begin, end = (text.index(mark) for mark in BLOCK)
    return text[: begin + len(BLOCK[0])] + new + text[end:]


def replace_rows(text: str, tables: dict[str, str]) -> str:
    """Return text with the rows of its tables of these titles that are in the new ones replaced by them."""
    for title, table in tables.items():
        start = text.index(f"\n| {title} |") + 1
        end = text.index("\n\n", start)
        old = text[start:end]
        for row in table.splitlines()[2:]:
            label = re.escape(" | ".join(row.split(" | ")[:2]))
            old = re.sub(rf"^{label} \|.*$", row.replace("\\", r"\\"), old, flags=re.MULTILINE)
        text = text[:start] + old + text[end:]
    return text


def write(results: dict[str, Errors], bins: dict, tables: str) -> None:
    page = ROOT / "docs" / "numerics.md"
    fp32 = {regime: by_way for regime, by_way in results["fp32"].items()}
    page.write_text(replace_rows(between(page.read_text(), "\n" + tables + "\n\n"), comparison(fp32, bins)))
    draw(results, ROOT / "docs" / "numerics.png")
    report = ROOT / "benchmarks" / "results" / f"cpu_numerics_{time.strftime('%Y-%m')}.md"
    report.write_text(f"# Errors of the CPU kernels\n\n{header()}\n\n{SHAPE}\n\n{tables}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/numerics.md, its picture and a report as well")
    parser.add_argument("--compare", action="store_true", help="print the tables that compare algorithms instead")
    parser.add_argument("--emulated", action="store_true", help="with --compare: the CUDA kernels on the CPU as well")
    parser.add_argument("--fla-python", type=Path, help="with --compare: the Python that has fla-core and triton")
    parser.add_argument("--regimes", nargs="+", choices=decay_regimes, default=list(decay_regimes))
    args = parser.parse_args()
    if (args.emulated or args.fla_python) and not args.compare:
        sys.exit("bench_numerics: --emulated and --fla-python belong to --compare")
    if args.write and (args.compare or args.regimes != list(decay_regimes)):
        sys.exit("bench_numerics: --write needs all regimes and is not for --compare")
    print(f"torch {torch.__version__}, {SHAPE}, loss from y and state_out\n", flush=True)
    if args.compare:
        print(head("data", "way", "dtype", *NAMES))
        chosen = ways(args.fla_python, args.emulated)

        def show(regime, label, found):
            print(f"| {regime} | {label} | {' | '.join(found.values())} |", flush=True)

        print("\n" + "\n\n".join(comparison(*measure(chosen, args.regimes, show)).values()))
        return
    measured = {name: measure(cpu_ways(dtype), args.regimes) for name, dtype in DTYPES.items()}
    results = {name: errors for name, (errors, _) in measured.items()}
    tables = "\n\n".join([*(regime_table(name, errors) for name, errors in results.items()), eagle_table()])
    print(tables)
    if args.write:
        write(results, measured["fp32"][1], tables)


if __name__ == "__main__":
    main()
