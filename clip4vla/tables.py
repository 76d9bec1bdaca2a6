"""Tables 1 and 2 of the paper, text-video retrieval, with evaluated runs beside its rows: Markdown or CSV."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip4vla.config import UserError

DIRECTIONS = {"text_to_video": "T2V", "video_to_text": "V2T"}
METRICS = {"R@1": "R@1", "R@5": "R@5", "R@10": "R@10", "MedR": "MdR"}
HEAD = [
    "method",
    "modalities",
    *(f"{d} {m}" for d in DIRECTIONS.values() for m in METRICS.values()),
    "queries",
    "gallery",
]
NONE = "-"
# Source of the shards: its name, and the paper's rows: method, modalities, then R@1, R@5, R@10 (percent) and MdR of text to
# video. The galleries are those of the splits that these figures are known for: all of 1k-A, half of VATEX's validation clips.
PAPER: dict[str, tuple[str, list[tuple[str, ...]], str]] = {
    "msrvtt_1ka": (
        "MSR-VTT 1k-A (Table 1)",
        [
            ("CLIP", "v", "31.2", "53.7", "64.2", "4"),
            ("CLIP4Clip", "v", "44.5", "71.4", "81.6", "2"),
            ("CLIP4VLA", "av", "46.2", "73.5", "83.5", "2"),
        ],
        "1000",
    ),
    "vatex": (
        "VATEX (Table 1)",
        [
            ("CLIP", "v", "39.7", "72.3", "82.2", NONE),
            ("CLIP4Clip", "v", "55.9", "89.2", "95.0", "1"),
            ("CLIP4VLA", "av", "63.5", "91.5", "95.9", "1"),
        ],
        "1500",
    ),
    "audiocaps": (
        "AudioCaps (Table 2)",
        [("CLIP4VLA", "a", "28.4", "60.9", "76.2", "4"), ("CLIP4VLA", "av", "33.6", "68.1", "82.3", "3")],
        NONE,
    ),
}


def tables(runs: Sequence[str], as_csv: bool = False) -> str:
    """A table for each data set that these run folders were tested on, a row for each modality, the paper's rows first.

    Raises UserError for a run that is not there, was not evaluated, or on another task.
    """
    found: dict[str, list[list[str]]] = {}
    for run in runs:
        metrics, manifest = (_read(run, name) for name in ("metrics.json", "manifest.json"))
        try:
            source, split = _data_set(manifest)
            title, paper, gallery = PAPER.get(source, (source, [], NONE))
            old = [[f"{m} (paper)", modalities, *cells, *[NONE] * 5, gallery] for m, modalities, *cells in paper]
            found.setdefault(f"{title}, {split}", old).extend(_rows(run, metrics, manifest["settings"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{run}/eval/test: of another version ({error!r}); {_command(run)}") from None
    return _csv(found) if as_csv else "\n".join(_markdown(title, rows) for title, rows in found.items())


def _read(run: str, name: str) -> dict[str, Any]:
    path = Path(run, "eval", "test", name)
    if not Path(run).is_dir():
        raise UserError(f"{run}: no such run; name the folders that run_dir gave")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{run}: not evaluated yet, {path} is missing; {_command(run)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); {_command(run)}") from None


def _command(run: str) -> str:
    config = Path(run, "config.yaml")
    return f"run: python launch/evaluate.py {config if config.is_file() else 'CONFIG.yaml'} run_dir={run}"


def _data_set(manifest: dict[str, Any]) -> tuple[str, str]:
    """(source, split), joined by + where the gallery holds several."""
    sources = manifest["sources"]
    source = "+".join(dict.fromkeys(entry["source"] for entry in sources.values()))
    return source, "+".join(dict.fromkeys(entry["split"] for entry in sources.values()))


def _rows(run: str, metrics: dict[str, Any], settings: dict[str, Any]) -> list[list[str]]:
    """The run's own modalities fused, then each of them alone where it was scored."""
    if settings["eval"]["task"] != "retrieval":
        raise UserError(
            f"{run}: evaluated with eval.task={settings['eval']['task']}; {_command(run)} eval.task=retrieval"
        )
    model, rows = settings["model"], []
    alone = [name for name in ("v", "a") if f"text_to_video/{name}" in metrics]
    for ending, modalities in (("", model["modalities"]), *((f"/{name}", name) for name in alone)):
        scores = [metrics[direction + ending] for direction in DIRECTIONS]
        cells = [_cell(score, metric) for score in scores for metric in METRICS]
        sizes = [str(scores[0][name]) for name in ("n_queries", "n_gallery")]
        rows.append([f"{run} ({model['fusion']})", modalities, *cells, *sizes])
    return rows


def _cell(score: dict[str, Any], metric: str) -> str:
    """46.2 [43.1, 49.3]: the value and, if there is one, its 95% interval; ranks without a needless .0."""
    value, *interval = (
        f"{round(x, 1):g}" if metric == "MedR" else f"{x:.1f}"
        for x in (score[metric], *score.get("ci", {}).get(metric, []))
    )
    return value + f" [{', '.join(interval)}]" * bool(interval)


def _markdown(title: str, rows: list[list[str]]) -> str:
    ruler = ["---", "---", *["---:"] * (len(HEAD) - 2)]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [HEAD, ruler, *rows]]
    return f"### {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _csv(found: dict[str, list[list[str]]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([["data set", *HEAD], *([title, *row] for title, rows in found.items() for row in rows)])
    return out.getvalue()
