"""Ranks against a brute force in numpy, scikit-learn and scipy; memory; and the permutation test's behaviour."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom, kstest, rankdata
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score, top_k_accuracy_score

from clip4vla.errors import UserError
from clip4vla.evaluation.retrieval_metrics import (
    _group_ranks,
    best_rank,
    chance,
    evaluate,
    intervals,
    mean_average_precision,
    permutation_p,
    summary,
    top_k,
)


def brute_force(query, gallery, query_group, gallery_group):
    """The definition, one query at a time."""
    ranks = []
    for features, group in zip(query.astype(np.float64), query_group, strict=True):
        scores, right = gallery.astype(np.float64) @ features, gallery_group == group
        best = scores[right].max() if right.any() else np.nan
        rank = 1 + (scores[~right] > best).sum() + 0.5 * (scores[~right] == best).sum()
        ranks.append(rank if right.any() else np.nan)
    return np.array(ranks)


@st.composite
def cases(draw):
    """Small integers as features, so that ties abound; some groups have several right answers and some have none."""
    n_query, n_gallery, width = draw(st.integers(1, 20)), draw(st.integers(1, 25)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    features = [rng.integers(-2, 3, (n, width)).astype(np.float32) for n in (n_query, n_gallery)]
    return *features, rng.integers(0, 12, n_query), rng.integers(3, 12, n_gallery)


def tensors(*arrays):
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def random_case(n_query=300, n_gallery=250, width=16, groups=40, signal=0.0, seed=0):
    """Unit vectors; signal is the weight of a direction that query and gallery items of a group share."""
    torch.manual_seed(seed)
    centres = torch.randn(groups, width)
    query_group, gallery_group = torch.randint(groups, (n_query,)), torch.randint(groups, (n_gallery,))
    query, gallery = (signal * centres[g] + torch.randn(len(g), width) for g in (query_group, gallery_group))
    unit = torch.nn.functional.normalize
    return unit(query, dim=1), unit(gallery, dim=1), query_group, gallery_group


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 9))
def test_ranks_equal_the_brute_force_for_any_tile(case, tile):
    np.testing.assert_array_equal(best_rank(*tensors(*case), tile=tile).numpy(), brute_force(*case))


def test_ranks_of_float_features_do_not_depend_on_the_tile():
    query, gallery, query_group, gallery_group = random_case(500, 400, 64)
    gallery = torch.cat([gallery, gallery[:200]])  # equal vectors, half of them wrong answers: ties
    gallery_group = torch.cat([gallery_group, gallery_group[:200].roll(1)])
    ranks = [best_rank(query, gallery, query_group, gallery_group, tile) for tile in (7, 64, 100, 4096)]
    assert all(torch.equal(ranks[0], other) for other in ranks)
    assert (ranks[0] % 1 == 0.5).any()


def test_one_right_answer_is_ranked_as_scipy_does():
    query, gallery, *_ = tensors(*np.random.default_rng(0).integers(-2, 3, (2, 60, 3)).astype(np.float32))
    places = rankdata(-(query @ gallery.T).numpy(), axis=1, method="average").diagonal()
    np.testing.assert_array_equal(best_rank(query, gallery, torch.arange(60), torch.arange(60)).numpy(), places)


def test_summary_agrees_with_scikit_learn():
    query, gallery, _, _ = random_case(200, 80)
    truth = torch.arange(200) % 80
    result = evaluate(query, gallery, truth, torch.arange(80), 0)
    scores = (query @ gallery.T).numpy()
    for k in (1, 5, 10):
        assert result[f"R@{k}"] == pytest.approx(100 * top_k_accuracy_score(truth, scores, k=k, labels=range(80)))
    ranks = best_rank(query, gallery, truth, torch.arange(80)).numpy()
    one_hot = np.eye(80, dtype=int)[truth]
    assert (1 / ranks).mean() == pytest.approx(label_ranking_average_precision_score(one_hot, scores))
    assert result["MedR"] == np.median(ranks) and result["MeanR"] == pytest.approx(ranks.mean())
    assert list(result) == ["R@1", "R@5", "R@10", "MedR", "MeanR", "n_queries", "n_gallery", "p_value", "chance"]
    assert (result["n_queries"], result["n_gallery"], result["p_value"]) == (200, 80, None)


def test_queries_without_an_answer_are_left_out():
    result = summary(torch.tensor([1.0, torch.nan, 7.0, 1.5], dtype=torch.float64), 9, 0.25)
    assert result["n_queries"] == 3 and result["R@1"] == pytest.approx(100 / 3) and result["MedR"] == 1.5
    nothing = torch.eye(3), torch.eye(3), torch.zeros(3).long(), torch.ones(3).long()
    for call in (lambda: evaluate(*nothing, 0), lambda: permutation_p(*nothing, 9, 0)):
        with pytest.raises(UserError, match="no query has a right answer"):
            call()


@pytest.mark.parametrize("side", [0, 1])
def test_features_that_are_not_finite_are_refused(side):
    case = random_case()
    case[side][3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate(*case, 10)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 30), st.integers(1, 9))
def test_top_k_equals_topk_of_the_whole_matrix(case, k, tile):
    query, gallery, *_ = tensors(*case)
    scores, indices = top_k(query, gallery, k, tile)
    expected = (query @ gallery.T).topk(min(k, len(gallery)), 1).values
    assert torch.equal(scores, expected)
    assert torch.equal((query @ gallery.T).gather(1, indices), expected)
    assert all(len(set(row)) == len(row) for row in indices.tolist())


@settings(max_examples=60, deadline=None)
@given(cases())
def test_permuted_ranks_equal_the_brute_force(case):
    query, gallery, _, gallery_group = case
    groups = np.unique(gallery_group)[::2]
    ranks = _group_ranks(*tensors(query, gallery, groups, gallery_group)).numpy()
    for column, group in enumerate(groups):
        expected = brute_force(query, gallery, np.full(len(query), group), gallery_group)
        np.testing.assert_array_equal(ranks[:, column], expected)


def test_scores_that_are_there_already_rank_as_the_vectors_that_gave_them():
    query, gallery, query_group, gallery_group = random_case()
    scores, columns = (query.double() @ gallery.double().T).float(), torch.arange(len(gallery))
    groups = query_group, gallery_group
    assert evaluate(scores, columns, *groups, 99, 0, 50) == evaluate(query, gallery, *groups, 99, 0, 50)
    for got, want in zip(top_k(scores, columns, 7, 60), top_k(query, gallery, 7, 60), strict=True):
        assert torch.equal(got, want)


def test_chance_is_hypergeometric():
    query, gallery = torch.tensor([1, 1, 2, 3, 9]), torch.tensor([1] * 3 + [2] * 20 + [3] + [4] * 6)  # 9 has no answer
    for k, got in zip((1, 5, 10), chance(query, gallery).values(), strict=True):
        assert got == pytest.approx(100 * np.mean([hypergeom(30, right, k).sf(0) for right in (3, 3, 20, 1)]))
    assert chance(torch.tensor([1]), torch.tensor([1, 2, 2]))["R@10"] == 100


def test_intervals_are_those_of_resampled_groups():
    """Against numpy on repeated queries, with the same draws; and they cover the truth as often as they say."""
    ranks = torch.tensor([1, 2, 3.5, 8, torch.nan, 20, 1, 1, 4, 12], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 5])
    rng, found = np.random.default_rng(3), []
    for _ in range(200):
        times = rng.multinomial(6, np.full(6, 1 / 6))
        found.append(np.concatenate([np.repeat(ranks[group == g].numpy(), n) for g, n in enumerate(times)]))
    found = [values[~np.isnan(values)] for values in found]
    got = intervals(ranks, group, 200, 3)
    for name, how in (("R@5", lambda v: 100 * (v <= 5).mean()), ("MedR", np.median), ("MeanR", np.mean)):
        assert got[name] == pytest.approx(np.quantile([how(v) for v in found], [0.025, 0.975]))
    inside = 0
    for seed in range(200):
        draw = np.random.default_rng(seed).integers(1, 11, 100)
        low, high = intervals(torch.from_numpy(draw).double(), torch.arange(100), 200, seed)["R@5"]
        inside += low <= 50 <= high
    assert 175 <= inside <= 199


def test_p_is_uniform_without_signal_and_small_with_it():
    values = [permutation_p(*random_case(60, 50, groups=25, seed=seed), 199, seed) for seed in range(120)]
    assert kstest(values, "uniform").pvalue > 0.01
    assert permutation_p(*random_case(signal=1.0), 999, 0) == 1 / 1000


def test_p_of_a_sample_is_repeatable_and_of_one_group_is_one():
    case = random_case(signal=0.12)
    assert permutation_p(*case, 99, 3, max_queries=50) == permutation_p(*case, 99, 3, max_queries=50)
    same = torch.zeros(10).long()
    assert permutation_p(torch.randn(10, 4), torch.randn(10, 4), same, same, 99, 0) == 1.0


LARGE = """
import re, torch
from clip4vla.evaluation.retrieval_metrics import best_rank, top_k
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
torch.manual_seed(0)
x = torch.nn.functional.normalize(torch.randn(20000, 32), dim=1)
best_rank(x[:100], x[:100], torch.arange(100), torch.arange(100))
start = peak()
ranks = best_rank(x, x, torch.arange(20000), torch.arange(20000))
top_k(x[:5000], x, 5)
assert (ranks == 1).all()
print(peak() - start)
"""


def test_memory_stays_far_below_the_full_matrix():
    """20,000 x 20,000 float32 would take 1,526 MiB."""
    output = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr
    assert float(output.stdout) < 600


def test_map_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores, target = rng.normal(size=(60, 4)), rng.integers(0, 4, 60)
    wanted = np.mean([average_precision_score(target == k, scores[:, k]) for k in range(4)])
    assert mean_average_precision(torch.from_numpy(scores), torch.from_numpy(target)) == pytest.approx(wanted)
