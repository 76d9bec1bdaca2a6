"""probe.py against scikit-learn on the same features, and what C is chosen on."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from clip4vla.errors import UserError
from clip4vla.evaluation import linear_probe


def features(n=240, d=12, classes=5, seed=0):
    """Unit vectors around overlapping class centres, away from the origin as CLIP's are."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    y[:classes] = range(classes)
    x = rng.normal(size=(classes, d))[y] + 1.2 * rng.normal(size=(n, d)) + 3
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).float(), torch.from_numpy(y)


@pytest.mark.parametrize("strength", [0.01, 1, 100, 1e4])
@pytest.mark.parametrize("classes", [2, 5])
def test_it_is_scikit_learns(strength, classes):
    x, y = features(classes=classes)
    same = strength * (2 if classes == 2 else 1)  # one vector w there, w/2 and -w/2 here: half the penalty
    theirs = LogisticRegression(C=same, solver="newton-cholesky", tol=1e-10).fit(x.double().numpy(), y.numpy())
    p = linear_probe.fit(x, y, classes, strength, tolerance=1e-9).log_probabilities(x).exp()
    assert np.abs(p.numpy() - theirs.predict_proba(x.double().numpy())).max() < 2e-5


def test_a_start_elsewhere_ends_at_the_same_place():
    x, y = features()
    alone = linear_probe.fit(x, y, 5, 1000, tolerance=1e-9)
    warm = linear_probe.fit(x, y, 5, 1000, linear_probe.fit(x, y, 5, 1), tolerance=1e-9)
    assert (alone.log_probabilities(x).exp() - warm.log_probabilities(x).exp()).abs().max() < 2e-5


def test_the_usual_tolerance_is_near_enough():
    x, y = features(n=400, d=30)
    usual, exact = linear_probe.fit(x, y, 5, 100), linear_probe.fit(x, y, 5, 100, tolerance=1e-10)
    assert (usual.log_probabilities(x).exp() - exact.log_probabilities(x).exp()).abs().max() < 2e-4


def test_classes_without_a_clip_are_never_guessed():
    x, y = features()
    found = linear_probe.fit(x, y, 7, 10).log_probabilities(x)
    assert found.shape == (240, 7) and set(found.argmax(1).tolist()) <= set(range(5))


def test_strength_is_that_of_the_best_held_out_accuracy():
    """Chosen again by hand with scikit-learn."""
    x, y = features(seed=1)
    held = torch.arange(len(y)) % 5 == 0
    strengths = [1e4, 0.001, 0.1, 10]
    scores = {
        c: LogisticRegression(C=c, tol=1e-10, max_iter=100000)
        .fit(x[~held].double().numpy(), y[~held].numpy())
        .score(x[held].double().numpy(), y[held].numpy())
        for c in sorted(strengths)
    }
    assert len(set(scores.values())) > 2
    best = linear_probe.fit_select_C(x, y, 5, strengths, held)
    assert best.strength == max(scores, key=scores.get)
    alone = linear_probe.fit(x, y, 5, best.strength)
    assert (best.log_probabilities(x).exp() - alone.log_probabilities(x).exp()).abs().max() < 2e-4
    few = linear_probe.fit_select_C(x, y, 5, strengths, held, again=False)
    alone = linear_probe.fit(x[~held], y[~held], 5, few.strength)
    assert (few.log_probabilities(x).exp() - alone.log_probabilities(x).exp()).abs().max() < 5e-3


def test_of_equal_strengths_the_largest_penalty():
    x, y = torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]]), torch.tensor([0, 1, 0, 1])
    assert linear_probe.fit_select_C(x, y, 2, [100, 1, 10], torch.tensor([False, False, True, True])).strength == 1


def test_held_part_is_a_fifth_of_each_class_by_whole_groups():
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(0, 6, 600))
    groups = [f"{label}-{n}" for label, n in zip(y.tolist(), rng.integers(0, 30, 600), strict=True)]
    held = linear_probe.group_holdout(y, groups, 3)
    for label in range(6):
        assert 0.12 < held[y == label].float().mean() <= 0.2
    inside = {group for group, h in zip(groups, held, strict=True) if h}
    assert not inside & {group for group, h in zip(groups, held, strict=True) if not h}
    assert torch.equal(held, linear_probe.group_holdout(y, groups, 3)) and not torch.equal(
        held, linear_probe.group_holdout(y, groups, 4)
    )


def test_a_class_with_two_groups_gives_one():
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    held = linear_probe.group_holdout(y, list("abcdeef"), 0)
    assert held[:4].sum() == 1 and held[4:].tolist() == [False, False, True]


def test_nothing_to_choose_by_is_said():
    y = torch.tensor([0, 0, 1])
    held = linear_probe.group_holdout(y, ["a", "a", "b"], 0)
    assert not held.any()
    with pytest.raises(UserError, match="give classify.C a single one"):
        linear_probe.fit_select_C(torch.eye(3), y, 2, [1, 10], held)
    assert linear_probe.fit_select_C(torch.eye(3), y, 2, [10], held).strength == 10
