"""Draws the two pictures of docs/kernels.md: python docs/draw_kernels.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).parent
LEFT, RIGHT, DARK, PLAIN = "#9fc5e8", "#f6b26b", "#333333", "#eeeeee"


def draw_tree(path):
    """The four levels over 16 tokens, and where the pair (j, i) = (5, 13) is found."""
    figure, axes = plt.subplots(figsize=(10, 4.3))
    for level in range(4):
        y, half = level + 1, 1 << level
        for token in range(16):
            right = token >> level & 1
            axes.add_patch(Rectangle((token, y), 1, 0.62, facecolor=RIGHT if right else LEFT, edgecolor="white"))
            axes.text(token + 0.5, y + 0.31, "r p" if right else "k q", ha="center", va="center", fontsize=8)
        for node in range(0, 16, 2 * half):
            axes.add_patch(Rectangle((node, y), 2 * half, 0.62, fill=False, edgecolor=DARK, linewidth=1.6))
        axes.text(-0.2, y + 0.31, f"level {level}", ha="right", va="center")
    for token in range(16):
        chosen = token in (5, 13)
        axes.add_patch(Rectangle((token, 0), 1, 0.62, facecolor="#d9ead3" if chosen else PLAIN, edgecolor="white"))
        axes.text(token + 0.5, 0.31, str(token), ha="center", va="center", weight="bold" if chosen else "normal")
    axes.text(-0.2, 0.31, "token", ha="right", va="center")
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": DARK, "linewidth": 1.4}
    axes.add_patch(FancyArrowPatch((5.6, 4.85), (8.0, 4.85), **style))
    axes.add_patch(FancyArrowPatch((8.0, 4.85), (13.4, 4.85), **style))
    axes.text(6.8, 4.95, "q: decays 6, 7", ha="center", fontsize=9)
    axes.text(10.8, 4.95, "p: decays 8 ... 12", ha="center", fontsize=9)
    axes.text(
        8,
        -0.55,
        "j = 5 = 0101 and i = 13 = 1101 part at bit 3:  A[13, 5] = sum over channels of (r p)[13] (k q)[5]",
        ha="center",
        fontsize=10,
    )
    axes.set_xlim(-1.6, 16.1)
    axes.set_ylim(-0.8, 5.4)
    axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_flow(path):
    """One block of the forward kernel: what moves where in an iteration of 32 tokens."""
    figure, axes = plt.subplots(figsize=(10, 4.6))

    def box(x, y, width, height, text, colour):
        shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.04", facecolor=colour, edgecolor=DARK)
        axes.add_patch(shape)
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(start, end, text=""):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=DARK, linewidth=1.3))
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12, text, ha="center", fontsize=8)

    for x, width, name in ((0, 1.9, "device memory"), (2.5, 4.7, "shared memory"), (7.9, 2.3, "registers")):
        axes.text(x + width / 2, 5.0, name, ha="center", weight="bold")
    box(0, 3.8, 1.9, 0.9, "r, k, w\nof 32 tokens", PLAIN)
    box(0, 1.5, 1.9, 0.7, "v", PLAIN)
    box(0, 0.3, 1.9, 0.7, "y", PLAIN)
    box(2.7, 3.8, 1.5, 0.9, "rows of\nr, k, w", LEFT)
    box(2.7, 1.5, 1.5, 0.7, "rows of v", LEFT)
    box(5.2, 3.3, 1.9, 0.8, "X: one operand\nper level", LEFT)
    box(5.2, 2.2, 1.9, 0.8, "r~, k~, W, A\nof 2 chunks", LEFT)
    box(8.0, 3.4, 2.1, 1.3, "tree phase: a warp\nper chunk, a lane\nper 2 channels", RIGHT)
    box(
        8.0, 1.5, 2.1, 1.4, "state phase:\nS stays here from the\nfirst token to the last;\na warp per 32 values", RIGHT
    )
    arrow((1.95, 4.25), (2.65, 4.25), "async")
    arrow((1.95, 1.85), (2.65, 1.85), "async")
    arrow((4.25, 4.45), (7.95, 4.45))
    arrow((7.95, 3.9), (7.15, 3.9))
    arrow((7.15, 3.6), (7.95, 3.6))
    arrow((7.95, 3.45), (7.15, 2.85))
    arrow((7.15, 2.4), (7.95, 2.4))
    arrow((4.25, 1.75), (7.95, 1.75))
    arrow((8.0, 1.5), (1.95, 0.65))
    axes.text(5.4, 0.55, "2 bytes per token and channel", ha="center", fontsize=8)
    axes.set_xlim(-0.2, 10.4)
    axes.set_ylim(0.2, 5.4)
    axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    draw_tree(HERE / "kernels_tree.png")
    draw_flow(HERE / "kernels_flow.png")
