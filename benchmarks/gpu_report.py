"""The report of bench_gpu: Markdown tables and pictures of time and memory against length."""

from pathlib import Path

import matplotlib
from common import table


def ms(timing) -> str:
    return "" if timing is None else str(timing)


def gigabytes(count) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def percent(limit: float, timing) -> str:
    return "" if timing is None else f"{100 * limit / timing.median:.0f} %"


def error_text(errors: dict[str, float]) -> list[str]:
    """Return the error of y and the worst one of the gradients, with its name."""
    gradients = {name: x for name, x in errors.items() if name != "y"}
    worst = max(gradients, key=gradients.get) if gradients else ""
    return [f"{errors['y']:.1e}", f"{gradients[worst]:.1e} ({worst})" if worst else ""]


def case_table(rows, bandwidth: float) -> str:
    columns = [
        "case", "shape", "forward", "of limit", "forward, saving", "of limit", "backward", "of limit", "GB/s f, s, b",
        "f + b, GB", "error of y", "worst gradient",
    ]  # fmt: skip
    cells = []
    for row in rows:
        line = [row["case"].name, row["case"].shape]
        rates = []
        for what in ("forward", "saving", "backward"):
            timing = row.get(what)
            line += [ms(timing), percent(row["case"].bytes(what) / bandwidth, timing)]
            rates.append(f"{row['case'].bytes(what) / timing.median / 1e9:.0f}" if timing else "-")
        cells.append([*line, ", ".join(rates), gigabytes(row.get("memory")), *row["errors"]])
    return table(columns, cells)


def peer_lines(label: str, found: dict[str, dict]) -> list[list]:
    """Return a line per way of doing one case."""
    own = found.get("rwkv_ext", {}).get("seconds")
    lines = []
    for name, row in found.items():
        ratio = f"{row['seconds'] / own:.1f}" if own and row["seconds"] else ""
        times = [ms(row["forward"]), ms(row["train"])]
        lines.append([label, name, *times, ratio, gigabytes(row["memory"]), *row["errors"]])
    return lines


def peer_table(rows) -> str:
    columns = ["case", "what", "forward", "forward + backward", "x ours", "f + b, GB", "error of y", "worst gradient"]
    return table(columns, rows)


def decode_table(rows) -> str:
    columns = ["op", "batch", "as a graph", "of limit", "GB/s", "from Python", "tokens/s", "error of y", "of the state"]
    return table(columns, rows)


def draw_sweep(results: dict[str, dict[int, dict]], field: str, label: str, scale: float, path: Path) -> None:
    """Draw one line per way of doing it over sequence lengths, both axes logarithmic."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, by_length in results.items():
        points = [(tokens, row[field]) for tokens, row in by_length.items() if row.get(field) is not None]
        if points:
            axes.plot([x for x, _ in points], [scale * y for _, y in points], "o-", label=name, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens in a sequence")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
