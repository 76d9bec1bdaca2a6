"""Linear probes on features of labelled clips: fold by fold, with the strength chosen inside the training part; few shots."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip4vla import probe
from clip4vla.classifier import label_of
from clip4vla.config import ClassifyConfig, RunConfig, UserError
from clip4vla.features import Features

MOST = (
    4  # clips of each class, beside those of a few-shot probe, that its strength is chosen by (Zhou et al. 2022, CoOp)
)


class Known:
    """Clips of known class as a probe reads them: x (n, D), y (n,), their groups."""

    def __init__(self, clips: Features, kinds: str, classes: list[str], rows: Sequence[int], device: torch.device):
        there = clips.having(kinds)
        self.rows = [row for row in rows if there[row]]
        numbers = {label: i for i, label in enumerate(classes)}
        self.x = clips.beside(kinds)[self.rows].to(device)
        self.y = torch.tensor(
            [numbers[label_of(clips.clips[row])] for row in self.rows], dtype=torch.int64, device=device
        )
        self.groups = [clips.clips[row]["group"] for row in self.rows]

    def joined(self, other: "Known") -> "Known":
        """Both; rows are those of the first."""
        out = object.__new__(Known)
        out.rows, out.groups = self.rows, self.groups + other.groups
        out.x, out.y = torch.cat([self.x, other.x]), torch.cat([self.y, other.y])
        return out


def probes(
    held: Features,
    folds: list[str],
    training: Features,
    classes: list[str],
    kinds: str,
    cfg: RunConfig,
    device: torch.device,
) -> tuple[Tensor, dict[str, Any]]:
    """(log-probabilities (B, K) of the held-out clips, NaN where one has none of these media; the strengths by fold, and the
    few-shot accuracies in percent by number of shots, over folds and draws).

    Each fold is scored by a probe on all clips of the others, and of `training`.
    """
    scores = torch.full((len(folds), len(classes)), torch.nan, dtype=torch.float64)
    told: dict[str, Any] = {"C": {}, "few_shot": {str(shots): [] for shots in cfg.classify.shots}}
    always = Known(training, kinds, classes, range(len(training.clips)), device)
    for fold in dict.fromkeys(folds):
        test, rest = (
            Known(held, kinds, classes, [i for i, f in enumerate(folds) if (f == fold) == inside], device)
            for inside in (True, False)
        )
        fit = rest.joined(always) if rest.rows else always
        if not test.rows:
            continue
        if fit.y.unique().numel() < 2:
            raise UserError(
                f"classification of {fold}: the clips to train on have {fit.y.unique().numel()} classes: name more in data.train"
            )
        apart = probe.held_part(fit.y.cpu(), fit.groups, cfg.seed).to(device)
        best = probe.chosen(fit.x, fit.y, len(classes), cfg.classify.strengths, apart)
        scores[test.rows] = best.log_probabilities(test.x).cpu()
        told["C"][fold] = best.strength
        for shots, accuracies in told["few_shot"].items():
            accuracies += few_shot(fit, test, len(classes), int(shots), cfg.classify, cfg.seed)
    return scores, told


def few_shot(fit: Known, test: Known, classes: int, shots: int, cfg: ClassifyConfig, seed: int) -> list[float]:
    """Accuracies in percent of probes on `shots` clips of each class, one for each draw.

    The strength is chosen by up to MOST further clips of each class, of other groups; no draw if there are none.
    """
    out = []
    for draw in range(cfg.draws):
        few, more = drawn(fit.y.cpu(), fit.groups, shots, np.random.default_rng((seed, shots, draw)))
        if more:
            rows = torch.tensor([*few, *more], device=fit.y.device)
            held = torch.arange(len(rows), device=fit.y.device) >= len(few)
            best = probe.chosen(fit.x[rows], fit.y[rows], classes, cfg.strengths, held, again=False)
            out.append(100 * best.accuracy(test.x, test.y))
    return out


def drawn(y: Tensor, groups: list[str], shots: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """(rows of `shots` clips of each class, rows of up to MOST and `shots` more of each class, of other groups)."""
    labels, order = y.tolist(), rng.permutation(len(y)).tolist()

    def first(rows: list[int], most: int) -> list[int]:
        by_class: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
        for row in rows:
            by_class[labels[row]].append(row)
        return [row for some in by_class.values() for row in some[:most]]

    few = first(order, shots)
    used = {groups[row] for row in few}
    return few, first([row for row in order if groups[row] not in used], min(shots, MOST))
