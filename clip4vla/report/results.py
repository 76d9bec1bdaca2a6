"""Run the rows of a plan (configs/results.yaml) by the project's own commands, and write their figures as one page."""

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clip4vla.config import RunConfig
from clip4vla.config_io import load, parse_yaml, read_tree
from clip4vla.errors import UserError
from clip4vla.io.atomic import write_text

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class DataSet:
    """Names a data set: its config, the folders below data/ that may hold it, and its media in such a folder."""

    config: str
    folders: list[str]
    media: str = "."


@dataclass
class Row:
    """Describes runs with several seeds that give one row: the script that trains (or only evaluates) and the figures."""

    name: str
    title: str
    script: str  # of launch/, without .py
    config: str
    figures: dict[str, str]  # heading: DIRECTION/METRIC of metrics.json
    seeds: list[int] = field(default_factory=lambda: [0])
    words: list[str] = field(default_factory=list)
    start: str = ""  # row whose runs, by seed, this one starts from
    baseline: bool = False  # the plain baseline stands above


@dataclass
class Plan:
    """Holds what configs/results.yaml says."""

    sets: dict[str, DataSet]
    rows: list[Row]


def read_plan(path: Path, seeds: list[int]) -> Plan:
    """Read a plan; seeds: instead of its rows' own. UserError for one that cannot be read."""
    tree = read_tree(path, parse_yaml)
    try:
        rows = [Row(**row) for row in tree["rows"]]
        plan = Plan({name: DataSet(**each) for name, each in tree["sets"].items()}, rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a plan of results: {error}") from None
    for row in plan.rows:
        row.seeds = seeds or row.seeds
    return plan


def run(plan: Plan, only: list[str], data: list[str], out: Path) -> None:
    """Make the shards, and train and evaluate what is not done yet; data: folders that hold the sets' own folders."""
    if unknown := set(only) - {row.name for row in plan.rows}:
        names = ", ".join(row.name for row in plan.rows)
        raise UserError(f"--only {sorted(unknown)[0]}: no such row; there are {names}")
    for name, each in plan.sets.items():
        _shards(name, each, data)
    for row in plan.rows:
        if only and row.name not in only:
            continue
        if missing := [url for url in _folders(row) if not Path(url, "index.json").is_file()]:
            print(f"{row.name}: left out: no shards {missing[0]}", flush=True)
            continue
        if row.start and not (out / row.start).is_dir():
            print(f"{row.name}: left out: it goes on from {row.start}, which has not run", flush=True)
            continue
        if row.baseline and not (out / row.name / "baseline.json").is_file():
            _call("launch/baseline.py", row.config, f"run_dir={out / row.name}")
        for seed in row.seeds:
            _run(row, seed, out)


def _shards(name: str, each: DataSet, data: list[str]) -> None:
    """Make the shards of a data set, where its media are; shard.py does again only what is not done."""
    media = next(
        (Path(place, folder) for place in data for folder in each.folders if Path(place, folder).is_dir()), None
    )
    if media is None:
        print(f"{name}: not below {', '.join(data)}; {each.config} says where it comes from", flush=True)
        return
    _call("data_prep/shard.py", each.config, f"media_root={media / each.media}", f"annotations={media}")


def _folders(row: Row) -> list[str]:
    cfg = load(RunConfig, row.config, row.words)
    return [*cfg.data.train, *cfg.data.val, *cfg.data.test]


def _run(row: Row, seed: int, out: Path) -> None:
    folder = out / row.name / f"seed-{seed}"
    if (folder / "eval/test/metrics.json").is_file():
        return
    words = [row.config, f"run_dir={folder}", f"seed={seed}", *row.words]
    if row.start:
        words.append(f"init_from=[{out / row.start / f'seed-{seed}'}]")
    print(f"{row.name}, seed {seed}", flush=True)
    _call(f"launch/{row.script}.py", *words, ranks=max(1, torch.cuda.device_count() or (os.cpu_count() or 1)))
    if not (folder / "eval/test/metrics.json").is_file():
        _call("launch/evaluate.py", *words)


def _call(script: str, *words: str, ranks: int = 1) -> None:
    """Run a script of the repository; UserError if it fails."""
    start = [sys.executable]
    if ranks > 1:
        start = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    done = subprocess.run([*start, script, *words], cwd=ROOT, check=False)
    if done.returncode:
        raise UserError(
            f"{script} {' '.join(words)}: ended with exit code {done.returncode}; its own lines stand above"
        )


def write_page(plan: Plan, out: Path, page: Path) -> None:
    """Write the figures of all rows that have run as Markdown."""
    lines = [
        "# Results on public data",
        "",
        "Written by `make results` (launch/results.py). Each figure is the mean over the seeds ± their sample deviation, in",
        "brackets the 95% interval of the first seed, by bootstrap over groups. The plain baseline is `launch/baseline.py`",
        "on the same shards: statistics of log-mel spectrograms and logistic regressions. [sounds.md](sounds.md) has what",
        "was tried.",
        "",
        "| data | figure | plain baseline | clip4vla | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    commands = []
    for row in plan.rows:
        folders = {seed: out / row.name / f"seed-{seed}" for seed in row.seeds}
        done = {
            s: read_tree(f / "eval/test/metrics.json")
            for s, f in folders.items()
            if (f / "eval/test/metrics.json").is_file()
        }
        if not done:
            continue
        plain = out / row.name / "baseline.json"
        baseline = read_tree(plain) if plain.is_file() else {}
        for heading, place in row.figures.items():
            cells = [_interval([baseline], place) if baseline else "", _interval([*done.values()], place)]
            lines.append(f"| {row.title} | {heading} | {' | '.join(cells)} | {', '.join(map(str, done))} |")
        start = f" init_from=[{out / row.start}/seed-0]" if row.start else ""
        commands.append(
            f"    python launch/{row.script}.py {row.config} seed=0 {' '.join(row.words)}{start}   # {row.name}"
        )
    write_text(
        page,
        "\n".join([*lines, "", "## Commands", "", *(" ".join(c.split()).join(["    ", ""]) for c in commands), ""]),
    )
    print(f"{page}: {len(commands)} of {len(plan.rows)} rows", flush=True)


def _interval(metrics: list[dict[str, Any]], place: str) -> str:
    """Format DIRECTION/METRIC of some seeds: mean ± deviation [interval of the first]; of p-values, the largest."""
    direction, metric = place.rsplit("/", 1)
    values = [float(each[direction][metric]) for each in metrics]
    if metric == "p_value":
        return f"{max(values):.2g}"
    text = f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
    interval = metrics[0][direction].get("ci", {}).get(metric)
    return text + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")
