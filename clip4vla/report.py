"""One HTML file about a run: its curves, retrieval metrics, and what some queries found, with pictures and sound.

Everything is inside the file (data: URIs) and its content security policy lets the browser request nothing else.
"""

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

TERMS = {
    "loss": "total",
    "loss/at": "text–audio",
    "loss/av": "vision–audio",
    "loss/aa": "audio–masked",
    "loss/tv": "text–vision",
}
PANELS = {  # of meter.py's rows
    "learning rate": {"lr": ""},
    "gradient norm": {"grad_norm": ""},
    "audio space (Wang & Isola)": {"alignment": "alignment", "uniformity": "uniformity"},
    "clips / s": {"clips_per_s": ""},
    "waiting for data (%)": {"data_wait": ""},
    "useful TFLOP/s of a rank": {"tflops": ""},
    "peak memory (GiB)": {"memory_gib": ""},
    "shares (%)": {"no_audio": "clips without sound", "hidden_rows": "rows masked"},
    "MFU (%)": {"mfu": ""},
}
SHADES = ("#1f2937", "#2563eb", "#059669", "#d97706", "#9333ea")
SMOOTH = ("lr", "memory_gib")  # as they are
COLOURS = {key: shade for keys in (TERMS, *PANELS.values()) for key, shade in zip(keys, SHADES, strict=False)}
ASKED = {"text": "captions", "audio": "sound", "vision": "picture", "video": "picture", "picture": "picture"}


@dataclass
class Exhibit:
    """One clip as a person meets it. spectrogram is the stored picture: rows are time steps, columns mel channels."""

    title: str
    captions: list[str]
    picture: bytes | None = None  # JPEG
    spectrogram: bytes | None = None  # PNG or JPEG
    audio: bytes | None = None
    audio_mime: str = "audio/wav"


@dataclass
class Hit:
    """A gallery item that a query found."""

    exhibit: Exhibit
    score: float
    right: bool


@dataclass
class Query:
    """What was asked ("text_to_audio/nb": captions), what was found, best first, and the rank of the right answer."""

    direction: str
    exhibit: Exhibit
    rank: float
    hits: list[Hit]


def spectrogram_png(grey: np.ndarray) -> bytes:
    """PNG in magma of an 8-bit spectrogram (rows, mel): time runs to the right, low frequencies are at the bottom."""
    image = Image.fromarray(np.ascontiguousarray(grey.T[::-1]))  # mel rows
    if image.width > 672:
        image = image.resize((672, image.height))
    palette = (matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    image.putpalette(palette.tobytes())
    return encoded(lambda buffer: image.save(buffer, "PNG", optimize=True))


def run_plot(name: str, rows: list[dict[str, Any]]) -> bytes:
    """PNG of a run from its metrics.jsonl rows: the loss terms over steps, and below what else the rows have.

    Of rows with the same step, as after a resume, the last counts.
    """
    rows = [row for _, row in sorted({row["step"]: row for row in rows if "loss" in row}.items())]
    panels = [(title, keys) for title, keys in PANELS.items() if any(key in row for row in rows for key in keys)]
    lines = -(-len(panels) // 3)
    figure = Figure(figsize=(7.6, 3.3 + 1.4 * lines), dpi=150, layout="constrained")
    grid = figure.add_gridspec(lines + 1, 3, height_ratios=[2.3] + [1] * lines)
    top = figure.add_subplot(grid[0, :])
    _panel(top, rows, TERMS)
    top.set(title=name, ylabel="loss (nats)")
    if not top.lines:
        top.text(0.5, 0.5, "no loss logged", ha="center", transform=top.transAxes)
    for place, (title, keys) in enumerate(panels):
        axes = figure.add_subplot(grid[1 + place // 3, place % 3], sharex=top)
        _panel(axes, rows, keys, 100 if "%" in title else 1)
        axes.set_title(title, fontsize=8, loc="left", color="#5b6472")
        if axes.dataLim.y0 >= 0:
            axes.set_ylim(bottom=0)
    figure.supxlabel("step", fontsize=9)
    return encoded(lambda buffer: figure.savefig(buffer, format="png"))


def write_plot(run_dir: str, rows: list[dict[str, Any]]) -> None:
    """run_dir/curves.png of a run of more than a few steps."""
    if len(rows) > 20:
        Path(run_dir, "curves.png").write_bytes(run_plot(Path(run_dir).name, rows))


def _panel(axes: Axes, rows: list[dict[str, Any]], keys: dict[str, str], times: float = 1) -> None:
    """The values of each key, raw (thin) and smoothed; keys: what to call them where there are several."""
    small = keys is not TERMS
    for key, label in keys.items():
        points = [(row["step"], row[key] * times) for row in rows if row.get(key) is not None]
        if points:
            steps, values = np.array(points, dtype=float).T
            smooth = values if key in SMOOTH else _smooth(values)
            axes.plot(steps, values, color=COLOURS[key], lw=0.7, alpha=0.3)
            axes.plot(steps, smooth, color=COLOURS[key], lw=1.2 if small else 1.8, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}")
    axes.tick_params(labelsize=7 if small else 8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    if axes.lines and len(keys) > 1:
        axes.legend(frameon=False, fontsize=7 if small else 8)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twentieth of the points, narrower at both ends."""
    kernel = np.ones(min(len(values), len(values) // 40 * 2 + 1))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def write(
    path: Path,
    title: str,
    settings: dict[str, Any],
    runs: dict[str, list[dict[str, Any]]],
    metrics: dict[str, dict[str, Any]],
    queries: list[Query],
) -> None:
    """Write the page. settings may be nested; metrics maps direction to retrieval.summary(); five hits are shown."""
    curves = "".join(
        f'<img alt="curves of {escape(name)}" src="{data_uri(run_plot(name, rows), "image/png")}">'
        for name, rows in runs.items()
    )
    cards = "".join(_query(query, metrics.get(query.direction, {}).get("n_gallery")) for query in queries)
    parts = [
        f"<header><h1>{escape(title)}</h1><dl>{_settings(settings)}</dl></header>",
        f'<section><h2>Training</h2><div class="curves">{curves}</div></section>' if runs else "",
        f"<section><h2>Retrieval</h2>{_table(metrics)}</section>" if metrics else "",
        f"<section><h2>Examples</h2>{_filters(queries)}{cards}</section>{SCRIPT}" if queries else "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{HEAD}<title>{escape(title)}</title><main>{''.join(parts)}</main></html>\n", encoding="utf-8")


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
        f'<tbody><tr><th colspan="9" scope="rowgroup">{_arrow(task)}</th></tr>{"".join(rows)}</tbody>'
        for task, rows in groups.items()
    )
    head = "".join(
        f"<th>{name}" for name in ("", "R@1 %", "R@5 %", "R@10 %", "MedR", "MeanR", "queries", "gallery", "p")
    )
    note = (
        "Grey: chance, for one right answer in the gallery. p: permutation test of the mean reciprocal rank, one-sided."
    )
    return f'<div class="scroll"><table><thead><tr>{head}</thead>{bodies}</table></div><p class="note">{note}</p>'


def _metrics_row(subset: str, row: dict[str, Any]) -> str:
    recall = "".join(
        f'<td class="bar" style="--w:{row[f"R@{k}"]:.1f}%">{row[f"R@{k}"]:.1f}'
        f"<small>{min(100.0, 100 * k / row['n_gallery']):.1f}</small></td>"
        for k in (1, 5, 10)
    )
    p = "–" if row["p"] is None else f"{row['p']:.2g}"
    rest = (f"{row['MedR']:.1f}", f"{row['MeanR']:.1f}", f"{row['n_queries']:,}", f"{row['n_gallery']:,}", p)
    return f"<tr><td>{escape(subset)}</td>{recall}{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"


def _filters(queries: list[Query]) -> str:
    names = dict.fromkeys(query.direction for query in queries)
    options = "".join(f'<option value="{escape(name)}">{_arrow(name)}</option>' for name in names)
    return (
        f'<form class="filters"><label>Direction <select id="direction"><option value="">all</option>{options}</select>'
        '</label><label><input type="checkbox" id="failures"> failures only (right answer not first)</label>'
        '<output id="shown"></output></form>'
    )


def _query(query: Query, n_gallery: int | None) -> str:
    first = query.rank <= 1
    place = f"right answer at rank {query.rank:,.10g}" if query.rank == query.rank else "no right answer in the gallery"
    place += f" of {n_gallery:,}" if n_gallery and query.rank == query.rank else ""
    shown = ASKED.get(query.direction.partition("_to_")[0])
    note = "asked with these captions" if shown == "captions" else "its captions were not asked"
    hits = "".join(_hit(number, hit) for number, hit in enumerate(query.hits[:5], 1))
    return (
        f'<article class="card" data-direction="{escape(query.direction)}" data-failure="{int(not first)}">'
        f'<div class="head"><b>{_arrow(query.direction)}</b> <span class="badge {"ok" if first else "miss"}">'
        f"{'✓' if first else '✗'} {place}</span></div>"
        f'<div class="asked">{_media(query.exhibit, shown)}<div>'
        f'<div class="id">{escape(query.exhibit.title)}: {note}</div>{captions_list(query.exhibit.captions)}</div></div>'
        f'<div class="hits">{hits}</div></article>'
    )


def _hit(number: int, hit: Hit) -> str:
    mark = '<span class="mark">✓ right</span>' if hit.right else ""
    return (
        f'<div class="hit{" right" if hit.right else ""}"><div class="head"><b>{number}</b>{mark}'
        f'<span class="score">{hit.score:.3f}</span></div>{_media(hit.exhibit)}'
        f'<div class="id">{escape(hit.exhibit.title)}</div>{captions_list(hit.exhibit.captions)}</div>'
    )


def _media(exhibit: Exhibit, shown: str | None = None) -> str:
    """Picture, spectrogram and player, or only the part that was asked with."""
    parts = []
    if exhibit.picture and shown in (None, "picture"):
        parts.append(f'<img class="picture" alt="picture" src="{data_uri(exhibit.picture, "image/jpeg")}">')
    if exhibit.spectrogram and shown in (None, "sound"):
        with Image.open(io.BytesIO(exhibit.spectrogram)) as image:
            png = spectrogram_png(np.asarray(image.convert("L")))
        parts.append(f'<img class="spectrogram" alt="spectrogram" src="{data_uri(png, "image/png")}">')
    if exhibit.audio and shown in (None, "sound"):  # preload: browsers refuse pages with hundreds of loaded players
        parts.append(
            f'<audio controls preload="none" src="{data_uri(exhibit.audio, escape(exhibit.audio_mime))}"></audio>'
        )
    return f'<div class="media">{"".join(parts)}</div>' if parts else ""


def captions_list(captions: list[str]) -> str:
    items = [f'<p class="caption">{escape(caption)}</p>' for caption in captions]
    more = f"<details><summary>{len(items) - 3} more</summary>{''.join(items[3:])}</details>" if items[3:] else ""
    return "".join(items[:3]) + more


def _arrow(direction: str) -> str:
    return escape(direction).replace("_to_", " → ").replace("/", " · ")


def data_uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def encoded(save: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


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
dt, .note, .id, .score { color: var(--soft); font-size: 12.5px; }
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
tbody td { border-bottom: 1px solid #f0f2f5; }
.bar { background: linear-gradient(90deg, #dbeafe var(--w), transparent 0) 0 50% / 100% 70% no-repeat; }
td small { color: var(--soft); display: inline-block; width: 3.2em; }
.filters { display: flex; flex-wrap: wrap; gap: 8px 22px; align-items: center; margin-bottom: 14px; }
select { font: inherit; padding: 4px 8px; max-width: 100%; }
output { color: var(--soft); }
.card { padding: 14px; margin-bottom: 16px; }
.card[hidden] { display: none; }
.head { display: flex; gap: 6px 10px; align-items: center; flex-wrap: wrap; margin-bottom: 8px; }
.score { margin-left: auto; font-variant-numeric: tabular-nums; }
.badge { padding: 2px 10px; border-radius: 99px; font-size: 13px; font-weight: 600; }
.ok { background: #dcfce7; color: #14532d; }
.miss { background: #fee2e2; color: #7f1d1d; }
.mark { color: var(--right); font-weight: 700; }
.asked { display: flex; flex-wrap: wrap; gap: 8px 14px; background: #f4f6f9; border-radius: 8px; padding: 10px; }
.asked .media { width: 230px; }
.asked .media + div { flex: 1 1 200px; min-width: 0; }
.asked .picture { width: 150px; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin-top: 10px; }
.hit { border: 1px solid var(--line); border-radius: 8px; padding: 8px; min-width: 0; }
.right { border: 3px solid var(--right); padding: 6px; }
.media > * { display: block; width: 100%; margin-bottom: 6px; border-radius: 6px; }
.picture { aspect-ratio: 1; object-fit: cover; object-position: top; background: #eef1f5; }
.spectrogram { height: 84px; }
audio { height: 34px; }
.id { overflow-wrap: anywhere; }
.caption { margin: 3px 0; overflow-wrap: anywhere; }
details { font-size: 13.5px; }
@media (min-width: 900px) { .hits { grid-template-columns: repeat(5, 1fr); } }
</style>
"""

SCRIPT = """<script>
const direction = document.getElementById("direction"), failures = document.getElementById("failures");
function filter() {
  const cards = [...document.querySelectorAll(".card")];
  for (const card of cards)
    card.hidden = (direction.value && card.dataset.direction !== direction.value)
      || (failures.checked && card.dataset.failure !== "1");
  document.getElementById("shown").textContent = cards.filter(card => !card.hidden).length + " of " + cards.length;
}
direction.onchange = failures.onchange = filter;
filter();
</script>"""
