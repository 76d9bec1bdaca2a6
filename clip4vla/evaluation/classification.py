"""Classify held-out clips: by a linear probe on frozen pooled features, by class names in words, or by a trained head.

B clips, D width, K classes. Accuracies are in percent. Of several modalities each is scored alone too, on the clips that have it.
"""

import csv
import io
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip4vla.config import RunConfig
from clip4vla.config_io import decode, expand_path
from clip4vla.data.loader import Loader, open_folders, stable_hash63
from clip4vla.data.sample_metadata import labels_of
from clip4vla.distributed import collectives
from clip4vla.distributed.rank_0 import ProgressCallback, run_on_rank_0
from clip4vla.distributed.watchdog import watch
from clip4vla.errors import UserError
from clip4vla.evaluation import captioning, features, linear_probe, retrieval_metrics
from clip4vla.evaluation.features import Features
from clip4vla.io.atomic import write_text
from clip4vla.models import fusion
from clip4vla.models.classifier import label_of
from clip4vla.models.model import Model
from clip4vla.report import preview
from clip4vla.report.sections.classification import Predicted

THREADS = 4  # that make exhibits
PREDICTIONS = 5  # of a clip that are shown
CONFUSED = 1000  # classes at most in a confusion matrix: at 20,000 it would take 3 GB


@dataclass
class ClassificationOutputs:
    """Holds the scores of all ranks, on the CPU."""

    classes: list[str]
    clips: dict[int, dict]  # json of the held-out clips that take part, by their place in the loader's order
    left_out: dict[str, list[str]]  # ids by reason
    # log-probabilities (B, K) by modalities, the main ones first; NaN: a clip has none of them
    scores: dict[str, Tensor]
    # clips of data.train that probes were fitted on, by SOURCE/SPLIT
    training: dict[str, int] = field(default_factory=dict)
    # by modalities: the notes of linear_probe.ProbeEvaluation.solved
    probe_notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    several: bool = False  # clips, of data.test or data.train, have several classes: each is scored against the rest

    def folds(self, cfg: RunConfig) -> list[str]:
        """Name the fold of each clip: SOURCE/SPLIT, or "all" where all are held out together."""
        alone = cfg.classify.cross_validate
        return [_source(clip) if alone else "all" for clip in self.clips.values()]

    @property
    def target(self) -> Tensor:
        """Mark the classes (B, K) bool of the clips' labels; labels that are no class are left out."""
        numbers = {label: i for i, label in enumerate(self.classes)}
        target = torch.zeros(len(self.clips), len(self.classes), dtype=torch.bool)
        for row, clip in zip(target, self.clips.values(), strict=True):
            row[[numbers[label] for label in labels_of(clip) if label in numbers]] = True
        return target


def _have_several(clips: Iterable[dict[str, Any]]) -> bool:
    return any(len(labels_of(clip)) > 1 for clip in clips)


def _all_labels(clips: Iterable[dict[str, Any]]) -> list[str]:
    return sorted({label for clip in clips for label in labels_of(clip)})


def _source(clip: dict[str, Any]) -> str:
    return f"{clip['source']}/{clip['split']}"


def embed(model: Model, loader: Loader, cfg: RunConfig) -> ClassificationOutputs:
    """Score each of the loader's clips with cfg.classify.method: log-probabilities (B, K) of the classes, on rank 0."""
    if cfg.classify.method == "classifier":
        return _by_head(model, loader, cfg)
    held = features.of_folders(model, loader, loader.folders, cfg)
    return (_by_names if cfg.classify.method == "zero_shot" else _by_probe)(model, loader, held, cfg)


def _by_head(model: Model, loader: Loader, cfg: RunConfig) -> ClassificationOutputs:
    mine: dict[str, dict] = {"clips": {}, "scores": {}, "has_media": {}}
    several = cfg.model.several_labels
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.progress(f"evaluation: batch {k}")
        parts = model.media(batch.to(loader.device))
        logits = model.head(parts).cpu()
        scores = F.logsigmoid(logits) if several else logits.log_softmax(1)
        has_media = torch.stack([part.mask.any(1) for part in parts]).any(0).tolist()
        for i, clip, score, any_part in zip(loader.sample_numbers(k), batch.meta, scores, has_media, strict=True):
            if clip["id"]:
                mine["clips"][i], mine["scores"][i], mine["has_media"][i] = clip, score.clone(), any_part
    gathered = collectives.all_gather_dicts(mine)
    named = (labels_of(clip) if several else [label_of(clip)] for clip in gathered["clips"].values())
    unknown = {label for labels in named for label in labels} - {"", *cfg.model.labels}
    classes = [*cfg.model.labels, *sorted(unknown)]  # classes that were not trained are never predicted, and count
    clips, left_out = _split_eligible(gathered["clips"], gathered["has_media"], classes)
    scores = torch.stack([gathered["scores"][i] for i in clips])
    least = torch.finfo(scores.dtype).min  # not -inf: clips that are alike share a rank
    scores = F.pad(scores, (0, len(unknown)), value=least if several else -torch.inf)
    return ClassificationOutputs(classes, clips, left_out, {cfg.model.modalities: scores}, several=several)


def _split_eligible(
    clips: dict[int, dict], has_media: dict[int, bool], classes: list[str]
) -> tuple[dict[int, dict], dict]:
    """Split clips into (those with a class and a medium, ids of the others by reason); UserError if none is left."""
    known = set(classes)
    gone = {
        "no label": [i for i, clip in clips.items() if not labels_of(clip)],
        "another label": [i for i, clip in clips.items() if labels_of(clip) and not {*labels_of(clip)} & known],
        "no media": [i for i in clips if not has_media[i]],
    }
    lost = {i for rows in gone.values() for i in rows}
    kept = {i: clip for i, clip in clips.items() if i not in lost}
    if not kept:
        why = ", ".join(f"{reason}: {len(rows)}" for reason, rows in gone.items())
        raise UserError(f"data.test: none of {len(clips)} clips can be classified ({why})")
    return kept, {reason: [clips[i]["id"] for i in rows] for reason, rows in gone.items()}


def _chosen(held: Features, classes: list[str], cfg: RunConfig) -> tuple[Features, dict[int, dict], dict]:
    """Select (the features that take part, their clips by number, ids of the others by reason)."""
    has_media = dict(zip(held.number, held.having(cfg.model.modalities).tolist(), strict=True))
    clips, left_out = _split_eligible(dict(zip(held.number, held.clips, strict=True)), has_media, classes)
    return held.among(clips), clips, left_out


def _kinds(cfg: RunConfig) -> list[str]:
    return list(dict.fromkeys([cfg.model.modalities, *cfg.model.modalities]))


def _by_names(model: Model, loader: Loader, held: Features, cfg: RunConfig) -> ClassificationOutputs:
    """Score clips by cosines of the classes' sentences with y^g, z^g, or the mean of both, over the temperature.

    Of several classes a clip the scores are these logits, less the largest of all: clips are ranked for each class, and
    shares of a sum over the classes would rank them otherwise.
    """
    classes = class_names(cfg) or _all_labels(held.clips)
    some, clips, left_out = _chosen(held, classes, cfg)
    several = _have_several(clips.values())
    names = model.class_vectors(loader.tokenize, classes, cfg.classify.templates).cpu()
    scale = model.logit_scale.exp().item() if cfg.model.learn_temperature else 1 / cfg.model.temperature
    scores = {}
    for kinds in _kinds(cfg):
        media = fusion.mean([some.vectors[kind] for kind in kinds], cfg.model.media_mean)
        logits = scale * media @ names.T
        scored = logits - logits.max() if several else logits.log_softmax(1)
        scores[kinds] = scored.masked_fill(~some.having(kinds)[:, None], torch.nan)
    return ClassificationOutputs(classes, clips, left_out, scores, several=several)


def class_names(cfg: RunConfig) -> list[str]:
    """List the classes of classify.labels, perhaps none.

    Raises UserError for a file that cannot be read, a class given twice, or a single class.
    """
    names = cfg.classify.labels
    if len(names) == 1 and names[0].endswith(".txt"):
        try:
            lines = decode(Path(expand_path(names[0], "classify.labels")).read_bytes()).splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"classify.labels: cannot read {names[0]} ({error}): a file has a class a line") from None
        names = [line.strip() for line in lines if line.strip()] or [""]
    if len(names) == 1 or len(set(names)) < len(names):
        raise UserError(
            f"classify.labels: {len(names)} classes, {len(set(names))} of them different: give two at least, once each"
        )
    return names


def _by_probe(model: Model, loader: Loader, held: Features, cfg: RunConfig) -> ClassificationOutputs:
    """Score clips with probes that rank 0 fits, for each fold and each of the modalities."""
    folders = open_folders(cfg.data.train, "data.train", cfg.data) if cfg.data.train else []
    training = features.of_folders(model, loader, folders, cfg).where(lambda clip: bool(labels_of(clip)))
    classes = _all_labels([*held.clips, *training.clips])
    several = _have_several([*held.clips, *training.clips])
    some, clips, left_out = _chosen(held, classes, cfg)
    outputs = ClassificationOutputs(
        classes, clips, left_out, {}, Counter(map(_source, training.clips)), several=several
    )

    def work(passed: ProgressCallback) -> dict[str, tuple[Tensor, dict]]:
        evaluation = linear_probe.ProbeEvaluation(
            some, outputs.folds(cfg), training, classes, cfg, loader.device, passed, several
        )
        return {kinds: evaluation.solved(kinds) for kinds in _kinds(cfg)}

    solved, failed = run_on_rank_0(work)
    if failed:
        raise UserError(failed)
    outputs.scores, outputs.probe_notes = ({kinds: pair[i] for kinds, pair in solved.items()} for i in (0, 1))
    return outputs


def compute_metrics(outputs: ClassificationOutputs, cfg: RunConfig) -> dict[str, dict[str, dict]]:
    """Compute {type token: metrics}: `label`, and `label/v` and `label/a` for one medium alone."""
    rows = {}
    for kinds, scores in outputs.scores.items():
        scored = ~scores.isnan().any(1)
        if scored.any():
            make = _row_of_several if outputs.several else _row
            row = make(outputs, scores, scored.nonzero()[:, 0], cfg) | outputs.probe_notes.get(kinds, {})
            rows["label" + f"/{kinds}" * (kinds != cfg.model.modalities)] = row
    return {cfg.model.audio_type: rows}


def _row(outputs: ClassificationOutputs, scores: Tensor, rows: Tensor, cfg: RunConfig) -> dict[str, Any]:
    """Compute the metrics of the clips numbered in rows (n,); over folds accuracy and top5 are means.

    mAP: of the clips ranked for each class by its probability, all folds together. `accuracy_std` is over folds.
    `confusion`, clips by target and by prediction, is there for CONFUSED classes at most.
    """
    folds, target = outputs.folds(cfg), outputs.target[rows].int().argmax(1)
    mine = np.array([folds[i] for i in rows.tolist()])
    names = list(dict.fromkeys(mine.tolist()))
    order = scores[rows].argsort(dim=1, descending=True, stable=True)
    hits = [100.0 * (order[:, :k] == target[:, None]).any(1).double().numpy() for k in (1, PREDICTIONS)]
    by_fold = {name: {"accuracy": float(hits[0][mine == name].mean()), "top5": float(hits[1][mine == name].mean()),
                      "n_clips": int((mine == name).sum())} for name in names}  # fmt: skip
    size = len(outputs.classes)
    prediction = order[:, 0]
    clips, hit = (
        torch.bincount(some, minlength=size) for some in (target, target[prediction == target])
    )  # of each class
    there = clips > 0
    row: dict[str, Any] = {name: statistics.mean(f[name] for f in by_fold.values()) for name in ("accuracy", "top5")}
    row |= {"accuracy_std": statistics.stdev(f["accuracy"] for f in by_fold.values())} if len(names) > 1 else {}
    row["mAP"] = 100 * retrieval_metrics.mean_average_precision(scores[rows], target)
    row["mean_class_accuracy"] = 100 * float((hit[there] / clips[there]).double().mean())
    row["majority_baseline"] = 100 * int(clips.max()) / len(rows)  # of always naming the commonest class
    if cfg.eval.bootstrap and len(names) == 1:
        groups = np.array([stable_hash63(clip["group"]) for clip in outputs.clips.values()])[rows]
        row["ci"] = {"accuracy": captioning.interval(hits[0], groups, cfg.eval.bootstrap, cfg.seed)}
    row |= {"n_clips": len(rows), "n_classes": size, "n_folds": len(names)}
    row |= {"folds": by_fold} if len(names) > 1 else {}
    row["classes"] = outputs.classes
    if size <= CONFUSED:
        pairs = torch.bincount(target * size + prediction, minlength=size * size)
        row["confusion"] = pairs.view(size, size).tolist()
    return row


def _row_of_several(outputs: ClassificationOutputs, scores: Tensor, rows: Tensor, cfg: RunConfig) -> dict[str, Any]:
    """Compute the metrics of the clips numbered in rows (n,) that have several classes, as AudioSet's are.

    mAP and AUC, in percent, are means over the classes of clips ranked for each by its score, all folds together; d' is that
    of the mean area. chance_mAP: the mean share of the clips that a class has. `AP` by class: None where no clip is of it.
    """
    target = outputs.target[rows]
    figures = np.array(retrieval_metrics.rank_classes(scores[rows], target))
    precision, area = np.nanmean(figures, axis=0).tolist()
    clips = target.sum(0)
    row: dict[str, Any] = {"mAP": 100 * precision, "AUC": 100 * area, "d_prime": retrieval_metrics.d_prime(area)}
    row["chance_mAP"] = 100 * float((clips[clips > 0] / len(rows)).double().mean())
    row |= {"labels_per_clip": float(clips.sum() / len(rows))}
    row |= {"n_clips": len(rows), "n_classes": len(outputs.classes), "n_folds": len(set(outputs.folds(cfg)))}
    row |= {"classes": outputs.classes, "clips": clips.tolist()}
    return row | {"AP": [None if math.isnan(one) else 100 * one for one in figures[:, 0].tolist()]}


def protocol(outputs: ClassificationOutputs, cfg: RunConfig) -> dict[str, Any]:
    """Describe for the manifest how clips got their class, from which others, and what is missing."""
    how = {
        "probe": f"L2 logistic regression on frozen pooled features, strength of {cfg.classify.C}, chosen by a fifth "
        "of the training clips, by whole groups of each class, then fitted on all of them",
        "zero_shot": f"nearest of the classes' names in {len(cfg.classify.templates)} sentences, averaged",
        "classifier": "the head that was trained",
    }[cfg.classify.method]
    how += "; each class against the rest, since clips have several" * outputs.several
    turn = "; each folder of data.test held out in turn" * (cfg.classify.cross_validate)
    return {"protocol": how + turn, "training_clips": dict(outputs.training), "excluded": outputs.left_out}


def write_results(folder: Path, outputs: ClassificationOutputs) -> None:
    """Write predictions.csv by all modalities together: id, source, label, guess, its probability, the label's rank.

    Several labels of a clip stand with ; between them, and the rank is that of the best.
    """
    scores = next(iter(outputs.scores.values()))
    own = scores.masked_fill(~outputs.target, -torch.inf).amax(1, keepdim=True)
    place = 1 + (scores > own).sum(1)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", "source", "label", "guess", "probability", "rank"])
    for clip, row, rank in zip(outputs.clips.values(), scores, place.tolist(), strict=True):
        best = int(row.argmax())
        writer.writerow(
            [
                clip["id"],
                _source(clip),
                ";".join(labels_of(clip)),
                outputs.classes[best],
                f"{row[best].exp():.6f}",
                rank,
            ]
        )
    write_text(folder / "predictions.csv", out.getvalue())


def table(metrics: dict[str, dict]) -> str:
    """Format the metrics as text, one line for each of the modalities."""
    if "d_prime" in next(iter(metrics.values())):
        heads = ("mAP", "AUC", "d'", "chance mAP", "clips", "classes", "folds")
        return "\n".join([" " * 12 + "".join(f"{head:>12}" for head in heads), *(
            f"{name:<12}{row['mAP']:>12.1f}{row['AUC']:>12.1f}{row['d_prime']:>12.2f}{row['chance_mAP']:>12.1f}"
            f"{row['n_clips']:>12}{row['n_classes']:>12}{row['n_folds']:>12}" for name, row in metrics.items()
        )])  # fmt: skip
    lines = [
        f"{'':<12}{'accuracy':>18}{'top 5':>8}{'class mean':>12}{'mAP':>7}{'majority':>10}{'clips':>8}{'classes':>9}{'folds':>7}"
    ]
    for name, row in metrics.items():
        spread = f" ± {row['accuracy_std']:.1f}" if "accuracy_std" in row else ""
        lines.append(
            f"{name:<12}{row['accuracy']:>{18 - len(spread)}.1f}{spread}{row['top5']:>8.1f}{row['mean_class_accuracy']:>12.1f}"
            f"{row['mAP']:>7.1f}{row['majority_baseline']:>10.1f}{row['n_clips']:>8}{row['n_classes']:>9}{row['n_folds']:>7}"
        )
    return "\n".join(lines)


def examples(
    outputs: ClassificationOutputs, loader: Loader, cfg: RunConfig
) -> tuple[list[preview.ClipPreview], list[Predicted]]:
    """Preview clips spread over all of them, each with its predictions by all modalities together."""
    numbers, folds = list(outputs.clips), outputs.folds(cfg)
    chosen = torch.linspace(0, len(numbers) - 1, min(cfg.eval.report_queries, len(numbers))).long().tolist()
    scores, predicted = next(iter(outputs.scores.values())), []
    several = len(set(folds)) > 1
    for n, row in enumerate(chosen):
        best = scores[row].exp().topk(min(PREDICTIONS, len(outputs.classes)))
        predictions = [
            (outputs.classes[k], p) for p, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        labels = labels_of(outputs.clips[numbers[row]])
        predicted.append(Predicted(n, labels, predictions, folds[row] if several else ""))
    with ThreadPoolExecutor(THREADS) as pool:
        shown = pool.map(
            lambda row: preview.preview_clip(loader, numbers[row], outputs.clips, cfg.model.modalities), chosen
        )
        return list(shown), predicted


def must_be_apart(cfg: RunConfig) -> None:
    """Raise UserError if a folder of data.test is also one to train on, or to select by."""
    others = [*cfg.data.train, *(cfg.data.val if cfg.eval.best_metric else ())]
    both = {os.path.normpath(url) for url in cfg.data.test} & {os.path.normpath(url) for url in others}
    if both:
        raise UserError(
            f"data.test: {both.pop()} is in data.train or data.val too: what is tested on may not be learnt"
        )


def check(cfg: RunConfig) -> None:
    """Raise UserError for settings that contradict each other."""
    how = cfg.classify.method
    if (how == "classifier") != (cfg.model.head == "classifier"):
        raise UserError(f"classify.method={how}, model.head={cfg.model.head}: classifier goes with classifier")
    if how != "classifier" and cfg.eval.every_steps:
        raise UserError(
            f"eval.every_steps={cfg.eval.every_steps}: {how} looks at frozen features, after training: set eval.every_steps=0"
        )
    must_be_apart(cfg)
    if cfg.classify.cross_validate and (len(cfg.data.test) < 2 or how == "classifier"):
        raise UserError(
            f"classify.cross_validate=true: data.test has {len(cfg.data.test)} folders: name two at least"
            if len(cfg.data.test) < 2
            else "classify.cross_validate=true: each fold has a run of its own below run_dir: evaluate one of them"
        )
    if how == "probe" and not cfg.classify.cross_validate and not cfg.data.train:
        raise UserError("data.train names no shard folder to fit a probe on")
    if not cfg.classify.C or min(cfg.classify.C) <= 0 or min([1, *cfg.classify.shots]) < 1:
        raise UserError("classify.C must be positive, shots at least 1")
    if not cfg.classify.templates or not all("{}" in template for template in cfg.classify.templates):
        raise UserError(f"classify.templates={cfg.classify.templates}: each needs a {{}} for the class")
    class_names(cfg)
