"""Evaluation on held-out shards: all ranks embed, rank 0 ranks, writes metrics.json and manifest.json, and the report page.

What is ranked against what, written or named, eval.task says: zero_shot.py, text_video.py, captioning.py or classification.py.
"""

import concurrent.futures
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clip4vla import (
    captioning,
    classification,
    decoding,
    distributed,
    provenance,
    report,
    retrieval,
    selection,
    text_video,
    zero_shot,
)
from clip4vla.audio_encoder import type_mix
from clip4vla.config import RunConfig, UserError
from clip4vla.files import write_text
from clip4vla.loader import Loader, check_fingerprint, open_folders
from clip4vla.model import Model, must_have_room
from clip4vla.order import EvalOrder
from clip4vla.towers import tokenizer
from clip4vla.tracking import read_rows

Say = Callable[[str], None]


class Job(NamedTuple):
    """One evaluation: its name under run_dir/eval, where the weights come from, and what the ranks found."""

    name: str
    weights: dict[str, Any]
    loader: Loader
    found: Any


def evaluate(
    model: Model, cfg: RunConfig, weights: dict[str, Any], say: Say
) -> tuple[dict[str, dict], list[report.Exhibit], list] | None:
    """Evaluate on data.test; rank 0 returns the main metrics by direction and, for the report page, exhibits and queries (or
    captions that were written)."""
    job = Job("test", weights, *embedded(model, cfg, cfg.data.test, "data.test"))
    if distributed.rank():
        return None
    return ranked(job, cfg, say), *_task(cfg).examples(job.found, job.loader, cfg)


class HeldOut:
    """Evaluations on data.val while training goes on: all ranks embed, and rank 0 ranks in a thread."""

    def __init__(self, cfg: RunConfig, say: Say):
        self.cfg, self.say = cfg, say
        self.pool = concurrent.futures.ThreadPoolExecutor(1, "evaluation")
        self.ranking: concurrent.futures.Future | None = None

    def start(self, model: Model, step: int) -> None:
        """Embed, then rank in the background, eval.clips of each folder at most."""
        self.finish()
        found = embedded(model, self.cfg, self.cfg.data.val, "data.val", self.cfg.eval.clips)
        if distributed.rank() == 0:
            job = Job(f"val-{step:08d}", {"step": step}, *found)
            Path(self.cfg.run_dir, "eval", job.name).mkdir(parents=True, exist_ok=True)  # begun: its checkpoint stays
            self.ranking = self.pool.submit(ranked, job, self.cfg, self.say)

    def lacks(self, step: int) -> bool:
        """Whether this step, whose turn it was, has no metrics on rank 0's disk."""
        return distributed.gather_objects(not Path(self.cfg.run_dir, f"eval/val-{step:08d}/metrics.json").is_file())[0]

    def finish(self) -> None:
        """Wait for the last one; raises what it raised."""
        if self.ranking:
            self.ranking.result()
            self.ranking = None


def _task(cfg: RunConfig) -> Any:
    tasks = {
        "zero_shot": zero_shot,
        "retrieval": text_video,
        "captioning": captioning,
        "classification": classification,
    }
    return tasks[cfg.eval.task]


def embedded(model: Model, cfg: RunConfig, sources: dict[str, float], key: str, most: int = 0) -> tuple[Loader, Any]:
    """(loader, what the task's embed() gives) of the clips of these folders, the first `most` of each unless that is 0."""
    folders = open_folders(sources, key, cfg.data)
    check_fingerprint(model.config(), folders[0].fingerprint, "the model", folders[0].url)
    must_have_room(cfg.model, folders[0].fingerprint)
    loader = eval_loader(cfg, folders, next(model.parameters()).device, most)
    training = model.training
    with torch.no_grad():
        found = _task(cfg).embed(model.eval(), loader, cfg)
    model.train(training)
    return loader, found


def ranked(job: Job, cfg: RunConfig, say: Say) -> dict[str, dict]:
    """The main metrics by direction; writes run_dir/eval/NAME/metrics.json (-TYPE of other type tokens) and manifest.json."""
    folder = Path(cfg.run_dir, "eval", job.name)
    folder.mkdir(parents=True, exist_ok=True)
    results = _task(cfg).ranked(job.found, cfg)
    main = next(iter(results))
    if cfg.eval.select:
        selection.value(results[main], cfg.eval.select)  # is there
    provenance.write(
        folder / "manifest.json", job.loader, job.found.clips, cfg, job.weights, _task(cfg).account(job.found, cfg)
    )
    told = _task(cfg) if cfg.eval.task in ("captioning", "classification") else retrieval
    if told is not retrieval:
        told.write_results(folder, job.found)
    for audio_type, metrics in reversed(results.items()):  # metrics.json last: then all is there
        suffix = "" if audio_type == main else f"-{audio_type}"
        write_text(folder / f"metrics{suffix}.json", json.dumps(metrics, indent=1))
    say(f"{job.name}, type token {main}:\n{told.table(results[main])}")
    return results[main]


def check_evaluation(cfg: RunConfig) -> None:
    """UserError at the start of a run for what would stop its first evaluation."""
    for audio_type in zero_shot.types(cfg):
        if audio_type != "data":
            type_mix(audio_type, key="eval.types")
    if cfg.eval.batch_size % distributed.world():
        raise UserError(f"eval.batch_size={cfg.eval.batch_size} does not divide by {distributed.world()} ranks")
    media = cfg.model.modalities
    if (cfg.eval.task == "captioning") != (cfg.model.fusion == "captioner"):
        raise UserError(
            f"eval.task={cfg.eval.task}, model.fusion={cfg.model.fusion}: captioning and captioner go together"
        )
    if cfg.model.fusion == "classifier" and cfg.eval.task != "classification":
        raise UserError(
            f"eval.task={cfg.eval.task}, model.fusion=classifier: a classifier is evaluated by classification"
        )
    if cfg.eval.task == "classification":
        classification.check(cfg)
    if cfg.eval.task == "captioning":
        decoding.within(cfg.decode, cfg.model.max_tokens)
        decoding.tokens_of(cfg.model.clip)
        captioning.must_have_scorers()
    if cfg.eval.task == "zero_shot" and (cfg.model.fusion, media) != ("global_global", "av"):
        raise UserError(
            f"eval.task=zero_shot knows no model.fusion={cfg.model.fusion}, model.modalities={media}: take retrieval"
        )
    if cfg.eval.select and not cfg.eval.every:
        raise UserError(f"eval.select={cfg.eval.select}: nothing is evaluated on data.val: set eval.every")
    if cfg.eval.select and cfg.eval.task == "classification":
        selection.value({"label": dict.fromkeys(("accuracy", "top5", "class_mean"), 0.0)}, cfg.eval.select)
    if cfg.eval.select and cfg.eval.task == "captioning":
        selection.value({"caption": dict.fromkeys(captioning.scored(), 0.0)}, cfg.eval.select)
    if cfg.eval.select and cfg.eval.task == "retrieval":
        endings = ["", *(f"/{kind}" for kind in media if len(media) > 1)]
        names = [f"{way}{ending}" for way in ("text_to_video", "video_to_text") for ending in endings]
        selection.value(
            {name: dict.fromkeys(selection.HIGHER + selection.LOWER, 0.0) for name in names}, cfg.eval.select
        )
    if cfg.eval.every:
        must_have_room(cfg.model, open_folders(cfg.data.val, "data.val", cfg.data)[0].fingerprint)


def eval_loader(cfg: RunConfig, folders: list, device: torch.device, most: int = 0) -> Loader:
    """Every clip of the folders once, in order; the first `most` of each folder, unless that is 0."""
    order = EvalOrder([[shard.samples for shard in folder.shards] for folder in folders], cfg.eval.batch_size, most)
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)  # where damage is listed
    return Loader(
        folders, order, cfg.data, tokenize=tokenizer(cfg.model.clip, cfg.model.max_tokens), mask=cfg.mask, seed=cfg.seed,
        needs=("frames", "fbank"), device=device, damage_log=Path(cfg.run_dir, f"damaged-{distributed.rank()}.jsonl"),
    )  # fmt: skip


def write_report(
    cfg: RunConfig,
    origin: dict[str, Any],
    metrics: dict[str, dict],
    exhibits: list[report.Exhibit],
    queries: list,
) -> Path:
    """run_dir/report.html: loss curves of this run and of the one it started from, the metrics, and what evaluate() gave."""
    places = {Path(place).name: read_rows(place) for place in [*cfg.init_from, cfg.run_dir]}
    page = Path(cfg.run_dir, "report.html")
    data = next(iter(cfg.data.test)) + (f" and {len(cfg.data.test) - 1} more" if len(cfg.data.test) > 1 else "")
    settings = {"run": cfg.run_dir, "checkpoint": Path(origin["folder"]).name, "data": data, "clip": cfg.model.clip}
    media = {"modalities": cfg.model.modalities, "type token": cfg.model.audio_type}
    settings |= {
        "zero_shot": {"type token": zero_shot.types(cfg)[0]},
        "retrieval": {"fusion": cfg.model.fusion} | media,
        "captioning": {"written by": decoding.named(cfg.decode)} | media,
        "classification": {"classified by": cfg.classify.method} | media,
    }[cfg.eval.task] | {"preset": cfg.preset}
    runs = {k: v for k, v in places.items() if v}
    makers: dict[str, Callable] = {"captioning": report.captions, "classification": report.classification}
    make = makers.get(cfg.eval.task, report.retrieval)
    report.write(page, f"{Path(cfg.run_dir).name}: test split", settings, runs, make(metrics, exhibits, queries))
    return page
