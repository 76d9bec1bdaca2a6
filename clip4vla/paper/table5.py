"""Make table 5: text to audio retrieval as the audio tower is given more of what the paper proposes.

scratch and + initial are fine-tuned without pre-training; the others pre-train with NCE_at and NCE_av, then NCE_aa too, then
with the type token, and are fine-tuned from there. Fine-tuning is the same for all: captions and sounds alone.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clip4vla.checkpoints.lookup import newest_checkpoint
from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.distributed import collectives
from clip4vla.errors import UserError
from clip4vla.io.atomic import removed_if_empty, write_text
from clip4vla.training import pipeline

METRICS = {"R@1": "R@1", "R@5": "R@5", "R@10": "R@10", "MedR": "MdR"}


class AblationRow(NamedTuple):
    """Holds a row of the table: the settings of its two stages, beside those of all rows."""

    name: str
    title: str
    paper: str  # R@1 on MSR-VTT
    pretrain: list[str] | None  # None: this stage is left out
    finetune: list[str]


UNTYPED = ["model.audio_type=none"]
ROWS = (
    AblationRow("scratch", "scratch", "2.5", None, ["model.audio_init=scratch", *UNTYPED]),
    AblationRow("initial", "+ initialised from vision", "3.6", None, ["model.audio_init=vision", *UNTYPED]),
    AblationRow("inter", "+ inter-modal", "6.8", ["loss.aa=0", "model.pretrain_audio_type=none"], UNTYPED),
    AblationRow("intra", "+ intra-modal", "10.5", ["model.pretrain_audio_type=none"], UNTYPED),
    AblationRow("type", "+ type token", "10.6", ["model.pretrain_audio_type=data"], []),
)
TUNED = [
    "model.modalities=a", "model.head=global_global", "model.trainable_towers=text+audio", "eval.task=retrieval",
    "eval.missing_audio=exclude", "loss={at: 0, av: 0, aa: 0, tv: 0, caption: 0, tm: 1}",
]  # fmt: skip


class Plan(NamedTuple):
    """Holds what all rows share: the two stages' configs, settings for either, where the runs go."""

    pretrain: str
    finetune: str
    words: list[str]  # KEY=VALUE of both stages; pretrain.KEY=VALUE and finetune.KEY=VALUE of one
    out: Path

    def stage(self, name: str, more: list[str]) -> RunConfig:
        """Load the settings of the stage `pretrain` or `finetune`."""
        other = {"pretrain": "finetune.", "finetune": "pretrain."}[name]
        words = [word.removeprefix(f"{name}.") for word in self.words if not word.startswith(other)]
        return load(RunConfig, getattr(self, name), [*words, *more])

    def runs(self, row: AblationRow, seed: int) -> list[RunConfig]:
        """List the configs of a row's runs, in the order to run them."""
        folder, start = self.out / row.name / f"seed-{seed}", []
        if row.pretrain is not None:
            place = folder / "pretrain"
            start = [self.stage("pretrain", [*row.pretrain, f"run_dir={place}", f"seed={seed}"])]
        origins = [str(place)] if start else self.stage("pretrain", []).init_from
        words = [
            *TUNED,
            *row.finetune,
            f"run_dir={folder}/finetune",
            f"seed={seed}",
            f"init_from={json.dumps(origins)}",
        ]
        some = [*start, self.stage("finetune", words)]
        for cfg in some:
            cfg.train.mirror = pipeline.mirror_url_of(cfg, f"{row.name}/seed-{seed}/{Path(cfg.run_dir).name}")
        return some


def run(plan: Plan, seeds: Sequence[int], ds_config: str | None) -> str:
    """Run what is not there yet, seed by seed; return the table, which is OUT/table5.md; all values: OUT/table5.csv."""
    collectives.setup(plan.stage("pretrain", []).train.hang_timeout_minutes)
    _must_differ(plan)
    with removed_if_empty(plan.out, pipeline.SETTINGS):
        return _run(plan, seeds, ds_config)


def _run(plan: Plan, seeds: Sequence[int], ds_config: str | None) -> str:
    pipeline.check_same_settings(plan.out, {name: plan.stage(name, []) for name in ("pretrain", "finetune")})
    results: dict[str, dict[int, dict]] = {row.name: {} for row in ROWS}
    for seed in seeds:
        for row in ROWS:
            *before, last = plan.runs(row, seed)
            for cfg in before:
                pipeline.fit(cfg, ds_config)
            results[row.name][seed] = pipeline.fit_and_test(last, ds_config)["text_to_video"]
            if collectives.rank() == 0:
                write_text(plan.out / "table5.csv", _csv(results))
                write_text(plan.out / "table5.md", table(results))
    collectives.barrier()
    return table(results)


def _must_differ(plan: Plan) -> None:
    """Raise UserError if the rows would not be what they are called."""
    cfg = plan.stage("pretrain", [])
    if not cfg.loss.aa:
        raise UserError(f"{plan.pretrain}: loss.aa is 0, and + intra-modal is to add it: set pretrain.loss.aa=1")
    for place in cfg.init_from:
        folder = newest_checkpoint(place) or Path(place)
        if (folder / "config.json").is_file():
            towers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]["trainable_towers"]
            if "audio" in towers:
                raise UserError(
                    f"init_from={place}: must have no trained audio tower; name a CLIP to start from in {plan.pretrain}"
                )


def table(results: dict[str, dict[int, dict]]) -> str:
    """Format the table in Markdown: mean ± standard deviation over the seeds, by row."""
    head = ["text to audio", *METRICS.values(), "seeds", "paper's R@1, MSR-VTT"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in ROWS:
        if scores := list(results[row.name].values()):
            cells = [pipeline.mean_std([score[name] for score in scores]) for name in METRICS]
            lines.append([row.title, *cells, str(len(scores)), row.paper])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _csv(results: dict[str, dict[int, dict]]) -> str:
    names = ["row", "seed", *METRICS, "n_queries", "n_gallery", "p_value"]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {"row": row, "seed": seed} | score for row, scores in results.items() for seed, score in scores.items()
    )
    return out.getvalue()
