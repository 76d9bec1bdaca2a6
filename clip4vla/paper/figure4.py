"""Plot figure 4: text to audio retrieval against the mixing ratio r of the audio type token, (1 - r) [VB] + r [NB].

By data set and audio type, each in a gallery of its own, and all together. The ratio to use is the one with the largest sum of
R@1, R@5 and R@10 on data.val, all together; data.test decides nothing.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from clip4vla.config import RunConfig
from clip4vla.distributed import collectives
from clip4vla.errors import UserError
from clip4vla.evaluation import runner, zero_shot
from clip4vla.io.atomic import write_bytes, write_text
from clip4vla.models.model import Model
from clip4vla.report.preview import to_bytes
from clip4vla.training.run_setup import load_eval_model

RATIOS = [f"{i / 10:g}" for i in range(11)]
BOTH = "both"  # the two tokens beside each other, as the paper fine-tunes, for comparison
METRICS = {"R@1": "#2563eb", "R@5": "#059669", "R@10": "#d97706"}
ALL = ("all", "all")
SweepRow = dict[str, Any]


def sweep_runs(configs: Sequence[RunConfig], out: Path) -> None:
    """Sweep each run's newest checkpoint over data.val, which chooses its r, and data.test; write OUT/figure4.csv and .png."""
    device = collectives.setup()
    rows_by_run: dict[str, list[SweepRow]] = {}
    chosen: dict[str, str] = {}
    for cfg in configs:
        model = load_eval_model(cfg)[0].to(device)
        parts = [sweep(model, cfg, getattr(cfg.data, key), f"data.{key}") for key in ("val", "test")]
        if collectives.rank() == 0:
            rows_by_run[cfg.run_dir], chosen[cfg.run_dir] = [*parts[0], *parts[1]], best_ratio(parts[0])
            print(_line(cfg.run_dir, parts[1], chosen[cfg.run_dir]))
    if collectives.rank() == 0:
        write(rows_by_run, chosen, out)
        print(f"{out}: figure4.csv, figure4.png")
    collectives.barrier()


def _line(run: str, rows: Sequence[SweepRow], ratio: str) -> str:
    """Format the ratio that data.val chose, and what it gives on data.test, everything together."""
    names = {row["data set"] for row in rows}
    row = next(row for row in rows if row["r"] == ratio and (ALL[0] not in names or row["data set"] == ALL[0]))
    return f"{run}: r = {ratio} by data.val; on data.test " + ", ".join(f"{name} {row[name]:.1f}" for name in METRICS)


def sweep(model: Model, cfg: RunConfig, sources: dict[str, float], key: str) -> list[SweepRow]:
    """Compute R@k by data set, audio type and r on these folders, on rank 0; the other ranks return no rows."""
    cfg = deepcopy(cfg)
    cfg.eval.task, cfg.eval.audio_types, cfg.eval.permutations, cfg.eval.bootstrap = "zero_shot", [*RATIOS, BOTH], 0, 0
    _, outputs = runner.run_inference(model, cfg, sources, key)
    rows = []
    for (data, kind), clips in _parts(outputs.clips) if collectives.rank() == 0 else ():
        for ratio in cfg.eval.audio_types:
            vectors = {name: _select(clips, outputs.vectors[name]) for name in ("text", f"audio/{ratio}")}
            captions, sounds = (
                zero_shot.deduplicate(side, clips) for side in zero_shot.captions_and_audio(clips, vectors, ratio)
            )
            scores = zero_shot.rank(captions, sounds, cfg)
            rows.append({"split": key, "data set": data, "audio type": kind, "r": ratio} | scores)
    if collectives.rank() == 0 and not rows:
        raise UserError(f"{key}: no clip has sound and a caption")
    return rows


def _parts(clips: dict[int, dict]) -> Iterator[tuple[tuple[str, str], dict[int, dict]]]:
    """Yield ((data set, audio type), its clips with sound and a caption); all of them first, if there are several."""
    with_audio = {i: clip for i, clip in clips.items() if clip["has_audio"] and clip["captions"]}
    names = sorted({(clip["source"], clip["audio_type"]) for clip in with_audio.values()})
    if len(names) > 1:
        yield ALL, with_audio
    for name in names:
        yield name, {i: clip for i, clip in with_audio.items() if (clip["source"], clip["audio_type"]) == name}


def _select(clips: dict[int, dict], vectors: dict) -> dict:
    """Select the vectors of these clips, whose keys are clip numbers or (clip number, caption number)."""
    return {key: vector for key, vector in vectors.items() if (key[0] if isinstance(key, tuple) else key) in clips}


def best_ratio(rows: Sequence[SweepRow]) -> str:
    """Choose the r with the largest R@1 + R@5 + R@10 over everything; of equal ones that nearest to the middle."""
    names = {(row["data set"], row["audio type"]) for row in rows}
    whole = [row for row in rows if row["r"] != BOTH and (ALL not in names or row["data set"] == ALL[0])]
    return max(whole, key=lambda row: (sum(row[name] for name in METRICS), -abs(float(row["r"]) - 0.5)))["r"]


def write(rows_by_run: dict[str, list[SweepRow]], chosen: dict[str, str], out: Path) -> None:
    """Write OUT/figure4.csv with the rows of each run, and OUT/figure4.png of data.test; chosen: r by run."""
    out.mkdir(parents=True, exist_ok=True)
    names = ["run", "split", "data set", "audio type", "r", *METRICS, "MedR", "MeanR", "n_queries", "n_gallery"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"run": run} | row for run, rows in rows_by_run.items() for row in rows)
    write_text(out / "figure4.csv", text.getvalue())
    tested = {run: [row for row in rows if row["split"] == "data.test"] for run, rows in rows_by_run.items()}
    write_bytes(out / "figure4.png", to_bytes(lambda buffer: figure(tested, chosen).savefig(buffer, format="png")))


def figure(rows_by_run: dict[str, list[SweepRow]], chosen: dict[str, str]) -> Figure:
    """Plot a panel for each data set and audio type: mean and standard deviation over the runs; dotted: both tokens."""
    names = list(dict.fromkeys((row["data set"], row["audio type"]) for rows in rows_by_run.values() for row in rows))
    lines = -(-len(names) // 3)
    plot = Figure(figsize=(11, 0.6 + 2.7 * lines), dpi=150, layout="constrained")
    for place, name in enumerate(names):
        axes = plot.add_subplot(lines, min(3, len(names)), place + 1)
        mine = {
            run: [row for row in rows if (row["data set"], row["audio type"]) == name]
            for run, rows in rows_by_run.items()
        }
        some = {run: rows for run, rows in mine.items() if rows}
        for metric, colour in METRICS.items():
            values = np.array([[row[metric] for row in rows if row["r"] != BOTH] for rows in some.values()])
            ratios, middle, spread = (
                [float(r) for r in RATIOS],
                values.mean(0),
                values.std(0, ddof=min(1, len(values) - 1)),
            )
            axes.plot(ratios, middle, "o-", color=colour, label=metric, markersize=3)
            axes.fill_between(ratios, middle - spread, middle + spread, color=colour, alpha=0.15, linewidth=0)
            both = np.mean([row[metric] for rows in some.values() for row in rows if row["r"] == BOTH])
            axes.axhline(both, color=colour, linestyle=":", linewidth=1)
        for ratio in set(chosen.values()):
            axes.axvline(float(ratio), color="#9ca3af", linewidth=1, zorder=0)
        size = next(iter(some.values()))[0]
        title = "everything" if name == ALL else ", ".join(name)
        axes.set_title(f"{title}: {size['n_queries']} in {size['n_gallery']}", fontsize=9, parse_math=False)
        axes.set(ylim=(0, None), xlabel="r" if place >= len(names) - 3 else "")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    axes.figure.axes[0].legend(fontsize=8, frameon=False)
    plot.suptitle(
        "text to audio, % against r: 0 is [VB], 1 is [NB]; dotted: both; grey: chosen on data.val", fontsize=10
    )
    return plot
