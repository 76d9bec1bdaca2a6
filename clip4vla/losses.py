"""NCE_at, NCE_av, NCE_aa, equations (1)-(5), exact over the clips of all ranks, in tiles of bounded memory; and (7).

Every rank holds b rows of the global batch of N. Features are gathered once, without gradient; a rank computes its own rows
of the similarity matrix in tiles and keeps their log-sum-exps. Those of the columns are put together from all ranks' rows by
two all-reduces of N numbers. The gradient of a rank's own rows needs the gathered features and log-sum-exps, and nothing of
other ranks' gradients: no N x N matrix, no N x D gradient traffic. In one process a term takes 4 products of N x N x D (one
forward, three backward), where the matrix kept in memory takes 6; on several ranks it takes 5.
Only scores that a head has already (scored_nce) are gathered as the N x N numbers they are.
The engine averages gradients over ranks, so values are scaled by the world size: their mean over ranks is the loss.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from clip4vla import distributed
from clip4vla.batch import Labels
from clip4vla.config import LossConfig

TILE = {
    "cpu": 1 << 20,
    "cuda": 1 << 25,
}  # elements of the similarity matrix held at once: a cache's, and enough for a GPU
PAIRS = {
    "at": ("text", "audio"),
    "av": ("vision", "audio"),
    "aa": ("audio", "masked"),
    "tv": ("text", "vision"),
    "tm": ("text", "media"),
}
LEARNT = ("caption", "label")  # cross entropies
TERMS = (*PAIRS, *LEARNT)  # what can have a weight


def features_used(cfg: LossConfig) -> list[str]:
    """The features that the terms with a weight compare."""
    used = {name for term, pair in PAIRS.items() if getattr(cfg, term) for name in pair}
    return [name for name in ("text", "vision", "audio", "masked", "media") if name in used]


def bytes_sent(cfg: LossConfig, b: int, n: int, dim: int, scored: bool = False) -> int:
    """Bytes that each of several ranks puts into collectives for its b of n rows; F features of width D, T terms, fp32:

    4 b D F (features) + b T (valid) + 12 b T (positives, log-sum-exps) + 8 N T (columns' maxima and sums) + 8 b (groups, if any)

    scored: the term of text and media has scores instead: 4 b N (they) + 4 N N (their gradient) + b (valid) + 8 b (groups)
    """
    if scored:
        rest = bytes_sent(replace(cfg, tm=0.0), b, n, dim)
        return rest + 4 * n * (b + n) + b * (1 + 8 * cfg.exclude_same_group)
    terms = sum(bool(getattr(cfg, term)) for term in PAIRS)
    groups = 8 * cfg.exclude_same_group * bool(terms)
    return b * (4 * dim * len(features_used(cfg)) + 13 * terms + groups) + 8 * n * terms


class Term(NamedTuple):
    """Symmetric InfoNCE between two of the features, by number.

    valid (b,) says which rows take part, as row and as negative; the mean is over those of all ranks, 0 without any.
    intra adds exp(a_i . a_k), k != i, to the denominator of row a_i, and its mirror image to that of b_i: (3) and (4).
    one_way: the rows of a find those of b, not the other way round; else the mean of both.
    """

    a: int
    b: int
    valid: Tensor
    intra: bool = False
    one_way: bool = False


def info_nce(
    a: Tensor, b: Tensor, scale: Tensor, valid: Tensor, group: Tensor | None = None, intra: bool = False
) -> Tensor:
    """One Term between the rows of a and b, (b, D) unit vectors of this rank; logits are scale * cosine.

    group (b,) int64: other rows of the same group are no negatives.
    """
    return info_nces([a, b], scale, [Term(0, 1, valid, intra)], group)[0]


def scored_nce(
    scores: Tensor, scale: Tensor, valid: Tensor, group: Tensor | None = None, one_way: bool = False
) -> Tensor:
    """As info_nce, of scores (b, N) that are there already: own rows, the columns of all ranks. Gathers N x N numbers."""
    everyone = scale * distributed.gather_with_gradient(scores.to(torch.promote_types(scores.dtype, torch.float32)))
    valid_all, size = distributed.gather(valid), len(valid)
    missing = ~(valid_all[:, None] & valid_all)
    if group is not None:
        groups = distributed.gather(group)
        missing |= (groups[:, None] == groups) & ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    mine = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    low = torch.finfo(
        everyone.dtype
    ).min  # not -inf: the rows of what does not take part would be NaN, and so their gradient
    logits = everyone.masked_fill(missing, low)
    found = [logits[mine].log_softmax(1), logits[:, mine].T.log_softmax(1)][: 1 if one_way else 2]
    rows = torch.stack([-side.diagonal(mine.start) for side in found]).mean(0)
    return distributed.world() * rows.masked_fill(~valid, 0).sum() / valid_all.sum().clamp(min=1)


def info_nces(
    features: list[Tensor], scale: Tensor, terms: list[Term], group: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The value of each term, over features (b, D) that are gathered once."""
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    return _InfoNCE.apply(scale.to(dtype), terms, group, *(x.to(dtype) for x in features))


def objective(
    features: dict[str, Tensor],
    labels: Labels,
    cfg: LossConfig,
    modalities: str = "av",
    taught: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms by name, and their weighted sum under `loss`. features: as Model.forward gives them for these modalities.

    taught: words of the captions, or labels, of all ranks: `caption` or `label`, cross entropy in nats, is the mean over them.
    """
    has = {"text": labels.has_text, "vision": labels.has_frames, "audio": labels.has_audio, "masked": labels.has_audio}
    has["media"] = (labels.has_frames & ("v" in modalities)) | (labels.has_audio & ("a" in modalities))
    weights = {name: getattr(cfg, name) for name in TERMS if getattr(cfg, name)}
    group, one_way = labels.group if cfg.exclude_same_group else None, cfg.directions != "both"
    scored = ["tm"] * ("scores" in features)
    used = [name for name in features_used(cfg) if name in features]
    pairs = {name: PAIRS[name] for name in weights if name in PAIRS and name not in scored}
    terms = [
        Term(used.index(a), used.index(b), has[a] & has[b], name == "aa", name == "tm" and one_way)
        for name, (a, b) in pairs.items()
    ]
    losses = {}
    if terms:
        values = info_nces([features[name] for name in used], features["scale"], terms, group)
        losses = dict(zip(pairs, values, strict=True))
    if scored:
        valid = has["text"] & has["media"]
        losses["tm"] = scored_nce(features["scores"], features["scale"], valid, group, one_way)
    for name in LEARNT:
        if getattr(cfg, name):
            assert taught is not None
            losses[name] = distributed.world() * features["nll"].sum() / taught
    return losses | {"loss": sum(weights[name] * value for name, value in losses.items())}


class _InfoNCE(torch.autograd.Function):
    """info_nces with its own backward pass."""

    @staticmethod
    def forward(ctx, scale, terms, group, *own):
        with torch.autocast(own[0].device.type, enabled=False):
            everyone = _gathered(own)
            valid = distributed.gather(torch.stack([term.valid for term in terms], 1))  # N T
            group = None if group is None else (group, distributed.gather(group))
            ctx.pairs = [_Pair(own, everyone, scale, group, t, v) for t, v in zip(terms, valid.T, strict=True)]
            values = tuple(pair.value() for pair in ctx.pairs)
        ctx.save_for_backward(scale, *own)
        return values

    @staticmethod
    def backward(ctx, *grads):
        scale, *own = ctx.saved_tensors
        by_feature = [torch.zeros_like(x) for x in own]
        with torch.autocast(own[0].device.type, enabled=False):
            for pair, grad in zip(ctx.pairs, grads, strict=True):
                pair.add_gradient(by_feature, grad * distributed.world() * scale)
            # every logit is scale times a product of two features: summed over ranks, each pair is counted from both sides
            by_scale = sum(_dots(x, g).sum() for x, g in zip(own, by_feature, strict=True)) / (2 * scale)
        return by_scale, None, None, *by_feature


def _gathered(own: tuple[Tensor, ...]) -> list[Tensor]:
    """Each feature's rows of all ranks, in one collective."""
    if distributed.world() == 1:
        return list(own)
    return [x.contiguous() for x in distributed.gather(torch.cat(own, 1)).split([x.shape[1] for x in own], 1)]


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows, (b,) of (b, D), without a copy of them."""
    return (a[:, None] @ b[:, :, None]).flatten()


class _Pair:
    """One term as this rank sees it: its rows of both sides, and the columns of all ranks."""

    def __init__(self, own, everyone, scale, group, term: Term, valid: Tensor):
        self.own, self.everyone = (own[term.a], own[term.b]), (everyone[term.a], everyone[term.b])
        self.term, self.scale, self.group, self.valid = term, scale, group, valid
        self.rows = len(term.valid)
        self.first = distributed.rank() * self.rows
        self.masked = valid.device.type != "cpu" or not bool(valid.all())  # on a GPU asking would cost a wait
        count = valid.sum().clamp(min=1)
        self.weight = valid.to(scale.dtype) / count  # of a row in the mean, which the sides share
        self.share = (1.0, 0.0) if term.one_way else (0.5, 0.5)
        # set by value(), for all N rows: the positive logit, and, of each side, log-sum-exp above it less the log of the weight
        self.base, self.shift = valid, [valid, valid]

    def mine(self, x: Tensor) -> Tensor:
        """This rank's part of N numbers."""
        return x[self.first : self.first + self.rows]

    def value(self) -> Tensor:
        """The loss, times the world size; keeps the log-sum-exps.

        Those of own rows are taken above the positive logit of each: as sums of large numbers they would lose their digits.
        """
        self.positive = torch.zeros_like(self.mine(self.weight))
        row, column = self._sums(0, 1)
        above = [self._above(*row), self._above(*map(self.mine, column))]
        if self.term.intra:
            above = [torch.logaddexp(above[side], self._above(*self._sums(side, side)[0])) for side in (0, 1)]
        *sides, self.base = distributed.gather(torch.stack([*above, self.positive], 1)).T
        logs = [(share * self.weight).log() for share in self.share]
        self.shift = [(side - log).masked_fill(~self.valid, torch.inf) for side, log in zip(sides, logs, strict=True)]
        rows = torch.stack([share * side for share, side in zip(self.share, above, strict=True)]).sum(0)
        rows = rows.masked_fill(~self.term.valid, 0)
        return distributed.world() * (self.mine(self.weight) * rows).sum()

    def _above(self, peak: Tensor, total: Tensor) -> Tensor:
        return (peak - self.positive) + total.log()

    def _sums(self, side: int, keys: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(peak, total) of own rows of `side` over all of `keys`, (b,), and of all of `keys` over the rows of all ranks, (N,).

        total is the sum of exp(logit - peak). Keeps the positive logits, where the keys are partners.
        """
        low = torch.finfo(self.scale.dtype).min
        peak = [self.weight.new_full((n,), low) for n in (self.rows, len(self.valid))]
        total = [torch.zeros_like(p) for p in peak]
        for rows, columns, logits in self._tiles(side, keys):
            if side != keys:
                positives = self._partners(logits, rows, columns)
                start = max(columns.start - self.first, rows.start)
                self.positive[start : start + len(positives)] = positives.nan_to_num(neginf=0.0)  # not of invalid rows
            for place, part, along in ((0, rows, 1), (1, columns, 0))[: 1 + (side != keys)]:
                old = peak[place][part]
                new = torch.maximum(old, logits.amax(along))
                grown = (logits - new.unsqueeze(along)).exp_().sum(along)
                total[place][part] = total[place][part] * (old - new).exp() + grown
                peak[place][part] = new
        if side != keys and distributed.world() > 1:
            highest = distributed.all_max(peak[1])
            total[1] = distributed.all_sum(total[1] * (peak[1] - highest).exp())
            peak[1] = highest
        return (peak[0], total[0]), (peak[1], total[1])

    def _tiles(self, side: int, keys: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """(own rows, columns, their logits); pairs that do not count have -inf."""
        size = TILE[self.weight.device.type]
        height = min(self.rows, max(1, math.isqrt(size) // 2))
        width = max(1, size // height)
        for top in range(0, self.rows, height):
            rows = slice(top, min(self.rows, top + height))
            scaled = self.scale * self.own[side][rows]
            for left in range(0, len(self.valid), width):
                columns = slice(left, min(len(self.valid), left + width))
                logits = scaled @ self.everyone[keys][columns].T
                yield rows, columns, self._mask(logits, rows, columns, side == keys)

    def _mask(self, logits: Tensor, rows: slice, columns: slice, intra: bool) -> Tensor:
        partners = self._partners(logits, rows, columns)
        if self.group is not None:
            kept = partners.clone()
            logits.masked_fill_(self.group[0][rows, None] == self.group[1][columns], -torch.inf)
            partners.copy_(kept)
        if self.masked:
            logits.masked_fill_(~self.valid[columns], -torch.inf)
            logits.masked_fill_(~self.term.valid[rows, None], -torch.inf)
        if intra:
            partners.fill_(-torch.inf)
        return logits

    def _partners(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        """The elements of a tile that pair a clip with itself, a view."""
        return tile.diagonal(self.first + rows.start - columns.start)

    def add_gradient(self, by_feature: list[Tensor], factor: Tensor) -> None:
        """Add factor times the gradient of the value by scale * own rows to `by_feature`, in place."""
        out = by_feature[self.term.a], by_feature[self.term.b]
        alone = distributed.world() == 1
        self._add(out, factor, 0, 1, both=alone)
        if not alone:
            self._add(out, factor, 1, 0)
        if self.term.intra:
            self._add(out, factor, 0, 0)
            self._add(out, factor, 1, 1)

    def _add(self, out: tuple[Tensor, Tensor], factor: Tensor, side: int, keys: int, both: bool = False) -> None:
        """Add to out[side] what own rows gain as rows of their own denominators and as columns of everybody else's.

        both: the columns are own rows too, and gain the same from the transposed tiles.
        """
        for rows, columns, logits in self._tiles(side, keys):
            pull = (logits - self.positive[rows, None]).sub_(self.mine(self.shift[side])[rows, None]).exp_()
            pull += logits.sub_(self.base[columns]).sub_(self.shift[keys][columns]).exp_()
            if side != keys:
                positives = self._partners(pull, rows, columns)
                start = max(columns.start, self.first + rows.start)
                positives -= self.weight[start : start + len(positives)]
            pull *= factor
            out[side][rows].addmm_(pull, self.everyone[keys][columns])
            if both:
                out[keys][columns].addmm_(pull.T, self.own[side][rows])
