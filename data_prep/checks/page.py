"""Report on checked shard folders: numbers, the lines that check.py prints, and a page with plots and clips to play."""

import functools
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
import torch
import torchaudio.functional as AF
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from clip4vla.config import SpectrogramConfig
from clip4vla.data.sample_metadata import labels_of
from clip4vla.data.shards import ShardFolder
from clip4vla.io.atomic import write_text
from clip4vla.media.spectrogram import decode, mel_filters
from clip4vla.report.page import HEAD
from clip4vla.report.preview import data_uri, grey, ogg, original_sound, spectrogram_jpeg, to_bytes
from data_prep.checks.shard import ClipStats, Finding

SHOWN = 10  # findings of a folder that are printed; the page has them all
REPEATS = ("audio", "picture")
ROW: tuple[str, ...] = ("folder", "clips", "hours", "shards", "MB", "no sound", "no frames", "no captions")
ROW += ("same audio", "same picture", "findings")
LONG = 32  # characters of a name in a plot
PALETTE = ("#2563eb", "#d97706", "#059669", "#9333ea", "#1f2937")


@dataclass
class FolderReport:
    """Hold what is in one shard folder, what is wrong with it, and which clips repeat another's sound or picture."""

    folder: ShardFolder
    tally: ClipStats
    findings: list[Finding] = field(default_factory=list)
    repeats: dict[str, tuple[int, str]] = field(default_factory=dict)  # by REPEATS: clips, and an example

    @property
    def vectors(self) -> bool:
        """Tell whether it holds the frozen towers' vectors of the folder above it."""
        return "clip" in self.folder.fingerprint

    @property
    def size(self) -> float:
        """Return the size of its tars in MB."""
        return sum(shard.bytes for shard in self.folder.shards) / 1e6


def share(part: int, whole: int) -> str:
    """Return part / whole as a percentage; – if whole is 0."""
    return f"{100 * part / whole:.3g} %" if whole else "–"


def row(name: str, reports: list[FolderReport], tally: ClipStats) -> list[str]:
    """Return a line of the table of folders; tally: their clips."""
    cells = [f"{len(tally):,}", f"{tally.hours:.3f}", f"{sum(len(report.folder.shards) for report in reports):,}"]
    cells += [f"{sum(report.size for report in reports):,.1f}"]
    cells += [share(count, len(tally)) for count in tally.without().values()]
    cells += [share(sum(report.repeats[kind][0] for report in reports), len(tally)) for kind in REPEATS]
    return [name, *cells, f"{sum(len(report.findings) for report in reports):,}"]


def folder_table(reports: list[FolderReport], tally: ClipStats) -> list[list[str]]:
    """Return the table of folders: a row for each, and one for all."""
    rows = [row(report.folder.url, [report], report.tally) for report in reports]
    return [*rows, row("all", reports, tally)]


def remarks(reports: list[FolderReport]) -> list[str]:
    """Describe repeated sounds and pictures, with the example of the folder that has the most."""
    lines = []
    for kind in REPEATS:
        most = max(reports, key=lambda report: report.repeats[kind][0])
        if count := sum(report.repeats[kind][0] for report in reports):
            example = f"in {most.folder.url} {most.repeats[kind][0]:,}, {most.repeats[kind][1]}"
            lines.append(f"{count:,} clips repeat another's {kind} in their folder: {example}")
    return lines


def distributions(tally: ClipStats) -> list[list[str]]:
    """Return rows of name, least, median, mean, most."""
    return [
        [name, *(f"{value:,.4g}" for value in (v.min(), np.median(v), v.mean(), v.max()))]
        for name, v in tally.columns().items()
    ]


def counted(counter: Counter[str]) -> str:
    """Return counts as `vb 41, nb 22`, the most frequent first."""
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common()) or "none"


def counted_labels(tally: ClipStats) -> str:
    """Return the number of classes, the labels of a clip, and the most frequent classes; `none` without labels."""
    if not tally.labels:
        return "none"
    most = Counter(dict(tally.labels.most_common(SHOWN)))
    return f"{len(tally.labels):,} classes, {tally.labels.total() / len(tally):.3g} a clip, {counted(most)}"


def summary(reports: list[FolderReport], tally: ClipStats) -> str:
    """Return the text that check.py prints."""
    lines = _aligned([list(ROW), *folder_table(reports, tally)])
    lines += ["", *_aligned([["", "min", "median", "mean", "max"], *distributions(tally)]), ""]
    lines += [f"audio types: {counted(tally.types)}", f"spoken: {counted(tally.spoken)}"]
    lines += [f"captions: {counted(tally.written)}", f"labels: {counted_labels(tally)}"]
    lines += [f"remark: {remark}" for remark in remarks(reports)]
    for report in reports:
        lines += [f"finding: {finding}" for finding in report.findings[:SHOWN]]
        if len(report.findings) > SHOWN:
            lines.append(f"finding: {report.folder.url}: {len(report.findings) - SHOWN:,} more, see the page")
    return "\n".join(
        "".join(c if c.isprintable() else " " for c in line) for line in lines
    )  # a terminal obeys nothing in it


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]  # fmt: skip


def write_page(
    path: Path, reports: list[FolderReport], tally: ClipStats, decoded: str, clips: Iterator["PreviewClip"]
) -> None:
    """Write the page: numbers, findings, plots, and the clips."""
    findings = [finding for report in reports for finding in report.findings]
    sources = list(dict.fromkeys(report.folder.source for report in reports))
    title = "Shards: " + ", ".join(sources[:4]) + (f" and {len(sources) - 4} more" if sources[4:] else "")
    findings_table = _table(
        ("folder", "shard", "key", "reason"), [[f.folder, f.shard, f.key, f.reason] for f in findings]
    )
    plots = "".join(f'<img alt="{name}" src="{data_uri(png, "image/png")}">' for name, png in _plots(reports, tally))
    spread = _table(("", "min", "median", "mean", "max"), distributions(tally))
    notes = "".join(f'<p class="note">{escape(remark)}</p>' for remark in remarks(reports))
    parts = [
        f"<header><h1>{escape(title)}</h1>{_head(reports, tally, decoded)}</header>",
        f'<section class="texts"><h2>Findings</h2>{findings_table}</section>' if findings else "",
        f'<section><h2>In numbers</h2><div class="curves">{plots}</div></section><section>{spread}</section>',
        f'<section class="folders"><h2>Folders</h2>{_table(ROW, folder_table(reports, tally))}{notes}</section>',
        f'<section><h2>Clips, drawn at random</h2><div class="clips">{"".join(map(_card, clips))}</div></section>',
    ]
    write_text(path, f"{HEAD}{STYLE}<title>{escape(title)}</title><main>{''.join(parts)}</main></html>\n")


def _head(reports: list[FolderReport], tally: ClipStats, decoded: str) -> str:
    total = dict(zip(ROW, row("all", reports, tally), strict=True))
    good = not any(report.findings for report in reports)
    badge = (
        f'<span class="badge {"ok" if good else "miss"}">{"✓ all is well" if good else "✗ " + total["findings"]}</span>'
    )
    lists = {"audio types": tally.types, "spoken languages": tally.spoken, "captions": tally.written}
    short = {name: escape(total[name]) for name in ROW[1:-1]} | {"decoded": escape(decoded), "findings": badge}
    long = {name: escape(counted(counter)) for name, counter in lists.items()} | {
        "labels": escape(counted_labels(tally))
    }
    cells = ["".join(f"<div><dt>{n}</dt><dd>{cell}</dd></div>" for n, cell in some.items()) for some in (short, long)]
    return f'<dl>{cells[0]}</dl><dl class="long">{cells[1]}</dl>'


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{name}" for name in head)}</thead>{body}</table></div>'
    )


def _plots(reports: list[FolderReport], tally: ClipStats) -> Iterator[tuple[str, bytes]]:
    columns, folders = tally.columns(), [report for report in reports if not report.vectors]
    names = {"seconds": "seconds", "segments": "segments", "words a caption": "words a caption"}
    for column, label in names.items():
        if column in columns:
            yield label, _plot(label, functools.partial(_histogram, values=columns[column], label=label))
    splits: dict[str, Counter[str]] = {report.folder.split: Counter() for report in folders}
    for report in folders:
        splits[report.folder.split][report.folder.source] += len(report.tally)
    yield "audio type", _plot("audio type", lambda axes: _bars(axes, {"": tally.types}))
    yield "clips by source", _plot("clips by source", lambda axes: _bars(axes, splits))
    yield "captions by language", _plot("captions by language", lambda axes: _bars(axes, {"": tally.written}))


def _plot(title: str, draw: Callable[[Axes], None]) -> bytes:
    figure = Figure(figsize=(4.6, 3.1), dpi=160, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return to_bytes(lambda buffer: figure.savefig(buffer, format="png"))


def _histogram(axes: Axes, values: np.ndarray, label: str) -> None:
    """Draw a histogram: whole numbers have a bar each while there are few.

    The rare long tail is one bar at the 99.5th percentile.
    """
    top = np.quantile(values, 0.995)
    if values.dtype.kind == "i" and top - values.min() < 40:
        bins = np.arange(values.min(), max(np.ceil(top), values.min() + 5) + 2) - 0.5
    else:
        bins = np.linspace(0, max(top, 1e-3), 41)
    axes.hist(np.minimum(values, top), bins=bins.tolist(), color=PALETTE[0], rwidth=0.9)
    axes.axvline(np.median(values), color=PALETTE[1], lw=1.2, label=f"median {np.median(values):.3g}")
    axes.set_ylabel("captions" if "caption" in label else "clips", fontsize=9)
    axes.locator_params(axis="x", integer=values.dtype.kind == "i")
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=8)


def _bars(axes: Axes, stacks: dict[str, Counter[str]]) -> None:
    """Draw horizontal bars of the 15 largest; one colour for each stack."""
    total = sum(stacks.values(), Counter())
    names = [name for name, _ in total.most_common(15)][::-1]
    rows, left = range(len(names)), np.zeros(len(names), int)
    for colour, (label, counter) in zip(PALETTE * len(stacks), stacks.items(), strict=False):
        widths = np.array([counter[name] for name in names])
        bars = axes.barh(rows, widths, left=left, color=colour, label=label, height=0.7)
        left = left + widths
    axes.set_yticks(rows, [name[:LONG] for name in names], parse_math=False)
    if names:
        axes.bar_label(bars, [f"{total[name]:,}" for name in names], padding=3, fontsize=8)
        axes.margins(x=0.15)
        axes.set_ylim(len(names) - max(5, len(names)) - 0.5, len(names) - 0.5)
    if len(stacks) > 1:
        for text in axes.legend(frameon=False, fontsize=8).get_texts():
            text.set(text=text.get_text()[:LONG], parse_math=False)


@dataclass
class PreviewClip:
    """An intact sample as read from its shard."""

    folder: ShardFolder
    meta: dict
    members: dict[str, bytes]  # by kind


def drawn(reports: list[FolderReport], n: int = 20) -> Iterator[PreviewClip]:
    """Yield the n clips of the page, the same every time."""
    clips = [report for report in reports if not report.vectors]
    ends = np.cumsum([len(report.tally) for report in clips])
    total = sum(len(report.tally) for report in clips)
    for number in random.Random(0).sample(range(total), min(n, total)):
        which = int(np.searchsorted(ends, number, "right"))
        folder, row = clips[which].folder, clips[which].tally.facts[number - ends[which]]
        members = folder.read([(int(row["shard"]), int(row["entry"]))])[0]
        if isinstance(members, dict) and _opens(members):
            yield PreviewClip(folder, json.loads(members["json"]), members)


def _opens(members: dict[str, bytes]) -> bool:
    """Tell whether the pictures can be decoded: a check of some clips may not have tried."""
    try:
        for kind in members.keys() & {"fbank", "frames"}:
            with Image.open(io.BytesIO(members[kind])) as image:
                image.load()
    except Exception:  # Pillow raises whatever its parsers raise
        return False
    return True


def _card(clip: PreviewClip) -> str:
    meta, parts = clip.meta, []
    if strip := clip.members.get("frames"):
        parts.append(
            f'<img class="strip" alt="frames" src="{data_uri(_contact_sheet(strip, meta["n_frames"]), "image/jpeg")}">'
        )
    if fbank := clip.members.get("fbank"):
        cfg = SpectrogramConfig(**clip.folder.fingerprint["spectrogram"])
        rows = grey(fbank)[: meta["n_rows"]]
        sound, origin = _sound(clip, torch.from_numpy(rows), cfg)
        uri = data_uri(spectrogram_jpeg(rows, 672, 224), "image/jpeg")
        parts.append(f'<img class="spectrogram" alt="spectrogram" src="{uri}">')
        parts.append(
            f'<audio controls preload="none" src="{data_uri(sound, "audio/ogg")}"></audio><p class="note">{origin}</p>'
        )
    texts = [f"{text} [{lang}]" for text, lang in zip(meta["captions"], meta["caption_langs"], strict=True)]
    named = {"split": meta["split"], "type": meta["audio_type"], "spoken": meta["has_audio"] and meta["lang"]}
    named |= {
        "label": "; ".join(labels_of(meta)),
        "seconds": round(meta["duration"], 2),
        "segments": meta["n_segments"],
    }
    facts = " · ".join(f"{name} {value}" for name, value in (named | {"frames": meta["n_frames"]}).items() if value)
    return (
        f'<article class="card"><div class="media">{"".join(parts)}</div>{_captions(texts)}'
        f'<p class="id">{escape(meta["id"])}<br>{escape(facts)}</p></article>'
    )


def _contact_sheet(data: bytes, n_frames: int) -> bytes:
    """Return a JPEG of a film strip's frames in rows of four, on white."""
    with Image.open(io.BytesIO(data)) as image:
        strip = image.convert("RGB")
    size, columns = strip.width, min(n_frames, 4)
    sheet = Image.new("RGB", (columns * size, -(-n_frames // 4) * size), "white")
    for i in range(n_frames):
        sheet.paste(strip.crop((0, i * size, size, (i + 1) * size)), (i % 4 * size, i // 4 * size))
    sheet.thumbnail((560, 560))
    return to_bytes(lambda buffer: sheet.save(buffer, "JPEG", quality=85))


def _sound(clip: PreviewClip, rows: Tensor, cfg: SpectrogramConfig) -> tuple[bytes, str]:
    """Return Ogg of the clip's middle, mono, and where it is from: the medium, or the spectrogram if that is gone."""
    wave, origin = original_sound(clip.folder, clip.meta, cfg.sample_rate), "the original sound"
    if wave is None:
        wave, origin = griffin_lim(decode(rows, cfg), cfg), "rebuilt from the spectrogram: what the model receives"
    return ogg(wave, cfg.sample_rate), origin


def _captions(captions: list[str]) -> str:
    items = [f'<p class="caption">{escape(caption)}</p>' for caption in captions]
    more = f"<details><summary>{len(items) - 3} more</summary>{''.join(items[3:])}</details>" if items[3:] else ""
    return "".join(items[:3]) + more


def griffin_lim(decibels: Tensor, cfg: SpectrogramConfig) -> Tensor:
    """Return a waveform (T,) in [-1, 1] whose log-mel is close to (R, M) dB: phases by Griffin and Lim's algorithm."""
    rows = max(len(decibels), cfg.n_fft // cfg.hop_length)  # the shortest that can be padded for a window
    mel = torch.nn.functional.pad(10 ** (decibels / 10), (0, 0, 0, rows - len(decibels)))
    power = (mel @ torch.linalg.pinv(mel_filters(cfg))).clamp(min=0)  # R n_fft//2+1
    window = getattr(torch, f"{cfg.window}_window")(cfg.win_length)
    sizes = (cfg.n_fft, cfg.hop_length, cfg.win_length)
    torch.manual_seed(0)  # of the phases it starts with
    wave = AF.griffinlim(
        power.T, window, *sizes, 2.0, 32, momentum=0.99, length=(rows - 1) * cfg.hop_length, rand_init=True
    )
    return wave[: len(decibels) * cfg.hop_length] / wave.abs().max().clamp(min=1.0)


STYLE = """<style>
.texts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.texts th { text-align: left; }
.texts td:first-child { white-space: nowrap; }
header dl { grid-template-columns: repeat(auto-fill, minmax(110px, auto)); }
section + section > .scroll { margin-top: 14px; }
.folders tr:last-child td { font-weight: 600; }
.long { margin-top: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
.curves { grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px; align-items: start; }
.clips .card { margin: 0; }
.strip { max-height: 230px; object-fit: contain; background: #fff; }
.clips .note { margin: 0 0 6px; }
</style>
"""
