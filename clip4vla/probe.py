"""The linear probe: multinomial logistic regression with an L2 penalty, in float64 by L-BFGS.

n clips, D width, K classes. The objective is scikit-learn's, 1/2 |W|^2 + C sum of cross entropies, the bias not penalised
(of two classes, scikit-learn keeps the difference of our two vectors: its C is twice ours).
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip4vla.config import UserError

ITERATIONS = 1000
ROUGH = 1e-4  # tolerance while a strength is looked for
PATIENCE = 2
CURVATURE = 0.1  # of cross entropy by a logit, p (1 - p), about
SHARE = 0.2  # of the clips of each class, that C is chosen by


class Probe(NamedTuple):
    """A fitted one."""

    weight: Tensor  # K D
    bias: Tensor  # K
    strength: float  # C

    def log_probabilities(self, x: Tensor) -> Tensor:
        """(n, K) float64 of features (n, D)."""
        return (x.double() @ self.weight.T + self.bias).log_softmax(1)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of the clips whose likeliest class is theirs."""
        return float((self.log_probabilities(x).argmax(1) == y).double().mean())


def fit(
    x: Tensor, y: Tensor, classes: int, strength: float, start: Probe | None = None, tolerance: float = 1e-6
) -> Probe:
    """Of features (n, D) and classes y (n,); start: a probe of another strength, which is near.

    tolerance: of the gradient, in the directions of Task; 1e-6 is right to about 1e-4 in a probability.
    """
    return Task(x, y, classes).fit(strength, start, tolerance)


class Task:
    """Features along the directions in which they lie, to be fitted with several strengths.

    Features of one kind lie along few directions; plain steps would creep in the others. So r directions are taken, each as
    long as makes the objective about equally curved in all of them.
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
        """See fit()."""
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
            loss = F.cross_entropy(rows @ weight.T + bias, self.y) + penalty / 2 * (weight * lengths).square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            search.step(objective)
        weight, bias = (weight.detach() * lengths) @ self.directions.T, bias.detach()
        return Probe(weight, bias - weight @ self.centre, strength)


def chosen(x: Tensor, y: Tensor, classes: int, strengths: Sequence[float], held: Tensor, again: bool = True) -> Probe:
    """The probe whose strength is most accurate on the held ones (n,) bool; of equal ones that with the largest penalty.

    Strengths are tried in ascending order until PATIENCE of them were worse. again: fitted once more, on all clips. Raises
    UserError if there is nothing to choose by.
    """
    if len(strengths) == 1:
        return fit(x if again else x[~held], y if again else y[~held], classes, strengths[0])
    if not held.any():
        raise UserError(
            "a probe: no class has clips of two groups to choose its strength by; give classify.strengths a single one"
        )
    task, most, worse = Task(x[~held], y[~held], classes), -1.0, 0
    probe: Probe | None = None
    best: Probe | None = None
    for strength in sorted(strengths):
        probe = task.fit(strength, probe, ROUGH)
        accuracy = probe.accuracy(x[held], y[held])
        best, worse = (probe, 0) if accuracy > most else (best, worse + (accuracy < most))
        most = max(most, accuracy)
        if worse == PATIENCE:  # weaker penalties take the longest, and overfit more
            break
    assert best is not None
    return fit(x, y, classes, best.strength, best) if again else best


def held_part(y: Tensor, groups: Sequence[str], seed: int) -> Tensor:
    """Which clips (n,) to choose by: of each class whole groups drawn by seed, SHARE of its clips at most, or its smallest
    group; at least one group stays.

    A group counts to the class of its first clip.
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
