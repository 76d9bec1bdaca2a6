"""Classification of held-out clips: by a linear probe on frozen pooled features, by class names in words, or by a trained head.

B clips, D width, K classes. Accuracies are in percent. Of several modalities each is scored alone too, on the clips that have it.
"""

import csv
import io
import os
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip4vla import captioning, distributed, exhibits, features, fusion, probing
from clip4vla.checkpoints import Passed, by_rank_0
from clip4vla.classifier import class_vectors, label_of
from clip4vla.config import RunConfig, UserError
from clip4vla.features import Features
from clip4vla.files import write_text
from clip4vla.loader import Loader, number, open_folders
from clip4vla.model import Model
from clip4vla.predictions_page import Predicted
from clip4vla.watchdog import watch

THREADS = 4  # that make exhibits
GUESSES = 5  # of a clip that are shown
CONFUSED = 1000  # classes at most in a confusion matrix: at 20,000 it would take 3 GB


@dataclass
class Found:
    """What the ranks found, on the CPU."""

    classes: list[str]
    clips: dict[int, dict]  # json of the held-out clips that take part, by their place in the loader's order
    left_out: dict[str, list[str]]  # ids by reason
    scores: dict[
        str, Tensor
    ]  # log-probabilities (B, K) by modalities, the main ones first; NaN: a clip has none of them
    training: dict[str, int] = field(
        default_factory=dict
    )  # clips of data.train that probes were fitted on, by SOURCE/SPLIT
    told: dict[str, dict[str, Any]] = field(default_factory=dict)  # by modalities: what probing.probes tells

    def folds(self, cfg: RunConfig) -> list[str]:
        """The fold of each clip, SOURCE/SPLIT; "all" where all are held out together."""
        alone = cfg.classify.held_out == "in_turn"
        return [_source(clip) if alone else "all" for clip in self.clips.values()]

    @property
    def right(self) -> Tensor:
        """The class (B,) of each clip."""
        numbers = {label: i for i, label in enumerate(self.classes)}
        return torch.tensor([numbers[label_of(clip)] for clip in self.clips.values()], dtype=torch.int64)


def _source(clip: dict[str, Any]) -> str:
    return f"{clip['source']}/{clip['split']}"


def embed(model: Model, loader: Loader, cfg: RunConfig) -> Found:
    """Log-probabilities of the classes for each of the loader's clips, in the way of cfg.classify.method; on rank 0."""
    if cfg.classify.method == "classifier":
        return _by_head(model, loader, cfg)
    held = features.of_folders(model, loader, loader.folders, cfg)
    return (_by_names if cfg.classify.method == "zero_shot" else _by_probe)(model, loader, held, cfg)


def _by_head(model: Model, loader: Loader, cfg: RunConfig) -> Found:
    mine: dict[str, dict] = {"clips": {}, "scores": {}, "heard": {}}
    for k, batch in enumerate(loader.batches(0, len(loader.order))):
        watch.at(f"evaluation: batch {k}")
        parts = model.media(batch.to(loader.device))
        scores = model.head(parts).log_softmax(1).cpu()
        heard = torch.stack([part.there.any(1) for part in parts]).any(0).tolist()
        for i, clip, score, any_part in zip(loader.numbers(k), batch.meta, scores, heard, strict=True):
            if clip["id"]:
                mine["clips"][i], mine["scores"][i], mine["heard"][i] = clip, score.clone(), any_part
    found = distributed.merge(mine)
    unknown = {label_of(clip) for clip in found["clips"].values()} - {"", *cfg.model.labels}
    classes = [*cfg.model.labels, *sorted(unknown)]  # those that were not trained are never guessed, and count
    clips, left_out = _taking_part(found["clips"], found["heard"], classes)
    scores = F.pad(torch.stack([found["scores"][i] for i in clips]), (0, len(unknown)), value=-torch.inf)
    return Found(classes, clips, left_out, {cfg.model.modalities: scores})


def _taking_part(clips: dict[int, dict], heard: dict[int, bool], classes: list[str]) -> tuple[dict[int, dict], dict]:
    """(those with a class and a medium, ids of the others by reason); UserError without any."""
    gone = {
        "no label": [i for i, clip in clips.items() if not label_of(clip)],
        "another label": [i for i, clip in clips.items() if label_of(clip) and label_of(clip) not in classes],
        "no media": [i for i in clips if not heard[i]],
    }
    lost = {i for rows in gone.values() for i in rows}
    kept = {i: clip for i, clip in clips.items() if i not in lost}
    if not kept:
        why = ", ".join(f"{reason}: {len(rows)}" for reason, rows in gone.items())
        raise UserError(f"data.test: none of {len(clips)} clips can be classified ({why})")
    return kept, {reason: [clips[i]["id"] for i in rows] for reason, rows in gone.items()}


def _chosen(held: Features, classes: list[str], cfg: RunConfig) -> tuple[Features, dict[int, dict], dict]:
    """(the features that take part, their clips by number, ids of the others by reason)."""
    heard = dict(zip(held.number, held.having(cfg.model.modalities).tolist(), strict=True))
    clips, left_out = _taking_part(dict(zip(held.number, held.clips, strict=True)), heard, classes)
    return held.among(clips), clips, left_out


def _kinds(cfg: RunConfig) -> list[str]:
    return list(dict.fromkeys([cfg.model.modalities, *cfg.model.modalities]))


def _by_names(model: Model, loader: Loader, held: Features, cfg: RunConfig) -> Found:
    """Cosines of the classes' sentences with y^g, z^g, or the mean of both, over the temperature."""
    classes = asked(cfg) or sorted({label_of(clip) for clip in held.clips} - {""})
    some, clips, left_out = _chosen(held, classes, cfg)
    names = class_vectors(model, loader.tokenize, classes, cfg.classify.templates).cpu()
    scale = model.log_scale.exp().item() if cfg.model.learn_temperature else 1 / cfg.model.temperature
    scores = {}
    for kinds in _kinds(cfg):
        media = fusion.mean([some.vectors[kind] for kind in kinds], cfg.model.mean)
        logits = scale * media @ names.T
        scores[kinds] = logits.log_softmax(1).masked_fill(~some.having(kinds)[:, None], torch.nan)
    return Found(classes, clips, left_out, scores)


def asked(cfg: RunConfig) -> list[str]:
    """The classes of classify.labels, perhaps none; UserError for a file that cannot be read, or a class given twice."""
    names = cfg.classify.labels
    if len(names) == 1 and names[0].endswith(".txt"):
        try:
            lines = Path(names[0]).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"classify.labels: cannot read {names[0]} ({error}): a file has a class a line") from None
        names = [line.strip() for line in lines if line.strip()] or [""]
    if len(names) == 1 or len(set(names)) < len(names):
        raise UserError(
            f"classify.labels: {len(names)} classes, {len(set(names))} of them different: give two at least, once each"
        )
    return names


def _by_probe(model: Model, loader: Loader, held: Features, cfg: RunConfig) -> Found:
    """Probes that rank 0 fits, for each fold and each of the modalities."""
    folders = open_folders(cfg.data.train, "data.train", cfg.data) if cfg.data.train else []
    training = features.of_folders(model, loader, folders, cfg).where(lambda clip: bool(label_of(clip)))
    classes = sorted({label_of(clip) for clip in [*held.clips, *training.clips]} - {""})
    some, clips, left_out = _chosen(held, classes, cfg)
    found = Found(classes, clips, left_out, {}, Counter(map(_source, training.clips)))

    def work(passed: Passed) -> dict[str, tuple[Tensor, dict]]:
        some_of = probing.Problem(some, found.folds(cfg), training, classes, cfg, loader.device, passed)
        return {kinds: some_of.solved(kinds) for kinds in _kinds(cfg)}

    solved, failed = by_rank_0(work)
    if failed:
        raise UserError(failed)
    found.scores, found.told = ({kinds: pair[i] for kinds, pair in solved.items()} for i in (0, 1))
    return found


def ranked(found: Found, cfg: RunConfig) -> dict[str, dict[str, dict]]:
    """{type token: metrics}: label, and with /v and /a those of one medium alone."""
    rows = {}
    for kinds, scores in found.scores.items():
        heard = ~scores.isnan().any(1)
        if heard.any():
            row = _row(found, scores, heard.nonzero()[:, 0], cfg) | found.told.get(kinds, {})
            rows["label" + f"/{kinds}" * (kinds != cfg.model.modalities)] = row
    return {cfg.model.audio_type: rows}


def _row(found: Found, scores: Tensor, rows: Tensor, cfg: RunConfig) -> dict[str, Any]:
    """Metrics of these clips; over folds accuracy and top5 are means, and deviation is the sample's of accuracy.

    `confusion`, clips by right class and by guess, is there for CONFUSED classes at most.
    """
    folds, right = found.folds(cfg), found.right[rows]
    mine = np.array([folds[i] for i in rows.tolist()])
    names = list(dict.fromkeys(mine.tolist()))
    order = scores[rows].argsort(dim=1, descending=True, stable=True)
    hits = [100.0 * (order[:, :k] == right[:, None]).any(1).double().numpy() for k in (1, GUESSES)]
    by_fold = {name: {"accuracy": float(hits[0][mine == name].mean()), "top5": float(hits[1][mine == name].mean()),
                      "n_clips": int((mine == name).sum())} for name in names}  # fmt: skip
    size = len(found.classes)
    guess = order[:, 0]
    clips, hit = (torch.bincount(some, minlength=size) for some in (right, right[guess == right]))  # of each class
    there = clips > 0
    row: dict[str, Any] = {name: statistics.mean(f[name] for f in by_fold.values()) for name in ("accuracy", "top5")}
    row |= {"deviation": statistics.stdev(f["accuracy"] for f in by_fold.values())} if len(names) > 1 else {}
    row["class_mean"] = 100 * float((hit[there] / clips[there]).double().mean())
    row["commonest"] = 100 * int(clips.max()) / len(rows)  # of always naming the commonest class
    if cfg.eval.bootstrap and len(names) == 1:
        groups = np.array([number(clip["group"]) for clip in found.clips.values()])[rows]
        row["ci"] = {"accuracy": captioning.interval(hits[0], groups, cfg.eval.bootstrap, cfg.seed)}
    row |= {"n_clips": len(rows), "n_classes": size, "n_folds": len(names)}
    row |= {"folds": by_fold} if len(names) > 1 else {}
    row["classes"] = found.classes
    if size <= CONFUSED:
        pairs = torch.bincount(right * size + guess, minlength=size * size)
        row["confusion"] = pairs.view(size, size).tolist()
    return row


def account(found: Found, cfg: RunConfig) -> dict[str, Any]:
    """For the manifest: how clips got their class, from which others, and what is missing."""
    how = {
        "probe": f"L2 logistic regression on frozen pooled features, strength of {cfg.classify.strengths}, chosen by a fifth "
        "of the training clips, by whole groups of each class, then fitted on all of them",
        "zero_shot": f"nearest of the classes' names in {len(cfg.classify.templates)} sentences, averaged",
        "classifier": "the head that was trained",
    }[cfg.classify.method]
    turn = "; each folder of data.test held out in turn" * (cfg.classify.held_out == "in_turn")
    return {"protocol": how + turn, "training_clips": dict(found.training), "left_out": found.left_out}


def write_results(folder: Path, found: Found) -> None:
    """predictions.csv: id, source, label, guess, its probability, and the rank of the right class, by all modalities together."""
    scores = next(iter(found.scores.values()))
    place = 1 + (scores > scores.gather(1, found.right[:, None])).sum(1)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", "source", "label", "guess", "probability", "rank"])
    for clip, row, rank in zip(found.clips.values(), scores, place.tolist(), strict=True):
        best = int(row.argmax())
        writer.writerow(
            [clip["id"], _source(clip), label_of(clip), found.classes[best], f"{row[best].exp():.6f}", rank]
        )
    write_text(folder / "predictions.csv", out.getvalue())


def table(metrics: dict[str, dict]) -> str:
    """The metrics as text, one line for each of the modalities."""
    lines = [
        f"{'':<12}{'accuracy':>18}{'top 5':>8}{'class mean':>12}{'commonest':>11}{'clips':>8}{'classes':>9}{'folds':>7}"
    ]
    for name, row in metrics.items():
        spread = f" ± {row['deviation']:.1f}" if "deviation" in row else ""
        lines.append(
            f"{name:<12}{row['accuracy']:>{18 - len(spread)}.1f}{spread}{row['top5']:>8.1f}{row['class_mean']:>12.1f}"
            f"{row['commonest']:>11.1f}{row['n_clips']:>8}{row['n_classes']:>9}{row['n_folds']:>7}"
        )
    return "\n".join(lines)


def examples(found: Found, loader: Loader, cfg: RunConfig) -> tuple[list[exhibits.Exhibit], list[Predicted]]:
    """(clips spread over all of them, what was guessed of each by all modalities together)."""
    numbers, folds = list(found.clips), found.folds(cfg)
    chosen = torch.linspace(0, len(numbers) - 1, min(cfg.eval.report_queries, len(numbers))).long().tolist()
    scores, guessed = next(iter(found.scores.values())), []
    several = len(set(folds)) > 1
    for n, row in enumerate(chosen):
        best = scores[row].exp().topk(min(GUESSES, len(found.classes)))
        guesses = [(found.classes[k], p) for p, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        label = label_of(found.clips[numbers[row]])
        guessed.append(Predicted(n, label, guesses, folds[row] if several else ""))
    with ThreadPoolExecutor(THREADS) as pool:
        shown = pool.map(lambda row: exhibits.of_clip(loader, numbers[row], found.clips, cfg.model.modalities), chosen)
        return list(shown), guessed


def must_be_apart(cfg: RunConfig) -> None:
    """UserError if a folder of data.test also trains, or selects."""
    others = [*cfg.data.train, *(cfg.data.val if cfg.eval.select else ())]
    both = {os.path.normpath(url) for url in cfg.data.test} & {os.path.normpath(url) for url in others}
    if both:
        raise UserError(
            f"data.test: {both.pop()} is in data.train or data.val too: what is tested on may not be learnt"
        )


def check(cfg: RunConfig) -> None:
    """UserError for settings that contradict each other."""
    how = cfg.classify.method
    if (how == "classifier") != (cfg.model.fusion == "classifier"):
        raise UserError(f"classify.method={how}, model.fusion={cfg.model.fusion}: classifier goes with classifier")
    if how != "classifier" and cfg.eval.every:
        raise UserError(
            f"eval.every={cfg.eval.every}: {how} looks at frozen features, after training: set eval.every=0"
        )
    must_be_apart(cfg)
    if cfg.classify.held_out == "in_turn" and (len(cfg.data.test) < 2 or how == "classifier"):
        raise UserError(
            f"classify.held_out=in_turn: data.test has {len(cfg.data.test)} folders: name two at least"
            if len(cfg.data.test) < 2
            else "classify.held_out=in_turn: each fold has a run of its own below run_dir: evaluate one of them"
        )
    if how == "probe" and cfg.classify.held_out == "together" and not cfg.data.train:
        raise UserError("data.train names no shard folder to fit a probe on")
    if not cfg.classify.strengths or min(cfg.classify.strengths) <= 0 or min([1, *cfg.classify.shots]) < 1:
        raise UserError("classify: strengths must be positive, shots at least 1")
    if not cfg.classify.templates or not all("{}" in template for template in cfg.classify.templates):
        raise UserError(f"classify.templates={cfg.classify.templates}: each needs a {{}} for the class")
    asked(cfg)
