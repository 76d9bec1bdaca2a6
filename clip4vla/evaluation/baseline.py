"""What a plain method gets from the same shards: statistics of the log-mel spectrogram and logistic regressions, untuned.

Labels: means, deviations and 90th percentiles of each mel channel, and deviations of its differences from row to row, into
one multinomial regression. Captions of equally many words, as GRID's: the spectrogram in bins of 0.1 s and 32 bands into one
regression for each word's place; a sound and a sentence score the sum of the log-probabilities of its words.

n clips, M mel channels, K classes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip4vla.config import RunConfig, SpectrogramConfig
from clip4vla.config_io import read_tree
from clip4vla.data.loader import open_folders, stable_hash63
from clip4vla.errors import UserError
from clip4vla.evaluation import linear_probe, retrieval_metrics
from clip4vla.evaluation.captioning import interval
from clip4vla.evaluation.runner import eval_loader
from clip4vla.io.atomic import write_text
from clip4vla.media.spectrogram import decode
from clip4vla.models.classifier import label_of

BIN_SECONDS, BANDS = 0.1, 32  # of the spectrogram that words are read from
STRENGTHS = [1e-3, 1e-2, 1e-1, 1.0]  # C of scikit-learn, chosen by a fifth of the training clips, by whole groups


@dataclass
class Sounds:
    """Holds the clips with sound of some folders."""

    clips: list[dict[str, Any]]  # their json
    decibels: list[Tensor]  # of each (R, M), R its valid rows
    spectrogram: SpectrogramConfig


def read(urls: dict[str, float], key: str, cfg: RunConfig) -> Sounds:
    """Read all clips with sound of shard folders; UserError if there are none."""
    folders = open_folders(urls, key, cfg.data)
    every = eval_loader(cfg, folders, torch.device("cpu"))
    loader = every.for_folders(folders, every.order, ["fbank"])
    sounds = Sounds([], [], loader.spectrogram)
    for batch in loader.batches(0, len(loader.order)):
        rows = decode(batch.segments.float().mean(1), loader.spectrogram)  # S 224 M
        for number, clip in enumerate(batch.meta):
            own = batch.segment_clip == number
            if own.any():
                sounds.clips.append(clip)
                sounds.decibels.append(rows[own].flatten(0, 1)[: clip["n_rows"]])
    if not sounds.clips:
        raise UserError(f"{key}: no clip has sound: a baseline of sounds needs some")
    return sounds


def statistics(decibels: Tensor) -> Tensor:
    """Describe a spectrogram (R, M) by 4 M numbers: mean, deviation, 90th percentile, deviation of differences."""
    steps = decibels.diff(dim=0) if len(decibels) > 1 else torch.zeros_like(decibels)
    rows = [decibels.mean(0), decibels.std(0, correction=0), decibels.quantile(0.9, 0), steps.std(0, correction=0)]
    return torch.cat(rows)


def bins(decibels: Tensor, count: int, spec: SpectrogramConfig) -> Tensor:
    """Average a spectrogram (R, M) in `count` bins of BIN_SECONDS and BANDS bands: (count * BANDS,); silence fills the rest."""
    length = round(BIN_SECONDS * spec.sample_rate / spec.hop_length)
    some = decibels[: count * length]
    padded = torch.cat([some, some.min().expand(count * length - len(some), decibels.shape[1])])
    bands = torch.nn.functional.adaptive_avg_pool1d(padded[:, None], BANDS)[:, 0]
    return bands.view(count, length, BANDS).mean(1).flatten()


def evaluate(cfg: RunConfig) -> dict[str, dict[str, Any]]:
    """Evaluate on data.test what is fitted on data.train, or on the other folds (classify.cross_validate): metrics by name.

    `label` where all clips have one; audio_to_text and text_to_audio where all captions have equally many words.
    """
    test = {url: read({url: share}, "data.test", cfg) for url, share in cfg.data.test.items()}
    training = [read(cfg.data.train, "data.train", cfg)] if cfg.data.train else []
    if cfg.classify.cross_validate:
        folds = [(joined([*training, *(s for other, s in test.items() if other != url)]), test[url]) for url in test]
    else:
        folds = [(joined(training), joined([*test.values()]))]
    clips = [clip for pair in folds for sounds in pair for clip in sounds.clips]
    metrics: dict[str, dict[str, Any]] = {}
    if all(label_of(clip) for clip in clips):
        metrics["label"] = _by_label(folds, cfg)
    lengths = {len(caption.split()) for clip in clips for caption in clip["captions"][:1]}
    if len(lengths) == 1 and min(lengths) > 1 and all(clip["captions"] for clip in clips):
        metrics |= _by_words(*folds[0], cfg)
    if not metrics:
        raise UserError("a baseline needs clips that all have a label, or captions of equally many words")
    return metrics


def write(metrics: dict[str, dict[str, Any]], cfg: RunConfig) -> None:
    """Write run_dir/baseline.json, with the folders that it is of; print which others' numbers it replaces."""
    path, made = Path(cfg.run_dir, "baseline.json"), {"train": [*cfg.data.train], "test": [*cfg.data.test]}
    old = read_tree(path).get("data", made) if path.is_file() else made
    if old != made:
        print(
            f"{path}: replaces the numbers of data.train={old['train']} data.test={old['test']}; run_dir=NEW keeps both"
        )
    write_text(path, json.dumps(metrics | {"data": made}, indent=1))


def joined(parts: list[Sounds]) -> Sounds:
    """Join the clips of several folders; UserError if there are none."""
    if not parts:
        raise UserError("data.train names no shard folder: a baseline is fitted on its clips")
    clips, decibels = [c for part in parts for c in part.clips], [d for part in parts for d in part.decibels]
    return Sounds(clips, decibels, parts[0].spectrogram)


def _by_label(folds: list[tuple[Sounds, Sounds]], cfg: RunConfig) -> dict[str, Any]:
    """Compute accuracy and mAP (of clips ranked for a class, mean over classes), in percent; over folds their means."""
    rows, hits, groups = [], [], []
    for training, test in folds:
        classes = sorted({label_of(clip) for clip in [*training.clips, *test.clips]})
        y, target = (torch.tensor([classes.index(label_of(c)) for c in sounds.clips]) for sounds in (training, test))
        x = [torch.stack([statistics(decibels) for decibels in sounds.decibels]) for sounds in (training, test)]
        scores = _fitted(x[0], x[1], y, [clip["group"] for clip in training.clips], len(classes), cfg)
        hit = 100.0 * (scores.argmax(1) == target).double()
        rows.append(
            {"accuracy": float(hit.mean()), "mAP": 100 * retrieval_metrics.mean_average_precision(scores, target)}
        )
        hits.append(hit)
        groups += [stable_hash63(clip["group"]) for clip in test.clips]
    row: dict[str, Any] = {name: float(np.mean([row[name] for row in rows])) for name in ("accuracy", "mAP")}
    if len(rows) > 1:
        row["accuracy_std"] = float(np.std([row["accuracy"] for row in rows], ddof=1))
    if cfg.eval.bootstrap:
        row["ci"] = {"accuracy": interval(torch.cat(hits).numpy(), np.array(groups), cfg.eval.bootstrap, cfg.seed)}
    return row | {"n_clips": len(groups), "n_folds": len(rows)}


def _by_words(training: Sounds, test: Sounds, cfg: RunConfig) -> dict[str, dict[str, Any]]:
    """Compute the retrieval of sentences and sounds from one regression for each word's place."""
    seconds = (
        max(len(d) for d in training.decibels) * training.spectrogram.hop_length / training.spectrogram.sample_rate
    )
    count = max(1, math.ceil(seconds / BIN_SECONDS))
    x = [torch.stack([bins(d, count, s.spectrogram) for d in s.decibels]) for s in (training, test)]
    sentences = [[clip["captions"][0].split() for clip in sounds.clips] for sounds in (training, test)]
    groups = [clip["group"] for clip in training.clips]
    scores = torch.zeros(len(test.clips), len(test.clips), dtype=torch.float64)  # sounds by sentences
    for place in range(len(sentences[0][0])):
        words = sorted({sentence[place] for part in sentences for sentence in part})
        y, wanted = (torch.tensor([words.index(s[place]) for s in part]) for part in sentences)
        scores += _fitted(x[0], x[1], y, groups, len(words), cfg)[:, wanted]
    group = torch.tensor([stable_hash63(clip["group"]) for clip in test.clips])
    columns = torch.arange(len(group))
    options = (cfg.eval.permutations, cfg.seed, cfg.eval.bootstrap)
    ways = {"audio_to_text": scores, "text_to_audio": scores.T.contiguous()}
    return {way: retrieval_metrics.evaluate(table, columns, group, group, *options) for way, table in ways.items()}


def _fitted(x: Tensor, test: Tensor, y: Tensor, groups: list[str], classes: int, cfg: RunConfig) -> Tensor:
    """Fit a regression to features (n, D) and classes (n,): log-probabilities (m, classes) of the test features (m, D)."""
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-6
    x, test = (x - mean) / std, (test - mean) / std
    held = linear_probe.group_holdout(y, groups, cfg.seed)
    return linear_probe.fit_select_C(x, y, classes, STRENGTHS, held).log_probabilities(test)


def table(metrics: dict[str, dict[str, Any]]) -> str:
    """Format the metrics as text."""
    lines = []
    if row := metrics.get("label"):
        spread = f" ± {row['accuracy_std']:.1f}" if "accuracy_std" in row else ""
        spread += " [{:.1f}, {:.1f}]".format(*row["ci"]["accuracy"]) if "ci" in row else ""
        lines.append(f"label: accuracy {row['accuracy']:.1f}{spread}, mAP {row['mAP']:.1f}")
    ways = {name: row for name, row in metrics.items() if name != "label"}
    return "\n".join([*lines, *([retrieval_metrics.table(ways)] if ways else [])])
