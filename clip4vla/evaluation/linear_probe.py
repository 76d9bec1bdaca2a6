"""The linear probe: multinomial logistic regression with an L2 penalty, in float64 by L-BFGS.

n clips, D width, K classes. The objective is scikit-learn's, 1/2 |W|^2 + C sum of cross entropies, the bias not penalised
(of two classes, scikit-learn keeps the difference of our two vectors: its C is twice ours). Where clips have several classes,
y is (n, K) of 0 and 1, and each class has a logistic regression of its own against the rest, all with one C.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip4vla.config import ClassifyConfig, RunConfig
from clip4vla.data.sample_metadata import labels_of
from clip4vla.errors import UserError
from clip4vla.evaluation import linear_probe, retrieval_metrics
from clip4vla.evaluation.features import Features

ITERATIONS = 1000
ROUGH = 1e-4  # tolerance while a strength is looked for
PATIENCE = 2
CURVATURE = 0.1  # of cross entropy by a logit, p (1 - p), about
SHARE = 0.2  # of the clips of each class, that C is chosen by


class Probe(NamedTuple):
    """Holds the weights of a fitted probe."""

    weight: Tensor  # K D
    bias: Tensor  # K
    strength: float  # C
    several: bool = False  # each class against the rest

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Compute log-probabilities (n, K) float64 of features (n, D)."""
        logits = x.double() @ self.weight.T + self.bias
        return F.logsigmoid(logits) if self.several else logits.log_softmax(1)

    def quality(self, x: Tensor, y: Tensor) -> float:
        """Compute what a strength is chosen by: accuracy, or of several classes a clip the mean average precision."""
        if not self.several:
            return self.accuracy(x, y)
        figures = retrieval_metrics.rank_classes(self.log_probabilities(x).cpu(), y.bool().cpu())
        return float(np.nanmean([precision for precision, _ in figures]))

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Compute the share of the clips whose likeliest class is theirs, from features (n, D) and classes (n,)."""
        return float((self.log_probabilities(x).argmax(1) == y).double().mean())


def fit(
    x: Tensor, y: Tensor, classes: int, strength: float, start: Probe | None = None, tolerance: float = 1e-6
) -> Probe:
    """Fit a probe to features x (n, D) and classes y (n,) or (n, K); start: a probe of another strength, which is near.

    tolerance: of the gradient, in the directions of LogisticProblem; 1e-6 is right to about 1e-4 in a probability.
    """
    return LogisticProblem(x, y, classes).fit(strength, start, tolerance)


class LogisticProblem:
    """Fits features (n, D) with several strengths, along the r directions in which they lie.

    Features of one kind lie along few directions; plain steps would creep in the others. So r directions are taken, each
    scaled so that the objective is about equally curved in all of them.
    """

    def __init__(self, x: Tensor, y: Tensor, classes: int):
        self.y, self.classes, self.centre = y, classes, x.double().mean(0)
        x = x.double() - self.centre  # which moves the bias alone
        if len(x) < x.shape[1]:
            _, values, rows = torch.linalg.svd(x, full_matrices=False)
            values, directions = values.square().flip(0), rows.flip(0).T
        else:
            values, directions = torch.linalg.eigh(x.T @ x)
        kept = values > 1e-12 * values[-1]
        self.variances, self.directions = values[kept] / len(x), directions[:, kept]  # r, D r
        self.rows = x @ self.directions  # n r

    def fit(self, strength: float, start: Probe | None, tolerance: float) -> Probe:
        """Fit a probe, see the function fit()."""
        penalty = 1 / (strength * len(self.y))
        lengths = (CURVATURE * self.variances + penalty).rsqrt()
        rows = self.rows * lengths
        weight = rows.new_zeros(self.classes, rows.shape[1])
        bias = rows.new_zeros(self.classes)
        if start:
            weight, bias = start.weight @ self.directions / lengths, start.bias + start.weight @ self.centre
        search = torch.optim.LBFGS(
            [weight.requires_grad_(), bias.requires_grad_()], max_iter=ITERATIONS, history_size=30,
            tolerance_grad=tolerance, tolerance_change=0, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def objective() -> Tensor:
            search.zero_grad()
            loss = self._loss(rows @ weight.T + bias) + penalty / 2 * (weight * lengths).square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            search.step(objective)
        weight, bias = (weight.detach() * lengths) @ self.directions.T, bias.detach()
        return Probe(weight, bias - weight @ self.centre, strength, self.y.ndim == 2)

    def _loss(self, logits: Tensor) -> Tensor:
        """Compute the mean over the clips of their cross entropies, from logits (n, K)."""
        if self.y.ndim == 1:
            return F.cross_entropy(logits, self.y)
        return F.binary_cross_entropy_with_logits(logits, self.y, reduction="sum") / len(self.y)


def fit_select_C(
    x: Tensor, y: Tensor, classes: int, strengths: Sequence[float], held: Tensor, again: bool = True
) -> Probe:
    """Fit a probe to features (n, D) and classes (n,) or (n, K) with the strength C that is best on the held clips (n,) bool.

    Best by Probe.quality; of equally good strengths the smallest wins, which has the largest penalty. again: fit the chosen
    one on all clips, not only on those that are not held. Raises UserError if several strengths are given and no clip is held.
    """
    if len(strengths) == 1:
        return fit(x, y, classes, strengths[0]) if again else fit(x[~held], y[~held], classes, strengths[0])
    if not held.any():
        raise UserError(
            "a probe: no class has clips of two groups to choose its strength by; give classify.C a single one"
        )
    best = _best(LogisticProblem(x[~held], y[~held], classes), strengths, x[held], y[held])
    return fit(x, y, classes, best.strength, best) if again else best


def _best(problem: LogisticProblem, strengths: Sequence[float], x: Tensor, y: Tensor) -> Probe:
    """Fit strengths in ascending order, and return the first of the probes that are best on x (n, D), y (n,) or (n, K).

    Stops once PATIENCE strengths have been worse than the best: weaker penalties take the longest, and overfit more.
    """
    first, *others = sorted(strengths)
    best = probe = problem.fit(first, None, ROUGH)
    best_quality, worse = best.quality(x, y), 0
    for strength in others:
        probe = problem.fit(strength, probe, ROUGH)  # from the one before, which is near
        quality = probe.quality(x, y)
        if quality > best_quality:
            best, best_quality, worse = probe, quality, 0
        elif quality < best_quality:
            worse += 1
        if worse == PATIENCE:
            break
    return best


def group_holdout(y: Tensor, groups: Sequence[str], seed: int) -> Tensor:
    """Mark the clips (n,) bool to choose a strength by: of each class whole groups, drawn by seed.

    They are at most SHARE of its clips, or its smallest group; at least one group stays. A group counts to the class of its
    first clip.
    """
    home: dict[str, int] = {}
    for label, group in zip(y.tolist(), groups, strict=True):
        home.setdefault(group, label)
    rng, sizes, held = np.random.default_rng(seed), Counter(groups), set()
    for label in sorted(set(home.values())):
        own = sorted(group for group in home if home[group] == label)
        room = max(SHARE * sum(sizes[group] for group in own), min(sizes[group] for group in own))
        for i in rng.permutation(len(own))[:-1]:
            if sizes[own[i]] <= room:
                held.add(own[i])
                room -= sizes[own[i]]
    return torch.tensor([group in held for group in groups])


# clips of each class, beside those of a few-shot probe, that its strength is chosen by (Zhou et al. 2022, CoOp)
MOST = 4


@dataclass
class LabeledFeatures:
    """Holds clips of known class as a probe reads them."""

    rows: list[int]  # of the Features that they are from
    x: Tensor  # n D
    y: Tensor  # n, or n K where clips have several classes
    groups: list[str]

    @property
    def home(self) -> Tensor:
        """Number one class of each clip (n,) int64: of several its rarest one."""
        if self.y.ndim == 1:
            return self.y
        return self.y.sum(0).expand_as(self.y).masked_fill(self.y == 0, torch.inf).argmin(1)

    def joined(self, other: "LabeledFeatures") -> "LabeledFeatures":
        """Join both sets of clips; rows are left out, since they count in two Features."""
        return LabeledFeatures(
            [], torch.cat([self.x, other.x]), torch.cat([self.y, other.y]), self.groups + other.groups
        )


@dataclass
class ProbeEvaluation:
    """Scores held-out clips, each by a probe on the other folds and data.train; all clips have a class."""

    held: Features
    folds: list[str]
    training: Features
    classes: list[str]
    cfg: RunConfig
    device: torch.device
    passed: Callable[[str], None]  # called before each fit, which may take minutes
    several: bool = False  # clips have several classes

    def known(self, clips: Features, kinds: str, rows: Sequence[int]) -> LabeledFeatures:
        """Select those of the rows that have any of these media."""
        there, numbers = clips.having(kinds), {label: i for i, label in enumerate(self.classes)}
        rows = [row for row in rows if there[row]]
        named = [[numbers[label] for label in labels_of(clips.clips[row]) if label in numbers] for row in rows]
        if self.several:
            y = torch.zeros(len(rows), len(self.classes), dtype=torch.float64, device=self.device)
            for marks, some in zip(y, named, strict=True):
                marks[some] = 1
        else:
            y = torch.tensor([one for (one,) in named], dtype=torch.int64, device=self.device)
        return LabeledFeatures(
            rows, clips.beside(kinds)[rows].to(self.device), y, [clips.clips[row]["group"] for row in rows]
        )

    def solved(self, kinds: str) -> tuple[Tensor, dict[str, Any]]:
        """Score the held-out clips: log-probabilities (B, K), NaN where a clip has none of these media; and notes.

        The notes are the strengths by fold, and few-shot accuracies (of several classes a clip mAP) in percent by number of
        shots, over folds and draws.
        Each fold is scored by a probe on all clips of the others, and of data.train. Raises UserError where that is
        impossible for all media together; of one alone the scores are NaN.
        """
        scores = torch.full((len(self.folds), len(self.classes)), torch.nan, dtype=torch.float64)
        notes: dict[str, Any] = {"C": {}, "few_shot": {str(shots): [] for shots in self.cfg.classify.shots}}
        try:
            for fold in dict.fromkeys(self.folds):
                self._fold(fold, kinds, scores, notes)
        except UserError:
            if kinds == self.cfg.model.modalities:
                raise
            return torch.full_like(scores, torch.nan), {}
        return scores, notes

    def _fold(self, fold: str, kinds: str, scores: Tensor, notes: dict[str, Any]) -> None:
        inside = [row for row, name in enumerate(self.folds) if name == fold]
        outside = [row for row, name in enumerate(self.folds) if name != fold]
        test, rest = self.known(self.held, kinds, inside), self.known(self.held, kinds, outside)
        fit = rest.joined(self.known(self.training, kinds, range(len(self.training.clips))))
        if not test.rows:
            return
        n_classes = int(fit.y.any(0).sum()) if self.several else len(fit.y.unique())
        if n_classes < 2:
            raise UserError(
                f"classification of {fold}: the clips to train on have {n_classes} classes: data.train needs more"
            )
        self.passed(f"evaluation: probe of {kinds}, {fold}")
        cfg, apart = self.cfg, linear_probe.group_holdout(fit.home.cpu(), fit.groups, self.cfg.seed).to(self.device)
        best = linear_probe.fit_select_C(fit.x, fit.y, len(self.classes), cfg.classify.C, apart)
        scores[test.rows] = best.log_probabilities(test.x).cpu()
        notes["C"][fold] = best.strength
        for shots, figures in notes["few_shot"].items():
            self.passed(f"evaluation: {shots} shots of {kinds}, {fold}")
            figures += few_shot(fit, test, len(self.classes), int(shots), cfg.classify, cfg.seed)


def few_shot(
    fit: LabeledFeatures, test: LabeledFeatures, classes: int, shots: int, cfg: ClassifyConfig, seed: int
) -> list[float]:
    """Compute 100 times the quality of probes on `shots` clips of each class (or all it has), one for each draw.

    The strength is chosen by up to MOST further clips of each class, of other groups; no draw if there are none.
    """
    out = []
    for draw in range(cfg.n_draws):
        few, more = drawn(fit.y.cpu(), fit.groups, shots, np.random.default_rng((seed, shots, draw)))
        if more:
            rows = torch.tensor([*few, *more], device=fit.y.device)
            held = torch.arange(len(rows), device=fit.y.device) >= len(few)
            best = linear_probe.fit_select_C(fit.x[rows], fit.y[rows], classes, cfg.C, held, again=False)
            out.append(100 * best.quality(test.x, test.y))
    return out


def drawn(y: Tensor, groups: list[str], shots: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Draw (rows of `shots` clips of each class, rows of up to MOST and `shots` more of each class, of other groups).

    Where clips have several classes, y (n, K), a clip counts to each of them, and the rarest class is drawn first: common ones
    get more than `shots`, as few as that allows.
    """
    own = [[label] for label in y.tolist()] if y.ndim == 1 else [row.nonzero()[:, 0].tolist() for row in y]
    order, sizes = rng.permutation(len(y)).tolist(), Counter(label for labels in own for label in labels)
    classes = sorted(sizes, key=lambda label: (sizes[label] if y.ndim == 2 else 0, label))

    def first(rows: list[int], most: int) -> list[int]:
        chosen: dict[int, None] = {}
        for label in classes:
            room = most - sum(label in own[row] for row in chosen) if y.ndim == 2 else most
            there = [row for row in rows if label in own[row] and row not in chosen]
            chosen |= dict.fromkeys(there[: max(room, 0)])
        return list(chosen)

    few = first(order, shots)
    used = {groups[row] for row in few}
    return few, first([row for row in order if groups[row] not in used], min(shots, MOST))
