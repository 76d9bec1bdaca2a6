"""Make tables 1 to 4 and 6 of the paper, with evaluated runs beside its rows: Markdown or CSV."""

import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip4vla.config_io import parse_json
from clip4vla.errors import UserError
from clip4vla.report import evaluations

DIRECTIONS = {"text_to_video": "T2V", "video_to_text": "V2T"}
METRICS = {"R@1": "R@1", "R@5": "R@5", "R@10": "R@10", "MedR": "MdR"}
CAPTION_METRICS = ["BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
CLASSIFICATION_METRICS = ["accuracy", "top5", "mean_class_accuracy"]
COMMON = ["method", "modalities"]
NONE = "-"
# Source of the shards: its name, and the paper's rows: method, modalities, then R@1, R@5, R@10 (percent) and MdR of text to
# video, or the caption metrics (times 100), or accuracy. The sizes are those of the splits that these figures are known for:
# all of 1k-A, half of VATEX's validation clips, the 2,990 test clips of MSR-VTT with 20 references each.
Paper = dict[str, tuple[str, list[tuple[str, ...]], tuple[str, str]]]
RETRIEVAL: Paper = {
    "msrvtt_1ka": (
        "MSR-VTT 1k-A (Table 1)",
        [
            ("CLIP", "v", "31.2", "53.7", "64.2", "4"),
            ("CLIP4Clip", "v", "44.5", "71.4", "81.6", "2"),
            ("CLIP4VLA", "av", "46.2", "73.5", "83.5", "2"),
        ],
        (NONE, "1000"),
    ),
    "vatex": (
        "VATEX (Table 1)",
        [
            ("CLIP", "v", "39.7", "72.3", "82.2", NONE),
            ("CLIP4Clip", "v", "55.9", "89.2", "95.0", "1"),
            ("CLIP4VLA", "av", "63.5", "91.5", "95.9", "1"),
        ],
        (NONE, "1500"),
    ),
    "audiocaps": (
        "AudioCaps (Table 2)",
        [("CLIP4VLA", "a", "28.4", "60.9", "76.2", "4"), ("CLIP4VLA", "av", "33.6", "68.1", "82.3", "3")],
        (NONE, NONE),
    ),
}
CAPTIONING: Paper = {
    "msrvtt": (
        "MSR-VTT captions (Table 3)",
        [("CLIP4VLA", "av", "46.7", "31.1", "64.4", "58.0")],
        ("2990", "59800"),
    ),
    "vatex": ("VATEX captions (Table 4)", [("CLIP4VLA", "av", "36.4", "25.0", "54.7", "59.7")], (NONE, NONE)),
}
CLASSIFICATION: Paper = {
    "esc50": ("ESC-50 (Table 6)", [("CLIP4VLA", "a", "86.8")], ("50", "2000")),
    "ucf101": ("UCF101 (Table 6)", [("CLIP4VLA", "av", "91.9")], ("101", NONE)),
}


def _retrieval(metrics: dict[str, Any], settings: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a row of the run's modalities fused, then of each alone where it was scored."""
    model = settings["model"]
    alone = [name for name in ("v", "a") if f"text_to_video/{name}" in metrics]
    for ending, modalities in (("", model["modalities"]), *((f"/{name}", name) for name in alone)):
        scores = [metrics[direction + ending] for direction in DIRECTIONS]
        cells = [_cell(score, metric) for score in scores for metric in METRICS]
        sizes = [str(scores[0][name]) for name in ("n_queries", "n_gallery")]
        yield [model["head"], modalities, *cells, *sizes]


def _captioning(metrics: dict[str, Any], settings: dict[str, Any]) -> Iterator[list[str]]:
    """Yield one row, named by how captions were decoded; METEOR is left out where there was no Java."""
    decode, score = settings["decode"], {"METEOR": None} | metrics["caption"]
    how = f"beam {decode['num_beams']}" if decode["method"] == "beam" else decode["method"]
    how += ", not PTB's words" * ("excluded" in score)  # without Java
    cells = [_cell(score, metric) for metric in CAPTION_METRICS]
    yield [how, settings["model"]["modalities"], *cells, str(score["n_clips"]), str(score["n_references"])]


def _classification(metrics: dict[str, Any], settings: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a row of all modalities together, then of each alone where it was scored; mean ± deviation over folds."""
    how = {"probe": "linear probe", "zero_shot": "class names", "classifier": "fine-tuned"}[
        settings["classify"]["method"]
    ]
    for name, score in metrics.items():
        score = dict.fromkeys(CLASSIFICATION_METRICS) | score  # clips of several classes have no accuracy
        folds = f", {score['n_folds']} folds" * (score["n_folds"] > 1)
        cells = [_cell(score, metric) for metric in CLASSIFICATION_METRICS]
        cells[0] += f" ± {score['accuracy_std']:.1f}" if "accuracy_std" in score else ""
        modalities = name.partition("/")[2] or settings["model"]["modalities"]
        yield [how + folds, modalities, *cells, str(score["n_classes"]), str(score["n_clips"])]


@dataclass
class PaperTable:
    """Holds the columns and the paper's rows for the tables of one eval.task."""

    columns: list[str]  # after COMMON: scores, then two sizes
    rows: Callable[[dict[str, Any], dict[str, Any]], Iterator[list[str]]]  # metrics, settings: how, modalities, columns
    paper: Paper
    noun: str = ""  # after the source, of a data set that the paper has not

    def of(self, source: str) -> tuple[str, list[list[str]]]:
        """Return the title of a data set's table and its rows in the paper."""
        title, paper, sizes = self.paper.get(source, (source + self.noun, [], ()))
        rest = [NONE] * len(self.columns)
        return title, [[f"{m} (paper)", v, *(cells + rest)[: len(rest) - 2], *sizes] for m, v, *cells in paper]


KINDS = {
    "retrieval": PaperTable(
        [*(f"{d} {m}" for d in DIRECTIONS.values() for m in METRICS.values()), "queries", "gallery"],
        _retrieval,
        RETRIEVAL,
    ),
    "captioning": PaperTable([*CAPTION_METRICS, "clips", "references"], _captioning, CAPTIONING, " captions"),
    "classification": PaperTable(
        ["accuracy", "top 5", "class mean", "classes", "clips"], _classification, CLASSIFICATION, " classes"
    ),
}
TableRows = dict[tuple[str, str], list[list[str]]]  # rows by (task, title)


def tables(runs: Sequence[str], as_csv: bool = False) -> str:
    """Format a table for each task and data set that these run folders were tested on, the paper's rows first.

    A run has rows for each of its evaluations; retrieval has a row for each modality. The CSV is one table: cells of the
    other task's columns are empty. Those of a task without tables are left out, which stderr says.
    Raises UserError for a run that is not there, was not evaluated, or on a task without tables.
    """
    rows_by_table: TableRows = {}
    for run in runs:
        made = {folder: _rows(run, folder) for folder in _evaluations(run)}
        if not any(made.values()):
            raise UserError(f"{run}: evaluated for no table; {_command(run)} eval.task={' or '.join(KINDS)}")
        for folder, rows in made.items():
            if rows:
                rows_by_table.setdefault(rows[:2], rows[2]).extend(rows[3])
            else:
                print(f"left out: {folder}: there is no table of its eval.task", file=sys.stderr)
    if as_csv:
        return _csv(rows_by_table)
    return "\n".join(_markdown(title, KINDS[task].columns, rows) for (task, title), rows in rows_by_table.items())


def _evaluations(run: str) -> list[Path]:
    if not Path(run).is_dir():
        raise UserError(f"{run}: no such run; name the folders that run_dir gave")
    if not (some := evaluations.folders(run)):
        raise UserError(f"{run}: not evaluated yet, {run}/eval/test/metrics.json is missing; {_command(run)}")
    return some


def _rows(run: str, folder: Path) -> tuple[str, str, list[list[str]], list[list[str]]] | None:
    """Return (task, title, the paper's rows, those of an evaluation); None if there is no table of its task."""
    metrics, manifest = (_read(run, folder / name) for name in ("metrics.json", "manifest.json"))
    try:
        settings, (source, split) = manifest["settings"], evaluations.data_set(manifest)
        task = settings["eval"]["task"]
        if task not in KINDS:
            return None
        title, paper = KINDS[task].of(source)
        name = run if folder.name == evaluations.TEST else str(folder)
        return (
            task, f"{title}, {split}", paper,
            [[f"{name} ({how})", *cells] for how, *cells in KINDS[task].rows(metrics, settings)],
        )  # fmt: skip
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder}: of another version ({error!r}); {_command(run)}") from None


def _read(run: str, path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); {_command(run)}") from None


def _command(run: str) -> str:
    config = Path(run, "config.yaml")
    return f"run: python launch/evaluate.py {config if config.is_file() else 'CONFIG.yaml'} run_dir={run}"


def _cell(score: dict[str, Any], metric: str) -> str:
    """Format a value and its 95% interval, if any: 46.2 [43.1, 49.3]; ranks without a needless .0; None is NONE."""
    if score[metric] is None:
        return NONE
    value, *interval = (
        f"{round(x, 1):g}" if metric == "MedR" else f"{x:.1f}"
        for x in (score[metric], *score.get("ci", {}).get(metric, []))
    )
    return value + f" [{', '.join(interval)}]" * bool(interval)


def _markdown(title: str, columns: list[str], rows: list[list[str]]) -> str:
    ruler = ["---"] * len(COMMON) + ["---:"] * len(columns)
    lines = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in [COMMON + columns, ruler, *rows]]
    return f"### {' '.join(title.split())}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _inert(cell: str) -> str:
    """Quote a cell that a spreadsheet would take for a formula, and compute."""
    return f"'{cell}" if cell[:1] in tuple("=+-@\t\r") and cell != NONE else cell


def _csv(rows_by_table: TableRows) -> str:
    head = ["data set", *COMMON]
    columns = list(dict.fromkeys(column for task, _ in rows_by_table for column in KINDS[task].columns))
    out = io.StringIO()
    writer = csv.DictWriter(out, head + columns, lineterminator="\n")
    writer.writeheader()
    for (task, title), rows in rows_by_table.items():
        names = head + KINDS[task].columns
        writer.writerows(dict(zip(names, map(_inert, [title, *row]), strict=True)) for row in rows)
    return out.getvalue()
