"""loss.png: the training curve, the validation points and named baselines of one run."""

from pathlib import Path

import numpy as np

from train.metrics import read_log


def draw_loss(log: Path, picture: Path, baselines: dict[str, float], title: str) -> None:
    """Draw the records of log.jsonl against tokens seen and replace the picture whole. Losses are nats per token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    records = read_log(log)
    train = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
    measured = [r for r in records if "validation_loss" in r]
    validation = [(r["tokens"], r["validation_loss"], r.get("bits_per_byte")) for r in measured]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    if train:
        tokens, losses = zip(*train, strict=True)
        axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each training step")
        axes.plot(tokens, _smooth(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if validation:
        tokens, losses, bits = zip(*validation, strict=True)
        label = f"held-out text: {losses[-1]:.3f} nats per token"
        if bits[-1] is not None:
            label += f", {bits[-1]:.3f} bits per byte"
        axes.plot(tokens, losses, "o-", color="tab:orange", markersize=4, linewidth=1, label=label)
    for index, (name, value) in enumerate(baselines.items()):
        axes.axhline(value, linestyle="--", linewidth=1, color=f"C{index + 2}", label=f"{name}: {value:.3f}")
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss in nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    if train or validation or baselines:
        axes.legend()
    partial = picture.with_name(f".{picture.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(picture)


def _smooth(values: tuple[float, ...]) -> np.ndarray:
    """Average over a window of a thirtieth of the curve, centred so that it does not lag behind.

    By differences of running sums: a run has a million steps, and each window a thirtieth of them.
    """
    reach, middle = len(values) // 60, np.arange(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    begin, end = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, len(values))
    return (sums[end] - sums[begin]) / (end - begin)
