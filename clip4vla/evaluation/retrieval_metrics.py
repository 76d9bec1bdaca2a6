"""Rank a gallery for queries, in tiles: ranks, R@k, median rank, their intervals, and a permutation test.

Shapes: Q queries, G gallery items, D width, U groups. Items are right answers of the queries of their group. Queries and
gallery are vectors (Q, D), (G, D); or scores (Q, G) that are there already and the numbers (G,) of their columns. A
similarity is a dot product summed in float64 and rounded to float32: equal vectors then have equal scores wherever they
lie (a float32 matmul rounds by position, which breaks ties at random), so that results do not depend on the tile size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip4vla.errors import UserError

NO_ANSWER = "retrieval: no query has a right answer in the gallery; check that the data has both modalities"


def best_rank(query: Tensor, gallery: Tensor, query_group: Tensor, gallery_group: Tensor, tile: int = 4096) -> Tensor:
    """Compute the rank (Q,) float64 of the best right answer of each query (Q, D) in a gallery (G, D); 1 is first.

    1 + wrong items that score higher + half of those that score the same; NaN where the gallery has no right answer.
    Memory: a few matrices of tile x tile, and a copy of the gallery. Raises ValueError on features that are not finite.
    """
    _check_finite(query, gallery)
    order = gallery_group.argsort()  # both sides sorted by group: right answers fill few tiles
    tiles = list(zip(gallery[order].split(tile), gallery_group[order].split(tile), strict=True))
    ranks = torch.empty(len(query), dtype=torch.float64, device=query.device)
    for rows in query_group.argsort().split(tile):
        ranks[rows] = _rank_rows(query[rows], query_group[rows, None], tiles)
    return ranks


def _rank_rows(query: Tensor, group: Tensor, tiles: list[tuple[Tensor, Tensor]]) -> Tensor:
    best = torch.full((len(query), 1), -torch.inf, device=query.device)
    for items, item_group in tiles:
        right = group == item_group
        if right.any():
            score = _similarity(query, items).masked_fill_(~right, -torch.inf)
            best = torch.maximum(best, score.amax(1, keepdim=True))
    rank = torch.ones(len(query), dtype=torch.float64, device=query.device)
    for items, item_group in tiles:
        wrong = _similarity(query, items).masked_fill_(group == item_group, -torch.inf)
        better, equal = (compare(wrong, best).sum(1, dtype=torch.int32) for compare in (torch.gt, torch.eq))
        rank += better + 0.5 * equal
    return rank.masked_fill(best[:, 0] == -torch.inf, torch.nan)


def summary(ranks: Tensor, n_gallery: int, p: float | None) -> dict[str, float | int | None]:
    """Compute R@1, R@5, R@10 (percent), MedR, MeanR, n_queries, n_gallery and p of ranks (Q,); NaN ranks do not count.

    Raises UserError when no rank is left.
    """
    values = ranks.cpu().numpy()
    values = values[~np.isnan(values)]
    if not len(values):
        raise UserError(NO_ANSWER)
    recall = {f"R@{k}": 100 * float((values <= k).mean()) for k in (1, 5, 10)}
    middle = {"MedR": float(np.median(values)), "MeanR": float(values.mean())}
    return {**recall, **middle, "n_queries": len(values), "n_gallery": n_gallery, "p_value": p}


def permutation_p(
    query: Tensor,
    gallery: Tensor,
    query_group: Tensor,
    gallery_group: Tensor,
    permutations: int,
    seed: int,
    max_queries: int = 2000,
) -> float:
    """Compute the one-sided p of the mean reciprocal rank, (1 + #{permuted >= observed}) / (1 + permutations).

    Under the null hypothesis it does not matter which group of queries has which right answers: whole groups exchange
    them. Queries without a right answer are left out, and of more than max_queries a sample drawn by seed is tested.
    Raises UserError when no query has a right answer, ValueError on features that are not finite.
    """
    _check_finite(query, gallery)
    rng = np.random.default_rng(seed)
    usable = torch.isin(query_group, gallery_group).nonzero()[:, 0].cpu().numpy()
    if not len(usable):
        raise UserError(NO_ANSWER)
    chosen = torch.from_numpy(np.sort(rng.permutation(usable)[:max_queries])).to(query.device)
    groups, own = query_group[chosen].unique(return_inverse=True)
    gain = torch.zeros(len(groups), len(groups), dtype=torch.float64, device=query.device)
    for rows in torch.arange(len(chosen), device=query.device).split(64):
        gain.index_add_(0, own[rows], 1 / _group_ranks(query[chosen[rows]], gallery, groups, gallery_group))
    table, each = gain.cpu().numpy(), np.arange(len(groups))  # [u, v]: sum of 1/rank if group u's answers were v's
    permuted = np.array([table[each, rng.permutation(each)].sum() for _ in range(permutations)])
    above = int((permuted >= table.trace() * (1 - 1e-12)).sum())  # sums of equal numbers in another order are ties
    return (1 + above) / (1 + permutations)


def _group_ranks(query: Tensor, gallery: Tensor, groups: Tensor, gallery_group: Tensor) -> Tensor:
    """Compute the rank (Q, U) of a query's best right answer if the query belonged to group u of the sorted groups (U,)."""
    scores = torch.cat([_similarity(query, items) for items in gallery.split(4096)], 1)  # Q G
    inside = torch.isin(gallery_group, groups)
    index = torch.searchsorted(groups, gallery_group[inside]).expand(len(query), -1)
    best = scores.new_full((len(query), len(groups)), -torch.inf)
    best.scatter_reduce_(1, index, scores[:, inside], "amax")
    own_ties = torch.zeros_like(best).scatter_add_(1, index, (scores[:, inside] == best.gather(1, index)).float())
    ordered = scores.sort(1).values
    below, upto = (torch.searchsorted(ordered, best, right=right) for right in (False, True))
    return 1 + (scores.shape[1] - upto) + 0.5 * (upto - below - own_ties.double())


def scores(query: Tensor, gallery: Tensor) -> Tensor:
    """Compute all similarities (Q, G) float32, for as many queries as a person looks at."""
    return _similarity(query, gallery)


def top_k(query: Tensor, gallery: Tensor, k: int, tile: int = 4096) -> tuple[Tensor, Tensor]:
    """Find the k best items of each query: scores (Q, k) float32, highest first, and gallery indices (Q, k); k is cut to G.

    As torch.topk of the whole matrix, which of equal scores comes first is not defined.
    """
    parts = [_top_k_rows(rows, gallery, min(k, len(gallery)), tile) for rows in query.split(tile)]
    return torch.cat([scores for scores, _ in parts]), torch.cat([indices for _, indices in parts])


def _top_k_rows(query: Tensor, gallery: Tensor, k: int, tile: int) -> tuple[Tensor, Tensor]:
    scores = torch.empty(len(query), 0, device=query.device)
    indices = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(gallery), tile):
        items = gallery[start : start + tile]
        new_scores, new_indices = _similarity(query, items).topk(min(k, len(items)), 1)
        scores = torch.cat([scores, new_scores], 1)
        indices = torch.cat([indices, new_indices + start], 1)
        scores, kept = scores.topk(min(k, scores.shape[1]), 1)
        indices = indices.gather(1, kept)
    return scores, indices


def evaluate(
    query: Tensor,
    gallery: Tensor,
    query_group: Tensor,
    gallery_group: Tensor,
    permutations: int,
    seed: int = 0,
    resamples: int = 0,
) -> dict[str, Any]:
    """Evaluate one direction: summary() of the ranks, `chance`, p and the bootstrap intervals `ci`.

    p is None when permutations is 0, and `ci` is left out when resamples is 0.
    """
    ranks = best_rank(query, gallery, query_group, gallery_group)
    result: dict[str, Any] = summary(ranks, len(gallery), None) | {"chance": chance(query_group, gallery_group)}
    if resamples:
        result["ci"] = intervals(ranks, query_group, resamples, seed)
    if permutations:
        result["p_value"] = permutation_p(query, gallery, query_group, gallery_group, permutations, seed)
    return result


def chance(query_group: Tensor, gallery_group: Tensor) -> dict[str, float]:
    """Compute R@1, R@5, R@10 (percent) of a gallery in random order: the mean of 1 - C(G - r, k) / C(G, k).

    r: a query's right answers; queries without any do not count.
    """
    counts = dict(zip(*(x.tolist() for x in gallery_group.unique(return_counts=True)), strict=True))
    right, size = np.array([counts[g] for g in query_group.tolist() if g in counts]), len(gallery_group)
    missed = {
        k: np.prod([np.clip((size - right - i) / max(size - i, 1), 0, None) for i in range(k)], 0) for k in (1, 5, 10)
    }
    return {f"R@{k}": 100 * float(1 - missed[k].mean()) for k in missed}


def intervals(ranks: Tensor, group: Tensor, resamples: int, seed: int) -> dict[str, list[float]]:
    """Estimate 95% bootstrap intervals [low, high] of the numbers of summary(), from ranks (Q,) and their groups (Q,).

    Whole groups are drawn with replacement: the captions of one clip are no independent queries. NaN ranks do not count.
    """
    answered = ~ranks.isnan()
    ordered, order = ranks[answered].cpu().sort()
    groups, own = group[answered].cpu()[order].unique(return_inverse=True)
    rng, numbers = np.random.default_rng(seed), []
    for chunk in torch.arange(resamples).split(max(1, 2**22 // len(ordered))):  # 32 MiB a matrix
        drawn = torch.from_numpy(rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), len(chunk)))
        numbers.append(_weighted_summary(ordered, drawn[:, own].double()))
    limits = torch.cat(numbers).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)  # 2 5
    return {name: limits[:, i].tolist() for i, name in enumerate(("R@1", "R@5", "R@10", "MedR", "MeanR"))}


def _weighted_summary(ordered: Tensor, weight: Tensor) -> Tensor:
    """Compute R@1, R@5, R@10, MedR and MeanR (R, 5) of R resamples of sorted ranks (Q,).

    weight (R, Q) float64: how often each resample holds each rank.
    """
    upto = weight.cumsum(1)  # R Q: ranks of the resample that are not above this one
    total = upto[:, -1:].contiguous()  # R 1
    recall = [100 * weight[:, ordered <= k].sum(1, keepdim=True) / total for k in (1, 5, 10)]
    low = ordered[torch.searchsorted(upto, (total / 2).ceil())]  # the two middle ranks, which of an odd number are one
    high = ordered[torch.searchsorted(upto, (total / 2).floor(), right=True)]
    mean = (weight @ ordered)[:, None] / total
    return torch.cat([*recall, (low + high) / 2, mean], 1)


def mean_average_precision(scores: Tensor, target: Tensor) -> float:
    """Compute the mean over the classes of target (n,) of average precision, 0..1, of n clips ranked by scores (n, K).

    Of clips with equal scores the first comes first.
    """
    precisions = []
    for number in target.unique().tolist():
        right = (target == number)[scores[:, number].argsort(descending=True, stable=True)].double()
        precisions.append(float((right * right.cumsum(0) / torch.arange(1, len(right) + 1)).sum() / right.sum()))
    return float(np.mean(precisions))


def rank_classes(scores: Tensor, target: Tensor) -> list[tuple[float, float]]:
    """Compute (average precision, area under the ROC curve), 0..1, of n clips ranked for each of K classes.

    scores (n, K), target (n, K) bool; clips of equal scores share a rank, as scikit-learn has it. NaN for a class without
    clips, and the area also for one that all clips have.
    """
    figures = []
    for score, right in zip(scores.T, target.T, strict=True):
        order = score.argsort(descending=True)
        last = torch.cat([score[order].diff() != 0, torch.ones(1, dtype=torch.bool)])  # of the clips of one score
        true = right[order].cumsum(0)[last].double()
        ranked = torch.arange(1, len(order) + 1)[last].double()
        recall, fallout = true / true[-1], (ranked - true) / (ranked[-1] - true[-1])
        precision = float((recall.diff(prepend=recall.new_zeros(1)) * true / ranked).sum())
        zero = recall.new_zeros(1)
        area = float(torch.trapezoid(torch.cat([zero, recall]), torch.cat([zero, fallout])))
        figures.append((precision, area))
    return figures


def d_prime(area: float) -> float:
    """Compute d' = sqrt(2) Phi^-1(area): how many deviations apart two normal distributions of scores with that area are.

    AudioSet gives it of the mean area of the classes (Gemmeke et al. 2017). An area of 0 or 1 would have no finite one: it is
    held 1e-9 away.
    """
    held = torch.tensor(area, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    return float(2**0.5 * torch.special.ndtri(held))


def table(metrics: dict[str, dict]) -> str:
    """Format the metrics as text, one direction a line."""
    head = (
        f"{'direction':<24}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'MedR':>8}{'MeanR':>8}{'queries':>9}{'gallery':>9}{'p':>9}"
    )
    return "\n".join([head, *(
        f"{name:<24}{m['R@1']:>7.1f}{m['R@5']:>7.1f}{m['R@10']:>7.1f}{m['MedR']:>8.1f}{m['MeanR']:>8.1f}"
        f"{m['n_queries']:>9}{m['n_gallery']:>9}{'' if m['p_value'] is None else format(m['p_value'], '.4f'):>9}"
        for name, m in metrics.items()
    )])  # fmt: skip


@torch.no_grad()
def _similarity(query: Tensor, items: Tensor) -> Tensor:
    if items.ndim == 1:  # scores that are there already
        return query[:, items].float()
    return (query.double() @ items.double().T).float()


def _check_finite(query: Tensor, gallery: Tensor) -> None:
    for name, features in (("query", query), ("gallery", gallery)):
        if not features.isfinite().all():  # NaN compares false with everything: each query would seem to rank first
            raise ValueError(f"retrieval: {name} features hold NaN or infinite values")
