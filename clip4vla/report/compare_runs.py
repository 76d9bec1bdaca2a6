"""Write one HTML page that compares runs: the settings in which they differ, their results and their curves.

Each run has one colour and line style over the whole page.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

import yaml
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from clip4vla.checkpoints.best import HIGHER, LOWER
from clip4vla.config_io import parse_yaml, read_tree
from clip4vla.errors import UserError
from clip4vla.report import evaluations, page
from clip4vla.report.evaluations import NONE, TEST, by_setting, formatted, numbers, scores
from clip4vla.report.preview import data_uri, to_bytes
from clip4vla.report.sections.retrieval import arrow
from clip4vla.report.tracking import read_rows

VALIDATED = ("R@1", "accuracy", "CIDEr", "R@10", "MedR", "BLEU-4", "METEOR", "ROUGE-L")  # the first come first
MOST = 6  # panels of validation
Rows = list[dict[str, Any]]


@dataclass
class Run:
    """Hold what the page shows of a run folder."""

    name: str
    colour: str
    line: str  # solid, dashed or dotted: matplotlib's words and CSS's
    settings: dict[str, Any]  # by dotted key
    versions: dict[str, str]
    results: dict[str, dict[str, dict[str, Any]]]  # of each evaluation by name, by direction
    validation: Rows  # a row for each eval/val-STEP, its numbers by direction/metric
    rows: Rows  # of metrics.jsonl


def compare(folders: Sequence[str], out: str = "") -> Path:
    """Write the page; returns its path: comparison.html in the folder that the runs have in common, unless `out` says.

    Raises UserError for a folder that is no run or is named twice, a file in it that cannot be read, and a page that
    cannot be written.
    """
    runs = read(folders)
    path = Path(out or os.path.join(os.path.commonpath(map(os.path.abspath, folders)), "comparison.html"))
    body = f"<style>{STYLE}</style>{_legend(runs)}{settings(runs)}{results(runs)}"
    body += _plots("Validation", validation(runs)) + _plots("Training", training(runs))
    title = f"{len(runs)} runs compared" if len(runs) > 1 else runs[0].name
    try:
        page.write(path, title, {}, {}, body)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another --out") from None
    return path


def read(folders: Sequence[str]) -> list[Run]:
    """Read the runs in these folders, in this order; raises UserError as compare() does."""
    places = [os.path.realpath(folder) for folder in folders]
    again = next((folder for i, folder in enumerate(folders) if places[i] in places[:i]), None)
    if again is not None:
        raise UserError(f"{again}: named twice; name each run once")
    names = _names([Path(os.path.abspath(folder)).parts for folder in folders])
    return [_run(Path(folder), names[i], i) for i, folder in enumerate(folders)]


def _names(paths: list[tuple[str, ...]]) -> list[str]:
    """Return of each path the shortest ending that no other path has."""

    def alone(path: tuple[str, ...], length: int) -> bool:
        return sum(other[-length:] == path[-length:] for other in paths) == 1

    return [str(Path(*path[-next(n for n in count(1) if alone(path, n)) :])) for path in paths]


def _run(folder: Path, name: str, number: int) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folders that run_dir gave")
    line = ("solid", "dashed", "dotted")[number // 10 % 3]
    settings, versions = _settings(folder)
    steps = sorted((int(f.name[4:]), f) for f in folder.glob("eval/val-*") if f.name[4:].isdecimal())
    validation = [
        {"step": step} | {f"{direction}/{k}": v for direction, row in scored.items() for k, v in numbers(row).items()}
        for step, scored in ((step, scores(place)) for step, place in steps)
    ]
    rows = page.latest(read_rows(folder))
    results = {place.name: scores(place) for place in evaluations.folders(folder)}
    return Run(name, to_hex(f"C{number % 10}"), line, settings, versions, results, validation, rows)


def _settings(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return (settings by dotted key, versions) of config.yaml.

    Where an evaluation was made with other settings, these are added as `KEY (NAME)`.
    A model that was evaluated, not trained, has only the manifests of that; its first evaluation's are its own settings.
    """
    config, places = folder / "config.yaml", evaluations.folders(folder)
    tested = {p.name: read_tree(p / "manifest.json") for p in places if (p / "manifest.json").exists()}
    if config.exists():
        own = by_setting(read_tree(config, parse_yaml))
        header = takewhile(lambda line: line.startswith("#"), config.read_text(encoding="utf-8").splitlines())
        versions = {name: version for name, _, version in (line.strip("# ").partition(" ") for line in header)}
    elif tested:
        first = next(iter(tested.values()))
        own = by_setting(_section(first, "settings"))
        versions = {name: str(version) for name, version in _section(first, "versions").items()}
    else:
        raise UserError(f"{folder}: not a run, config.yaml is missing; name the folders that run_dir gave")
    other = {
        f"{key} ({name})": value
        for name, tree in tested.items()
        for key, value in by_setting(_section(tree, "settings")).items()
        if own.get(key, value) != value
    }
    return own | other, versions


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return tree[name] if isinstance(tree.get(name), dict) else {}


def differing(trees: list[dict[str, Any]]) -> list[str]:
    """Return the keys that some of these lack, or have with another value, in the order of the longest."""
    keys = dict.fromkeys(key for tree in sorted(trees, key=len, reverse=True) for key in tree)
    return [
        key for key in keys if any(key not in t or t[key] != next(u[key] for u in trees if key in u) for t in trees)
    ]


def settings(runs: list[Run]) -> str:
    """Return HTML of the settings, versions and commits in which the runs differ."""
    rows = [
        f"<tr><td>{escape(str(key))}</td>{''.join(f'<td>{escape(_value(tree, key))}</td>' for tree in trees)}</tr>"
        for trees in ([run.settings for run in runs], [run.versions for run in runs])
        for key in differing(trees)
    ]
    table = (
        _table(runs, "settings", f"<tbody>{''.join(rows)}</tbody>")
        if rows
        else '<p class="note">No setting differs.</p>'
    )
    evaluated = any(key.endswith(")") for key in differing([run.settings for run in runs]))
    note = '<p class="note">(NAME): what eval/NAME was made with, where config.yaml says otherwise.</p>'
    return f"<section><h2>Settings that differ</h2>{table}{note if evaluated else ''}</section>"


def _value(tree: dict[str, Any], key: str) -> str:
    """Format the value of a key as it stands in config.yaml."""
    if key not in tree:
        return NONE
    if isinstance(tree[key], str) and tree[key]:
        return tree[key]
    lines = yaml.safe_dump(tree[key], default_flow_style=False, sort_keys=False, allow_unicode=True, width=math.inf)
    return lines.removesuffix("...\n").strip()


def results(runs: list[Run]) -> str:
    """Return HTML of the metrics of each evaluation of the runs, the best of each row bold; nothing if none was evaluated."""
    names = {name for run in runs for name, scored in run.results.items() if scored}
    return "".join(_results(runs, name) for name in sorted(names, key=lambda name: (name != TEST, name)))


def _results(runs: list[Run], name: str) -> str:
    scored = [run.results.get(name, {}) for run in runs]
    directions = dict.fromkeys(direction for by_direction in scored for direction in by_direction)

    def table(some: list[str]) -> str:
        rows = (_direction(direction, [one.get(direction, {}) for one in scored]) for direction in some)
        return _table(runs, "results", "".join(rows))

    subsets = [direction for direction in directions if "/" in direction]
    more = f"<details><summary>By subset or modality: {len(subsets)} more</summary>{table(subsets)}</details>"
    note = "Bold: the best. In brackets: 95% interval, bootstrap over groups. p: permutation test against chance."
    main = table([direction for direction in directions if "/" not in direction])
    title = "Results" if name == TEST else f"Results: {escape(name)}"
    return f'<section><h2>{title}</h2>{main}<p class="note">{note}</p>{more if subsets else ""}</section>'


def _direction(direction: str, rows: list[dict[str, Any]]) -> str:
    """Return the rows of a direction.

    Numbers from test sets of different sizes are not compared: R@1 of 10 is easier than of 1000.
    """
    sizes = {str({k: v for k, v in row.items() if k.startswith("n_")}) for row in rows if numbers(row)}
    title = escape(arrow(direction)) + " <i>tested on sets of different sizes: none is the best</i>" * (len(sizes) > 1)
    metrics = dict.fromkeys(name for row in rows for name in numbers(row))
    lines = "".join(f"<tr><td>{escape(name)}</td>{_cells(name, rows, len(sizes) == 1)}</tr>" for name in metrics)
    return f'<tbody><tr><th colspan="{len(rows) + 1}" scope="rowgroup">{title}</th></tr>{lines}</tbody>'


def _cells(name: str, rows: list[dict[str, Any]], comparable: bool) -> str:
    texts = [formatted(row, name) for row in rows]
    known = [float(text) for text, _ in texts if text != NONE]  # what looks the same is as good
    better = {**dict.fromkeys(HIGHER, max), **dict.fromkeys(LOWER, min)}.get(name)
    best = better(known) if better and comparable and len(known) > 1 else None
    cells = []
    for text, interval in texts:
        value = f"<b>{text}</b>" if text != NONE and float(text) == best else text
        cells.append(f"<td>{value}{f' <i>{interval}</i>' if interval else ''}</td>")
    return "".join(cells)


def validation(runs: list[Run]) -> Iterator[tuple[str, Figure]]:
    """Yield (title, figure) of the main metrics on data.val over steps."""
    keys = dict.fromkeys(key for run in runs for row in run.validation for key in row if key.count("/") == 1)
    main = sorted((VALIDATED.index(name), key) for key in keys if (name := key.partition("/")[2]) in VALIDATED)
    for _, key in islice(main, MOST):
        title = arrow(key.replace("/", ", ", 1)).removeprefix("caption, ")
        yield title, overlay(title, key, [(run, run.validation) for run in runs])


def training(runs: list[Run]) -> Iterator[tuple[str, Figure]]:
    """Yield (title, figure) of each loss term, and of what else any run's metrics.jsonl has."""
    panels = {"loss (nats)": page.TERMS} | page.PANELS
    for group, keys in panels.items():
        for key, label in keys.items():
            if any(row.get(key) is not None for run in runs for row in run.rows):
                title = f"{group}: {label}" if label else group
                yield title, overlay(title, key, [(run, run.rows) for run in runs], 100 if "%" in title else 1)


def overlay(title: str, key: str, curves: list[tuple[Run, Rows]], times: float = 1) -> Figure:
    """Plot the values of a key over steps, a labelled line for each run that has it, beside a thin one as logged."""
    figure = Figure(figsize=(4.4, 2.7), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for run, rows in curves:
        points = [row for row in rows if row.get(key) is not None]
        marker = "." if len(points) < 12 else ""  # one point makes no line
        page.draw(axes, points, key, times, color=run.colour, ls=run.line, lw=1.4, marker=marker, label=run.name)
    page.tidy(axes, 7)
    axes.set_title(title, fontsize=8, loc="left", color="#5b6472", parse_math=False)
    axes.set_xlabel("step", fontsize=7)
    if not key.startswith("loss") and axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)
    return figure


def _plots(heading: str, figures: Iterator[tuple[str, Figure]]) -> str:
    images = "".join(
        f'<img alt="{escape(title)} over steps" src="{data_uri(_png(figure), "image/png")}">'
        for title, figure in figures
    )
    note = "Thin: as measured. Thick: moving average over a twentieth of the points, if they are 40 or more."
    section = f'<section><h2>{heading}</h2><div class="curves">{images}</div><p class="note">{note}</p></section>'
    return section if images else ""


def _png(figure: Figure) -> bytes:
    return to_bytes(lambda buffer: figure.savefig(buffer, format="png"))


def _named(run: Run) -> str:
    return f'<s style="border-top: 3px {run.line} {run.colour}"></s>{escape(run.name)}'


def _legend(runs: list[Run]) -> str:
    return f'<div class="card legend">{"".join(f"<span>{_named(run)}</span>" for run in runs)}</div>'


def _table(runs: list[Run], kind: str, bodies: str) -> str:
    head = "".join(f"<th>{_named(run)}</th>" for run in runs)
    return f'<div class="scroll"><table class="{kind}"><thead><tr><th></th>{head}</tr></thead>{bodies}</table></div>'


STYLE = """
s { display: inline-block; width: 24px; margin-right: 6px; vertical-align: middle; }
.legend { position: sticky; top: 0; z-index: 1; margin-top: 16px; padding: 8px 14px; display: flex; flex-wrap: wrap;
  gap: 2px 20px; max-height: 16vh; overflow-y: auto; font-size: 13px; overflow-wrap: anywhere; }
.settings :is(th, td):not(:first-child) { text-align: left; }
.settings td { white-space: pre-wrap; vertical-align: top; }
.results th i { font-weight: 400; color: var(--soft); margin-left: 8px; }
summary { margin-bottom: 8px; cursor: pointer; }
.results b { color: var(--right); }
"""
