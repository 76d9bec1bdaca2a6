"""Table 5: text to audio retrieval as the audio tower is given more of what the paper proposes.

scratch and + initial are fine-tuned without pre-training; the others pre-train with NCE_at and NCE_av, then NCE_aa too, then
with the type token, and are fine-tuned from there. Fine-tuning is the same for all: captions and sounds alone.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clip4vla import distributed, stages
from clip4vla.checkpoints import newest_checkpoint
from clip4vla.config import RunConfig, UserError
from clip4vla.files import write_text
from clip4vla.settings import load

METRICS = {"R@1": "R@1", "R@5": "R@5", "R@10": "R@10", "MedR": "MdR"}


class Row(NamedTuple):
    """A row of the table: words of its two stages, beside those of all rows."""

    name: str
    title: str
    paper: str  # R@1 on MSR-VTT
    pretrain: list[str] | None  # None: this stage is left out
    finetune: list[str]


UNTYPED = ["model.audio_type=none"]
ROWS = (
    Row("scratch", "scratch", "2.5", None, ["model.audio_init=scratch", *UNTYPED]),
    Row("initial", "+ initialised from vision", "3.6", None, ["model.audio_init=vision", *UNTYPED]),
    Row("inter", "+ inter-modal", "6.8", ["loss.aa=0", "model.pretrain_type=none"], UNTYPED),
    Row("intra", "+ intra-modal", "10.5", ["model.pretrain_type=none"], UNTYPED),
    Row("type", "+ type token", "10.6", ["model.pretrain_type=data"], []),
)
TUNED = [
    "model.modalities=a", "model.fusion=global_global", "model.train_towers=text+audio", "eval.task=retrieval",
    "eval.silent=exclude", "loss={at: 0, av: 0, aa: 0, tv: 0, caption: 0, tm: 1}",
]  # fmt: skip


class Plan(NamedTuple):
    """What all rows share: the two stages' configs, words for either, where the runs go."""

    pretrain: str
    finetune: str
    words: list[str]  # KEY=VALUE of both stages; pretrain.KEY=VALUE and finetune.KEY=VALUE of one
    out: Path

    def stage(self, name: str, more: list[str]) -> RunConfig:
        """Settings of `pretrain` or `finetune`."""
        other = {"pretrain": "finetune.", "finetune": "pretrain."}[name]
        words = [word.removeprefix(f"{name}.") for word in self.words if not word.startswith(other)]
        return load(RunConfig, getattr(self, name), [*words, *more])

    def runs(self, row: Row, seed: int) -> list[RunConfig]:
        """The runs of a row, one after the other."""
        folder, start = self.out / row.name / f"seed-{seed}", []
        if row.pretrain is not None:
            place = folder / "pretrain"
            start = [self.stage("pretrain", [*row.pretrain, f"run_dir={place}", f"seed={seed}"])]
        origins = [str(place)] if start else self.stage("pretrain", []).init_from
        words = [*TUNED, *row.finetune, f"run_dir={folder}/finetune", f"seed={seed}", f"init_from={origins}"]
        some = [*start, self.stage("finetune", words)]
        for cfg in some:
            cfg.train.mirror = stages.own_mirror(cfg, f"{row.name}/seed-{seed}/{Path(cfg.run_dir).name}")
        return some


def run(plan: Plan, seeds: Sequence[int], ds_config: str | None) -> str:
    """Run what is not there yet, seed by seed; the table, which is also in OUT/table5.md, all values in OUT/table5.csv."""
    distributed.setup(plan.stage("pretrain", []).train.timeout)
    _must_differ(plan)
    stages.must_be_the_same(plan.out, {name: plan.stage(name, []) for name in ("pretrain", "finetune")})
    found: dict[str, dict[int, dict]] = {row.name: {} for row in ROWS}
    for seed in seeds:
        for row in ROWS:
            *before, last = plan.runs(row, seed)
            for cfg in before:
                stages.fit(cfg, ds_config)
            found[row.name][seed] = stages.fit_and_test(last, ds_config)["text_to_video"]
            if distributed.rank() == 0:
                write_text(plan.out / "table5.csv", _csv(found))
                write_text(plan.out / "table5.md", table(found))
    distributed.barrier()
    return table(found)


def _must_differ(plan: Plan) -> None:
    """UserError if the rows would not be what they are called."""
    cfg = plan.stage("pretrain", [])
    if not cfg.loss.aa:
        raise UserError(f"{plan.pretrain}: loss.aa is 0, and + intra-modal is to add it: set pretrain.loss.aa=1")
    for place in cfg.init_from:
        folder = newest_checkpoint(place) or Path(place)
        if (folder / "config.json").is_file():
            towers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]["train_towers"]
            if "audio" in towers:
                raise UserError(
                    f"{plan.pretrain}: init_from {place} has ears already: name the CLIP that they are to be given to"
                )


def table(found: dict[str, dict[int, dict]]) -> str:
    """Markdown: mean ± standard deviation over the seeds, by row."""
    head = ["text to audio", *METRICS.values(), "seeds", "paper's R@1, MSR-VTT"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in ROWS:
        if scores := list(found[row.name].values()):
            cells = [stages.spread([score[name] for score in scores]) for name in METRICS]
            lines.append([row.title, *cells, str(len(scores)), row.paper])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _csv(found: dict[str, dict[int, dict]]) -> str:
    names = ["row", "seed", *METRICS, "n_queries", "n_gallery", "p"]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {"row": row, "seed": seed} | score for row, scores in found.items() for seed, score in scores.items()
    )
    return out.getvalue()
