"""Write one HTML file about a run: its curves, retrieval metrics, and hits of some queries, with pictures and sound.

Everything is inside the file (data: URIs) and its content security policy lets the browser request nothing else.
"""

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip4vla.io.atomic import write_bytes, write_text
from clip4vla.report import class_plots, sections
from clip4vla.report.preview import ClipPreview, data_uri, to_bytes
from clip4vla.report.sections import captioning
from clip4vla.report.sections.captioning import CaptionCard
from clip4vla.report.sections.classification import Predicted
from clip4vla.report.sections.retrieval import Query, arrow

if TYPE_CHECKING:  # matplotlib takes a second, and every training run loads this module: imported where it draws
    from matplotlib.axes import Axes

TERMS = {
    "loss": "total",
    "loss/at": "text–audio",
    "loss/av": "vision–audio",
    "loss/aa": "audio–masked",
    "loss/tv": "text–vision",
    "loss/tm": "text–media",
    "loss/caption": "words",
    "loss/label": "labels",
}
PANELS = {  # of meter.py's rows
    "learning rate": {"lr": ""},
    "gradient norm": {"grad_norm": ""},
    "audio space (Wang & Isola)": {"alignment": "alignment", "uniformity": "uniformity"},
    "clips / s": {"clips_per_s": ""},
    "waiting for data (%)": {"data_wait_fraction": ""},
    "useful TFLOP/s of a rank": {"tflops": ""},
    "peak memory (GiB)": {"memory_gib": ""},
    "shares (%)": {"no_audio_fraction": "clips without sound", "masked_fraction": "rows masked"},
    "MFU (%)": {"mfu": ""},
}
SHADES = ("#1f2937", "#2563eb", "#059669", "#d97706", "#9333ea", "#dc2626", "#0891b2", "#be185d")
PLOTTED = 200  # classes at most in a confusion matrix, which takes gigabytes beyond
LARGEST = 1e100  # number that is drawn: matplotlib squares some
LONG = 100  # characters of a name in a plot
SMOOTH = ("lr", "memory_gib")  # as they are
COLOURS = {key: shade for keys in (TERMS, *PANELS.values()) for key, shade in zip(keys, SHADES, strict=False)}


def run_plot(name: str, rows: list[dict[str, Any]]) -> bytes:
    """Plot a PNG of a run from its metrics.jsonl rows: the loss terms over steps, and below what else the rows have.

    Of rows with the same step, as after a resume, the last counts.
    """
    from matplotlib.figure import Figure

    rows = latest(rows)
    panels = [(title, keys) for title, keys in PANELS.items() if any(key in row for row in rows for key in keys)]
    lines = -(-len(panels) // 3)
    width, height = 7.6, 3.3 + 1.4 * lines  # inches; fixed margins, as to fit them takes as long as to draw
    figure = Figure(figsize=(width, height), dpi=150)
    edges = {"left": 0.62 / width, "right": 1 - 0.1 / width, "bottom": 0.5 / height, "top": 1 - 0.3 / height}
    grid = figure.add_gridspec(lines + 1, 3, height_ratios=[2.6] + [1] * lines, hspace=0.5, wspace=0.27, **edges)
    top = figure.add_subplot(grid[0, :])
    _panel(top, rows, TERMS)
    shown = name.encode("utf-8", "backslashreplace").decode()[:LONG]
    top.set_title(shown, parse_math=False)  # a folder's name may hold $
    top.set_ylabel("loss (nats)")
    if not top.lines:
        top.text(0.5, 0.5, "no loss logged", ha="center", transform=top.transAxes)
    for place, (title, keys) in enumerate(panels):
        axes = figure.add_subplot(grid[1 + place // 3, place % 3], sharex=top)
        _panel(axes, rows, keys, 100 if "%" in title else 1)
        axes.set_title(title, fontsize=8, loc="left", color="#5b6472")
        if axes.dataLim.y0 >= 0:
            axes.set_ylim(bottom=0)
    figure.supxlabel("step", fontsize=9, y=0.08 / height)
    return to_bytes(lambda buffer: figure.savefig(buffer, format="png"))


def write_plot(run_dir: str, rows: list[dict[str, Any]]) -> None:
    """Write run_dir/curves.png of a run of more than a few steps."""
    if len(rows) > 20:
        write_bytes(Path(run_dir, "curves.png"), run_plot(Path(run_dir).name, rows))


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with a loss in order of steps; of rows with the same step, as after a resume, the last."""
    return [row for _, row in sorted({row["step"]: row for row in rows if "loss" in row}.items())]


def is_number(value: Any) -> bool:
    """Tell whether a value can be drawn, be it as a gap."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not LARGEST < abs(value) != math.inf


def draw(axes: "Axes", rows: list[dict[str, Any]], key: str, times: float = 1, **line: Any) -> None:
    """Plot the values of a key over steps, raw (thin) and smoothed.

    line: how matplotlib is to draw the smoothed one.
    """
    points = [(row["step"], row[key] * times) for row in rows if is_number(row.get(key))]
    if points:
        steps, values = np.array(points, dtype=float).T
        axes.plot(steps, values, color=line["color"], lw=0.7, alpha=0.3)
        axes.plot(steps, values if key in SMOOTH else _smooth(values), **line)


def tidy(axes: "Axes", size: float) -> None:
    """Format axes: few ticks, of whole steps, letters of this size, and no frame."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}")
    axes.tick_params(labelsize=size)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def _panel(axes: "Axes", rows: list[dict[str, Any]], keys: dict[str, str], times: float = 1) -> None:
    """Plot the values of each key; keys: what to call them where there are several."""
    size, width = (8, 1.8) if keys is TERMS else (7, 1.2)
    for key, label in keys.items():
        draw(axes, rows, key, times, color=COLOURS[key], lw=width, label=label)
    tidy(axes, size)
    if axes.lines and len(keys) > 1:
        axes.legend(frameon=False, fontsize=size)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred moving average (n,) over about a twentieth of the points, narrower at both ends.

    It is over the values that are finite.
    """
    half, finite = len(values) // 40, np.isfinite(values)
    total, count = (_windows(part, half) for part in (np.where(finite, values, 0.0), finite.astype(float)))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _windows(values: np.ndarray, half: int) -> np.ndarray:
    """Return sums (n,) over places i - half to i + half, in linear time, and without differences, which a peak spoils.

    A window ends one block of its width and begins the next, or is one (van Herk, 1992).
    """
    width, n = 2 * half + 1, len(values)
    blocks = np.pad(values, (half, half + -(n + 2 * half) % width)).reshape(-1, width)
    heads, tails = blocks.cumsum(1).ravel(), blocks[:, ::-1].cumsum(1)[:, ::-1].ravel()
    first = np.arange(n)
    return tails[:n] + np.where(first % width, heads[first + width - 1], 0)


def write(path: Path, title: str, settings: dict[str, Any], runs: dict[str, list[dict[str, Any]]], body: str) -> None:
    """Write the page. settings may be nested; runs: rows of metrics.jsonl by name; body: HTML of retrieval() or captions()."""
    curves = "".join(
        f'<img alt="curves of {escape(name)}" src="{data_uri(run_plot(name, rows), "image/png")}">'
        for name, rows in runs.items()
    )
    parts = [
        f"<header><h1>{escape(title)}</h1><dl>{_settings(settings)}</dl></header>",
        f'<section><h2>Training</h2><div class="curves">{curves}</div></section>' if runs else "",
        body,
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"{HEAD}<title>{escape(title)}</title><main>{''.join(parts)}</main></html>\n"
    write_text(path, text.encode("utf-8", "backslashreplace").decode())  # a folder's name may be no text


def retrieval(metrics: dict[str, dict[str, Any]], exhibits: list[ClipPreview], queries: list[Query]) -> str:
    """Return HTML of retrieval. metrics: by direction what retrieval.summary() gives.

    Queries and hits refer to exhibits by number.
    A row of metrics may have "ci": {"R@1": [low, high], ...}.
    """
    galleries = {direction: row["n_gallery"] for direction, row in metrics.items()}
    table = f"<section><h2>Retrieval</h2>{_table(metrics)}</section>" if metrics else ""
    return table + (sections.retrieval.section(exhibits, queries, galleries) if queries else "")


def captions(metrics: dict[str, dict[str, Any]], exhibits: list[ClipPreview], written: list[CaptionCard]) -> str:
    """Return HTML of captioning. metrics: as captioning.ranked gives them; written: refers to exhibits by number."""
    row = metrics["caption"]
    names = [name for name, value in row.items() if isinstance(value, float)]
    head, cells = ("".join(parts) for parts in ([f"<th>{n}" for n in names], [f"<td>{_number(row, n)}" for n in names]))
    table = (
        f'<div class="scroll"><table class="plain"><thead><tr>{head}</thead><tbody><tr>{cells}</tbody></table></div>'
    )
    note = f"{row['n_clips']:,} clips, {row['n_references']:,} references; times 100, as pycocoevalcap gives them. "
    note += "In brackets: 95% interval, bootstrap over groups. " * ("ci" in row) + row.get("excluded", "")
    title = f'<section><h2>Captions</h2>{table}<p class="note">{escape(note)}</p></section>'
    return title + (captioning.section(exhibits, written) if written else "")


ONE = {"accuracy": "accuracy %", "top5": "top 5 %", "mAP": "mAP %", "mean_class_accuracy": "class mean %"}
ONE |= {"majority_baseline": "majority baseline %"}
ONE_NOTE = "Majority baseline: always the most frequent class. Class mean: all classes count the same. ± : deviation over folds. "
SEVERAL = {"mAP": "mAP %", "AUC": "AUC %", "d_prime": "d′", "chance_mAP": "chance mAP %"}
SEVERAL_NOTE = """Clips have several classes, and are ranked for each. mAP, AUC: means over the classes; d′: of the mean AUC.
Chance mAP: the mean share of the clips that a class has. """


def classification(metrics: dict[str, dict[str, Any]], exhibits: list[ClipPreview], predicted: list[Predicted]) -> str:
    """Return HTML of classification. metrics: as classification.ranked gives them.

    predicted: refers to exhibits by number.
    """
    several = "d_prime" in metrics["label"]  # classes of a clip; earlier versions wrote no mAP of one class
    columns = {key: head for key, head in (SEVERAL if several else ONE).items() if key in metrics["label"]}
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{_number(row, key)}</td>' for key in columns)}"
        f"<td>{row['n_clips']:,}</td><td>{row['n_classes']}</td><td>{row['n_folds']}</td></tr>"
        for name, row in metrics.items()
    )
    head = "".join(f"<th>{name}" for name in ("", *columns.values(), "clips", "classes", "folds"))
    note = SEVERAL_NOTE if several else ONE_NOTE
    note += "In brackets: 95% interval, bootstrap over groups." * any("ci" in row for row in metrics.values())
    table = f'<div class="scroll"><table><thead><tr>{head}</thead><tbody>{rows}</tbody></table></div>'
    plots = {name: data_uri(png, "image/png") for name, png in _class_plots(metrics).items()}
    fits = " style='max-width: 100%; width: 900px'" * (
        len(metrics["label"]["classes"]) <= 20
    )  # a larger one is scrolled
    large = "".join(
        f'<div class="scroll"><img alt="confusion matrix"{fits} src="{uri}"></div>'
        for uri in [plots.pop("confusion matrix", "")]
        if uri
    )
    small = "".join(f'<img alt="{name}" src="{uri}">' for name, uri in plots.items())
    title = f'<section><h2>Classification</h2>{table}<p class="note">{note}</p>{large}<div class="curves">{small}</div></section>'
    return title + (sections.classification.section(exhibits, predicted) if predicted else "")


def _class_plots(metrics: dict[str, dict[str, Any]]) -> dict[str, bytes]:
    """Return PNGs by title: of the main modalities each class, and of all of them few-shot curves."""
    row = metrics["label"]
    if row["n_classes"] > PLOTTED:
        return {}
    if "AP" in row:
        what, clips, precision = "mAP", np.array(row["clips"]), np.array(row["AP"], float)
        plot = class_plots.per_class(row["classes"], precision, clips, row["chance_mAP"], "average precision")
        plots = {"average precision of each class": plot}
    else:
        what, counts = "accuracy", np.array(row["confusion"])
        clips = counts.sum(1)
        recall = np.where(clips, 100 * counts.diagonal() / np.maximum(clips, 1), np.nan)
        plots = {
            "confusion matrix": class_plots.confusion(row["classes"], counts),
            "recall of each class": class_plots.per_class(row["classes"], recall, clips, 100 / len(clips)),
        }
    curves = {
        name: {int(shots): values for shots, values in m.get("few_shot", {}).items() if values}
        for name, m in metrics.items()
    }
    if any(curves.values()):
        full = {name: m[what] for name, m in metrics.items()}
        plots["few-shot curves"] = class_plots.few_shot({k: v for k, v in curves.items() if v}, full, what)
    return plots


def _settings(settings: dict[str, Any], prefix: str = "") -> str:
    return "".join(
        _settings(value, f"{prefix}{key}.")
        if isinstance(value, dict)
        else f"<div><dt>{escape(prefix + str(key))}</dt><dd>{escape(str(value))}</dd></div>"
        for key, value in settings.items()
    )


def _table(metrics: dict[str, dict[str, Any]]) -> str:
    groups: dict[str, list[str]] = {}
    for direction, row in metrics.items():
        task, _, subset = direction.partition("/")
        groups.setdefault(task, []).append(_metrics_row(subset or "all", row))
    bodies = "".join(
        f'<tbody><tr><th colspan="9" scope="rowgroup">{escape(arrow(task))}</th></tr>{"".join(rows)}</tbody>'
        for task, rows in groups.items()
    )
    head = "".join(
        f"<th>{name}" for name in ("", "R@1 %", "R@5 %", "R@10 %", "MedR", "MeanR", "queries", "gallery", "p")
    )
    note = "Grey: chance, with as many right answers as there are. p: permutation test of the mean reciprocal rank, one-sided."
    note += " In brackets: 95% interval, bootstrap over groups." if any("ci" in row for row in metrics.values()) else ""
    return f'<div class="scroll"><table><thead><tr>{head}</thead>{bodies}</table></div><p class="note">{note}</p>'


def _metrics_row(subset: str, row: dict[str, Any]) -> str:
    recall = "".join(
        f'<td class="bar" style="--w:{row[f"R@{k}"]:.1f}%">{_number(row, f"R@{k}")}'
        f"<small>{row['chance'][f'R@{k}']:.1f}</small></td>"
        for k in (1, 5, 10)
    )
    p = "–" if row["p_value"] is None else f"{row['p_value']:.2g}"
    rest = (_number(row, "MedR"), _number(row, "MeanR"), f"{row['n_queries']:,}", f"{row['n_gallery']:,}", p)
    return f"<tr><td>{escape(subset)}</td>{recall}{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"


def _number(row: dict[str, Any], name: str) -> str:
    interval = row.get("ci", {}).get(name)
    spread = f" <i>± {row['accuracy_std']:.1f}</i>" if name == "accuracy" and "accuracy_std" in row else ""
    value = f"{row[name]:.2f}" if name == "d_prime" else f"{row[name]:.1f}"
    return value + spread + (f" <i>[{interval[0]:.1f}, {interval[1]:.1f}]</i>" if interval else "")


HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light; --line: #e2e6ec; --soft: #5b6472; --right: #15803d; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f9; color: #1b2330;
  font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 20px clamp(12px, 3vw, 32px) 60px; }
h1 { font-size: clamp(21px, 4vw, 30px); margin: 8px 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 34px 0 12px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px 18px; margin: 0; }
dt, .note, .id { color: var(--soft); font-size: 12.5px; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
header, .card, .scroll, .curves img { background: #fff; border: 1px solid var(--line); border-radius: 12px; }
header { padding: 12px 20px 20px; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 14px; }
.curves img { width: 100%; max-width: 660px; padding: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { font-size: 12.5px; color: var(--soft); }
tbody th { padding-top: 14px; border-bottom: 1px solid var(--line); }
.plain :is(th, td) { position: static; text-align: right; }
tbody td { border-bottom: 1px solid #f0f2f5; }
.bar { background: linear-gradient(90deg, #dbeafe var(--w), transparent 0) 0 50% / 100% 70% no-repeat; }
td small { color: var(--soft); display: inline-block; width: 3.2em; }
td i { color: var(--soft); font: 11.5px system-ui, "DejaVu Sans", sans-serif; }
.card { padding: 14px; margin-bottom: 16px; }
.head { display: flex; gap: 6px 10px; align-items: center; flex-wrap: wrap; margin-bottom: 8px; }
.badge { padding: 2px 10px; border-radius: 99px; font-size: 13px; font-weight: 600; }
.ok { background: #dcfce7; color: #14532d; }
.miss { background: #fee2e2; color: #7f1d1d; }
.media > * { display: block; width: 100%; margin-bottom: 6px; border-radius: 6px; }
.spectrogram { height: 84px; }
audio { height: 34px; }
.id { overflow-wrap: anywhere; }
.caption { margin: 3px 0; overflow-wrap: anywhere; }
details { font-size: 13.5px; }
</style>
"""
