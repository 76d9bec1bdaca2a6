"""Evaluate on held-out shards: all ranks embed, rank 0 ranks, writes metrics.json, manifest.json and the report page.

What is ranked against what, written or named, eval.task says: zero_shot.py, text_video.py, captioning.py or classification.py.
"""

import concurrent.futures
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clip4vla.checkpoints import best
from clip4vla.config import RunConfig
from clip4vla.data.loader import Loader, check_fingerprint, open_folders
from clip4vla.data.precomputed_embeddings import open_fitting
from clip4vla.data.sampler import EvalSampler
from clip4vla.distributed import collectives
from clip4vla.errors import UserError
from clip4vla.evaluation import captioning, classification, manifest, retrieval_metrics, text_video, zero_shot
from clip4vla.io.atomic import write_text
from clip4vla.models import generation
from clip4vla.models.audio_encoder import type_token_weights
from clip4vla.models.fusion import must_have_room
from clip4vla.models.model import Model
from clip4vla.models.towers_fingerprint import towers_sha256
from clip4vla.report import evaluations, page
from clip4vla.report.tracking import read_rows
from clip4vla.towers.space import is_space
from clip4vla.towers.tokenizer import tokenizer

Say = Callable[[str], None]


class EvalJob(NamedTuple):
    """Holds one evaluation: its name under run_dir/eval, the weights' origin, and what the task's embed() returned."""

    name: str
    weights: dict[str, Any]
    loader: Loader
    outputs: Any


def evaluate(
    model: Model, cfg: RunConfig, name: str, weights: dict[str, Any], say: Say
) -> tuple[dict[str, dict], list[page.ClipPreview], list] | None:
    """Evaluate on data.test; rank 0 returns the main metrics by direction and, for the report page, exhibits and queries (or
    captions that were written, or predictions)."""
    job = EvalJob(name, weights, *run_inference(model, cfg, cfg.data.test, "data.test"))
    if collectives.rank():
        return None
    return compute_metrics(job, cfg, say), *_task(cfg).examples(job.outputs, job.loader, cfg)


class BackgroundValidator:
    """Evaluates on data.val while training goes on: all ranks embed, and rank 0 ranks in a thread."""

    def __init__(self, cfg: RunConfig, say: Say):
        self.cfg, self.say = cfg, say
        self.pool = concurrent.futures.ThreadPoolExecutor(1, "evaluation")
        self.ranking: concurrent.futures.Future | None = None

    def start(self, model: Model, step: int) -> None:
        """Embed, then rank in the background, eval.max_val_clips of each folder at most."""
        self.finish()
        loader, outputs = run_inference(model, self.cfg, self.cfg.data.val, "data.val", self.cfg.eval.max_val_clips)
        if collectives.rank() == 0:
            job = EvalJob(f"val-{step:08d}", {"step": step}, loader, outputs)
            Path(self.cfg.run_dir, "eval", job.name).mkdir(parents=True, exist_ok=True)  # begun: its checkpoint stays
            self.ranking = self.pool.submit(compute_metrics, job, self.cfg, self.say)

    def lacks(self, step: int) -> bool:
        """Return whether this step, whose turn it was, has no metrics on rank 0's disk."""
        return collectives.all_gather_objects(
            not Path(self.cfg.run_dir, f"eval/val-{step:08d}/metrics.json").is_file()
        )[0]

    def finish(self) -> None:
        """Wait for the last evaluation; raises what it raised."""
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


def run_inference(
    model: Model, cfg: RunConfig, sources: dict[str, float], key: str, most: int = 0
) -> tuple[Loader, Any]:
    """Return (loader, the task's embed()) of the clips of these folders, the first `most` of each unless that is 0."""
    folders = open_folders(sources, key, cfg.data)
    check_fingerprint(model.config(), folders[0].fingerprint, "the model", folders[0].url)
    must_have_room(cfg.model, folders[0].fingerprint)
    loader = eval_loader(cfg, folders, next(model.parameters()).device, most, model)
    if "space" in model.clip_config and cfg.eval.task == "zero_shot":
        loader.vectors, loader.needs = open_fitting(folders, towers_sha256(model)), ["fbank"]
    training = model.training
    with torch.no_grad():
        outputs = _task(cfg).embed(model.eval(), loader, cfg)
    model.train(training)
    return loader, outputs


def compute_metrics(job: EvalJob, cfg: RunConfig, say: Say) -> dict[str, dict]:
    """Compute the main metrics by direction; write run_dir/eval/NAME/metrics.json and manifest.json.

    Metrics of other type tokens go to metrics-TYPE.json. Those of other weights are replaced, which is said.
    """
    folder = Path(cfg.run_dir, "eval", job.name)
    folder.mkdir(parents=True, exist_ok=True)
    results = _task(cfg).compute_metrics(job.outputs, cfg)
    main = next(iter(results))
    if cfg.eval.best_metric:
        best.value(results[main], cfg.eval.best_metric)  # is there
    if old := manifest.replaced(folder, job.weights):
        say(f"{folder}: replaces the numbers of {old}; eval.name=NAME keeps both")
        for file in folder.glob("metrics-*.json"):
            file.unlink()
    manifest.write(
        folder / "manifest.json", job.loader, job.outputs.clips, cfg, job.weights, _task(cfg).protocol(job.outputs, cfg)
    )
    module = _task(cfg) if cfg.eval.task in ("captioning", "classification") else retrieval_metrics
    if module is not retrieval_metrics:
        module.write_results(folder, job.outputs)
    for audio_type, metrics in reversed(results.items()):  # metrics.json last: then all is there
        suffix = "" if audio_type == main else f"-{audio_type}"
        write_text(folder / f"metrics{suffix}.json", json.dumps(metrics, indent=1))
    say(f"{job.name}, type token {main}:\n{module.table(results[main])}")
    return results[main]


def check_evaluation(cfg: RunConfig) -> None:
    """Raise UserError at the start of a run for what would stop its first evaluation."""
    manifest.check_name(cfg.eval.name)
    for audio_type in zero_shot.types(cfg):
        if audio_type != "data":
            type_token_weights(audio_type, key="eval.audio_types")
    media = cfg.model.modalities
    if (cfg.eval.task == "captioning") != (cfg.model.head == "captioner"):
        raise UserError(f"eval.task={cfg.eval.task}, model.head={cfg.model.head}: captioning and captioner go together")
    if is_space(cfg.model.clip) and cfg.eval.task not in ("zero_shot", "classification"):
        raise UserError(
            f"eval.task={cfg.eval.task}: {cfg.model.clip} has no towers for it: take zero_shot, or classification"
        )
    if cfg.model.head == "classifier" and cfg.eval.task != "classification":
        raise UserError(
            f"eval.task={cfg.eval.task}, model.head=classifier: a classifier is evaluated by classification"
        )
    if cfg.eval.task == "classification":
        classification.check(cfg)
    if cfg.eval.task == "captioning":
        generation.resolve_max_tokens(cfg.decode, cfg.model.max_tokens)
        generation.special_tokens(cfg.model.clip)
        captioning.must_have_scorers()
    if cfg.eval.task == "zero_shot" and (cfg.model.head, media) != ("global_global", "av"):
        raise UserError(
            f"eval.task=zero_shot knows no model.head={cfg.model.head}, model.modalities={media}: take retrieval"
        )
    if cfg.eval.best_metric and not cfg.eval.every_steps:
        raise UserError(
            f"eval.best_metric={cfg.eval.best_metric}: nothing is evaluated on data.val: set eval.every_steps"
        )
    if cfg.eval.best_metric and cfg.eval.task == "classification":
        names = ["mAP", "AUC", "d_prime"] if cfg.model.several_labels else ["accuracy", "top5", "mAP"]
        best.value({"label": dict.fromkeys(names, 0.0)}, cfg.eval.best_metric)
    if cfg.eval.best_metric and cfg.eval.task == "captioning":
        best.value({"caption": dict.fromkeys(captioning.scored(), 0.0)}, cfg.eval.best_metric)
    if cfg.eval.best_metric and cfg.eval.task == "retrieval":
        endings = ["", *(f"/{kind}" for kind in media if len(media) > 1)]
        names = [f"{way}{ending}" for way in ("text_to_video", "video_to_text") for ending in endings]
        best.value({name: dict.fromkeys(best.HIGHER + best.LOWER, 0.0) for name in names}, cfg.eval.best_metric)
    if cfg.eval.every_steps:
        must_have_room(cfg.model, open_folders(cfg.data.val, "data.val", cfg.data)[0].fingerprint)


def eval_loader(
    cfg: RunConfig, folders: list, device: torch.device, most: int = 0, model: Model | None = None
) -> Loader:
    """Build a loader of every clip of the folders once, in order; the first `most` of each folder, unless that is 0.

    model: whose size of pictures frames are brought to, and whose tokenizer reads captions; None: model.clip's, frames as stored.
    """
    sizes = [[shard.samples for shard in folder.shards] for folder in folders]
    order = EvalSampler.for_ranks(sizes, cfg.eval.batch_size, collectives.world_size(), most)
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)  # where damage is listed
    clip, fit = (model.clip_config, model.pictures) if model else (None, None)
    tokenize = tokenizer(cfg.model.clip, cfg.model.max_tokens, clip)
    return Loader(
        folders, order, cfg.data, tokenize=tokenize, mask=cfg.mask, seed=cfg.seed,
        needs=("frames", "fbank"), device=device, damage_log=Path(cfg.run_dir, f"corrupt-{collectives.rank()}.jsonl"), fit=fit,
    )  # fmt: skip


def write_report(
    cfg: RunConfig,
    name: str,
    origin: dict[str, Any],
    metrics: dict[str, dict],
    exhibits: list[page.ClipPreview],
    queries: list,
) -> Path:
    """Write the page of an evaluation: loss curves of this run and those it started from, metrics, exhibits and queries.

    run_dir/report.html, which is that of evaluations.TEST, shows the main numbers of all evaluations too.
    """
    places = {Path(place).name: read_rows(place) for place in [*cfg.init_from, cfg.run_dir]}
    path = evaluations.page_path(cfg.run_dir, name)
    data = next(iter(cfg.data.test)) + (f" and {len(cfg.data.test) - 1} more" if len(cfg.data.test) > 1 else "")
    settings = {"run": cfg.run_dir, "checkpoint": Path(origin["folder"]).name, "data": data, "clip": cfg.model.clip}
    media = {"modalities": cfg.model.modalities, "type token": cfg.model.audio_type}
    settings |= {
        "zero_shot": {"type token": zero_shot.types(cfg)[0]},
        "retrieval": {"fusion": cfg.model.head} | media,
        "captioning": {"written by": generation.method_name(cfg.decode)} | media,
        "classification": {"classified by": cfg.classify.method} | media,
    }[cfg.eval.task] | {"preset": cfg.preset}
    runs = {k: v for k, v in places.items() if v}
    makers: dict[str, Callable] = {"captioning": page.captions, "classification": page.classification}
    make = makers.get(cfg.eval.task, page.retrieval)
    title = "test split" if name == evaluations.TEST else name
    page.write(path, f"{Path(cfg.run_dir).name}: {title}", settings, runs, make(metrics, exhibits, queries))
    evaluations.show(cfg.run_dir)
    return path
