"""Plot a classification report: the confusion matrix, the recall of each class, accuracy by clips per class.

Each function returns a PNG; those named *_figure return the figure before it is drawn.
"""

import statistics
from typing import TYPE_CHECKING

import numpy as np

from clip4vla.report.preview import to_bytes

if TYPE_CHECKING:  # matplotlib takes a second, and every training run loads this module: imported where it draws
    from matplotlib.figure import Figure

INK, SOFT, BLUE, RED = "#1f2937", "#5b6472", "#2563eb", "#dc2626"
SHADES = (BLUE, "#d97706", "#059669", "#9333ea", RED, "#0891b2", INK)  # of curves
SHARES = [(0, "white"), (0.1, "#bfdbfe"), (0.5, "#3b82f6"), (1, "#172554")]  # steep at first: one clip of forty shows
FEW = 20  # classes up to which there is room for numbers and large letters
LONG = 32  # characters of a name that are shown


def confusion(names: list[str], counts: np.ndarray) -> bytes:
    """Return a PNG of a confusion matrix: counts (C, C) of clips by true class (rows) and predicted class (columns)."""
    return _png(confusion_figure(names, counts))


def per_class(names: list[str], recall: np.ndarray, clips: np.ndarray, chance: float, what: str = "recall") -> bytes:
    """Return a PNG of the recall (C,), or `what` it is, of each class, percent, best first, with its number of clips (C,).

    recall: NaN where a class has no clips.
    chance: percent.
    """
    return _png(per_class_figure(names, recall, clips, chance, what))


def few_shot(curves: dict[str, dict[int, list[float]]], full: dict[str, float], what: str = "accuracy") -> bytes:
    """Return a PNG of a figure (percent) over clips per class: by modality and clips those of several draws.

    full: by modality the figure with all clips; what: its name.
    """
    return _png(few_shot_figure(curves, full, what))


def confusion_figure(names: list[str], counts: np.ndarray) -> "Figure":
    """Draw a confusion matrix, counts (C, C). Colour: share of its row, 0 to 1. Numbers: clips."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    few, n = len(names) <= FEW, len(names)
    size, side = (8, max(2.2, 0.42 * n)) if few else (6, 0.125 * n)  # points; inches
    labels = [_short(name) for name in names]
    room = max(map(len, labels)) * size * 0.6 / 72  # inches that a name takes, about
    figure = Figure(
        figsize=(side + room + 1.3, side + room * (0.71 if few else 1) + 0.5), dpi=150, layout="constrained"
    )
    axes = figure.add_subplot()
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    colours = LinearSegmentedColormap.from_list("shares", SHARES).with_extremes(bad="#e2e6ec")
    image = axes.imshow(shares, cmap=colours, vmin=0, vmax=1)
    turn = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if few else {"rotation": 90}
    axes.set_xticks(range(n), labels, fontsize=size, parse_math=False, **turn)
    axes.set_yticks(range(n), labels, fontsize=size, parse_math=False)
    axes.set_xlabel("predicted class", fontsize=9)
    axes.set_ylabel("true class", fontsize=9)
    axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e2e6ec", lw=0.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if few:
        for row, column in np.argwhere(counts):
            shade = "white" if shares[row, column] > 0.4 else INK
            axes.text(column, row, f"{counts[row, column]:g}", ha="center", va="center", fontsize=8, color=shade)
    bar = figure.colorbar(image, ax=axes, shrink=min(1, 4 / side), format=PercentFormatter(1), pad=0.02)
    bar.set_label("share of a true class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return figure


def per_class_figure(
    names: list[str], recall: np.ndarray, clips: np.ndarray, chance: float, what: str = "recall"
) -> "Figure":
    """Draw a bar for each class, recall and clips (C,), classes without a clip last.

    There are lines at chance and at the mean of the classes.
    """
    from matplotlib.figure import Figure

    order = np.argsort(-recall, kind="stable")  # NaN last
    step, size = (0.26, 8) if len(names) <= FEW else (0.16, 6.5)
    figure = Figure(figsize=(7.6, 0.9 + step * len(names)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    rows = range(len(names))
    axes.barh(rows, recall[order], height=0.74, color=BLUE, alpha=0.75)
    for row, index in enumerate(order):
        axes.text(102, row, _share(recall[index], clips[index], what), va="center", fontsize=size, color=SOFT)
    mean = np.nanmean(recall)
    axes.axvline(mean, color=INK, lw=1.2, label=f"mean of the classes: {mean:.1f}%")
    axes.axvline(chance, color=RED, lw=1.2, ls="--", label=f"chance: {chance:.1f}%")
    axes.set_yticks(rows, [_short(names[index]) for index in order], fontsize=size, parse_math=False)
    axes.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel(f"{what} (%)", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.2)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def few_shot_figure(
    curves: dict[str, dict[int, list[float]]], full: dict[str, float], what: str = "accuracy"
) -> "Figure":
    """Draw a line of means with one standard deviation of the draws up and down for each modality.

    Dotted lines: with all clips.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7.6, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    shades = dict(zip(curves | full, SHADES, strict=False))
    for name, draws in curves.items():
        shots = sorted(draws)
        means = [statistics.mean(draws[shot]) for shot in shots]
        spreads = [statistics.stdev(draws[shot]) if len(draws[shot]) > 1 else 0 for shot in shots]
        axes.errorbar(shots, means, spreads, fmt="o-", color=shades[name], ms=4, elinewidth=1, capsize=3, label=name)
    for name, with_all in full.items():
        axes.axhline(with_all, color=shades[name], ls=":", label=f"{name}, all clips: {with_all:.1f}")
    ticks = sorted({shot for draws in curves.values() for shot in draws})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training clips per class", fontsize=9)
    axes.set_ylabel(f"{what} (%), ± deviation of the draws", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def _share(recall: float, clips: int, what: str) -> str:
    of = "of" if what == "recall" else "with"
    return f"{recall:.0f}% {of} {clips:,} {'clip' if clips == 1 else 'clips'}" if clips else "no clips"


def _short(name: str) -> str:
    name = "".join(letter if letter.isprintable() else " " for letter in name)  # no font draws control characters
    return name if len(name) <= LONG else f"{name[: LONG - 1]}…"


def _png(figure: "Figure") -> bytes:
    return to_bytes(lambda buffer: figure.savefig(buffer, format="png"))
