"""Linear probes on features of labelled clips: fold by fold, with the strength chosen inside the training part; few shots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip4vla import probe
from clip4vla.classifier import label_of
from clip4vla.config import ClassifyConfig, RunConfig, UserError
from clip4vla.features import Features

# clips of each class, beside those of a few-shot probe, that its strength is chosen by (Zhou et al. 2022, CoOp)
MOST = 4


@dataclass
class Known:
    """Clips of known class as a probe reads them."""

    rows: list[int]  # of the Features that they are from
    x: Tensor  # n D
    y: Tensor  # n
    groups: list[str]

    def joined(self, other: "Known") -> "Known":
        """Both; rows mean nothing any more."""
        return Known([], torch.cat([self.x, other.x]), torch.cat([self.y, other.y]), self.groups + other.groups)


@dataclass
class Problem:
    """Held-out clips with the fold of each, and clips of data.train, all with a class."""

    held: Features
    folds: list[str]
    training: Features
    classes: list[str]
    cfg: RunConfig
    device: torch.device
    passed: Callable[[str], None]  # told of each fit, which may take minutes

    def known(self, clips: Features, kinds: str, rows: Sequence[int]) -> Known:
        """Those of these rows that have any of these media."""
        there, numbers = clips.having(kinds), {label: i for i, label in enumerate(self.classes)}
        rows = [row for row in rows if there[row]]
        y = torch.tensor([numbers[label_of(clips.clips[row])] for row in rows], dtype=torch.int64, device=self.device)
        return Known(rows, clips.beside(kinds)[rows].to(self.device), y, [clips.clips[row]["group"] for row in rows])

    def solved(self, kinds: str) -> tuple[Tensor, dict[str, Any]]:
        """(log-probabilities (B, K) of the held-out clips, NaN where one has none of these media; strengths by fold, and few-shot
        accuracies in percent by number of shots, over folds and draws).

        Each fold is scored by a probe on all clips of the others, and of data.train. Raises UserError where that is
        impossible for all media together; of one alone the scores are NaN.
        """
        scores = torch.full((len(self.folds), len(self.classes)), torch.nan, dtype=torch.float64)
        told: dict[str, Any] = {"C": {}, "few_shot": {str(shots): [] for shots in self.cfg.classify.shots}}
        try:
            for fold in dict.fromkeys(self.folds):
                self._fold(fold, kinds, scores, told)
        except UserError:
            if kinds == self.cfg.model.modalities:
                raise
            return torch.full_like(scores, torch.nan), {}
        return scores, told

    def _fold(self, fold: str, kinds: str, scores: Tensor, told: dict[str, Any]) -> None:
        inside, outside = (
            [row for row, name in enumerate(self.folds) if (name == fold) == same] for same in (True, False)
        )
        test, rest = (self.known(self.held, kinds, rows) for rows in (inside, outside))
        fit = rest.joined(self.known(self.training, kinds, range(len(self.training.clips))))
        if not test.rows:
            return
        if len(fit.y.unique()) < 2:
            raise UserError(
                f"classification of {fold}: the clips to train on have {len(fit.y.unique())} classes: data.train needs more"
            )
        self.passed(f"evaluation: probe of {kinds}, {fold}")
        cfg, apart = self.cfg, probe.held_part(fit.y.cpu(), fit.groups, self.cfg.seed).to(self.device)
        best = probe.chosen(fit.x, fit.y, len(self.classes), cfg.classify.strengths, apart)
        scores[test.rows] = best.log_probabilities(test.x).cpu()
        told["C"][fold] = best.strength
        for shots, accuracies in told["few_shot"].items():
            self.passed(f"evaluation: {shots} shots of {kinds}, {fold}")
            accuracies += few_shot(fit, test, len(self.classes), int(shots), cfg.classify, cfg.seed)


def few_shot(fit: Known, test: Known, classes: int, shots: int, cfg: ClassifyConfig, seed: int) -> list[float]:
    """Accuracies in percent of probes on `shots` clips of each class (all of a class with fewer), one for each draw.

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
