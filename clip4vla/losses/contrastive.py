"""NCE_at, NCE_av, NCE_aa, equations (1)-(5), exact over the clips of all ranks, in tiles of bounded memory.

Every rank holds b rows of the global batch of N. Features are gathered once, without gradient; a rank computes its own rows
of the similarity matrix in tiles and keeps their log-sum-exps. Those of the columns are put together from all ranks' rows by
two all-reduces of N numbers. The gradient of a rank's own rows needs the gathered features and log-sum-exps, and nothing of
other ranks' gradients: no N x N matrix, no N x D gradient traffic. In one process a term takes 4 products of N x N x D (one
forward, three backward), where the matrix kept in memory takes 6; on several ranks it takes 5.
Only scores that a head has computed already (nce_from_scores) are gathered as N x N numbers.
The engine averages gradients over ranks, so values are scaled by the world size: their mean over ranks is the loss.

Names: a query is a row of this rank, whose logits with the keys, the rows of all ranks, make one row of the matrix. The
positive pair of local row i is column first + i. Notation: b local rows, N rows of all ranks, D width, T terms.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clip4vla.distributed import collectives
from clip4vla.losses.tiles import Clips, Denominator, LogSumExp, add_logits, turn_into_gradients

# elements of the similarity matrix held at once: as many as fit into a CPU's cache, and enough to keep a GPU busy
TILE = {"cpu": 1 << 20, "cuda": 1 << 25}


class Term(NamedTuple):
    """Names the two features, by number, that one InfoNCE compares, and how.

    valid (b,) bool: rows that take part, as queries and as negatives; the mean is over those of all ranks, 0 without any.
    intra: adds exp(a_i . a_k), k != i, to the denominator of row a_i, and exp(b_i . b_k) to that of b_i: (3) and (4).
    one_way: the rows of a are the queries and those of b the keys; else the mean of both directions.
    """

    a: int
    b: int
    valid: Tensor
    intra: bool = False
    one_way: bool = False


def info_nce(
    a: Tensor, b: Tensor, scale: Tensor, valid: Tensor, group: Tensor | None = None, intra: bool = False
) -> Tensor:
    """Compute one Term between a and b, unit vectors (b, D) of this rank; logits are scale * cosine.

    group (b,) int64: other rows of the same group are no negatives.
    """
    return multi_info_nce([a, b], scale, [Term(0, 1, valid, intra)], group)[0]


def nce_from_scores(
    scores: Tensor, scale: Tensor, valid: Tensor, group: Tensor | None = None, one_way: bool = False
) -> Tensor:
    """Compute what info_nce does from given scores (b, N) of local rows and the columns of all ranks; gathers them."""
    logits = scale * collectives.all_gather_with_grad(scores.to(torch.promote_types(scores.dtype, torch.float32)))
    valid_all = collectives.all_gather(valid)
    # not -inf: the rows of what does not take part would be NaN, and so their gradient
    logits = logits.masked_fill(_excluded_pairs(valid_all, group), torch.finfo(logits.dtype).min)
    first = collectives.rank() * len(valid)
    local_rows = slice(first, first + len(valid))
    row_losses = [-logits[local_rows].log_softmax(1).diagonal(first)]
    if not one_way:
        row_losses.append(-logits[:, local_rows].T.log_softmax(1).diagonal(first))
    row_loss = torch.stack(row_losses).mean(0).masked_fill(~valid, 0)
    return collectives.world_size() * row_loss.sum() / valid_all.sum().clamp(min=1)


def _excluded_pairs(valid_all: Tensor, group: Tensor | None) -> Tensor:
    """Mark pairs (N, N) that are in no denominator: of rows that are not valid, or of two rows of one group."""
    excluded = ~(valid_all[:, None] & valid_all)
    if group is not None:
        groups = collectives.all_gather(group)
        same_row = torch.eye(len(groups), dtype=torch.bool, device=groups.device)
        excluded |= (groups[:, None] == groups) & ~same_row
    return excluded


def multi_info_nce(
    features: list[Tensor], scale: Tensor, terms: list[Term], group: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Compute the value of each term over features (b, D), which are gathered once; see info_nce."""
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    return _InfoNCE.apply(scale.to(dtype), terms, group, *(x.to(dtype) for x in features))


class _InfoNCE(torch.autograd.Function):
    """Computes multi_info_nce with a backward pass of its own."""

    @staticmethod
    def forward(ctx, scale, terms, group, *local):
        with torch.autocast(local[0].device.type, enabled=False):
            gathered = _gather_features(local)
            valid = collectives.all_gather(torch.stack([term.valid for term in terms], 1))  # N T
            groups = None if group is None else collectives.all_gather(group)
            ctx.terms = [
                _ContrastiveTerm(local, gathered, scale, groups, term, term_valid)
                for term, term_valid in zip(terms, valid.T, strict=True)
            ]
            values = tuple(term.value() for term in ctx.terms)
        ctx.save_for_backward(scale, *local)
        return values

    @staticmethod
    def backward(ctx, *value_grads):
        scale, *local = ctx.saved_tensors
        feature_grads = [torch.zeros_like(x) for x in local]
        with torch.autocast(local[0].device.type, enabled=False):
            for term, value_grad in zip(ctx.terms, value_grads, strict=True):
                term.add_gradient(feature_grads, value_grad * collectives.world_size() * scale)
            # every logit is scale times a product of two features: summed over ranks, each pair is counted from both sides
            products = sum(_row_dots(x, grad).sum() for x, grad in zip(local, feature_grads, strict=True))
            scale_grad = products / (2 * scale)
        del ctx.terms  # gathered features, which would stay as long as the loss does; backward works once
        return scale_grad, None, None, *feature_grads


def _gather_features(local: tuple[Tensor, ...]) -> list[Tensor]:
    """Gather each feature's rows (N, D) of all ranks from (b, D), in one collective."""
    if collectives.world_size() == 1:
        return list(local)
    widths = [x.shape[1] for x in local]
    return [x.contiguous() for x in collectives.all_gather(torch.cat(local, 1)).split(widths, 1)]


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (b, D) and (b, D) row by row to dot products (b,), without a copy of them."""
    return (a[:, None] @ b[:, :, None]).flatten()


@dataclass(eq=False)
class _Side:
    """Holds one feature of a term, whose rows are the queries of one direction and the keys of the other."""

    local: Tensor  # b D
    gathered: Tensor  # N D
    share: float  # of the loss with these rows as queries, in the loss of the term
    denominator: Denominator  # (N,) each, of each row as query; set by value()


class _ContrastiveTerm:
    """Computes one term on this rank: the local rows of both features against the rows of all ranks, tile by tile."""

    def __init__(self, local, gathered, scale: Tensor, groups: Tensor | None, term: Term, valid: Tensor):
        self.term, self.scale = term, scale
        self.valid = valid  # N bool
        self.num_local = len(term.valid)
        self.first = collectives.rank() * self.num_local
        self.local_rows = slice(self.first, self.first + self.num_local)  # of this rank, among those of all ranks
        has_invalid = valid.device.type != "cpu" or not bool(valid.all())  # on a GPU asking would cost a wait
        self.clips = Clips(valid if has_invalid else None, groups)  # N
        self.weight = valid.to(scale.dtype) / valid.sum().clamp(min=1)  # (N,) of each row in the mean
        share_a, share_b = (1.0, 0.0) if term.one_way else (0.5, 0.5)
        unset = Denominator(self.weight, self.weight)
        self.a = _Side(local[term.a], gathered[term.a], share_a, unset)
        self.b = _Side(local[term.b], gathered[term.b], share_b, unset)
        # (b,), filled tile by tile by value(); of no meaning for rows that are not valid
        self.local_pos_logits = torch.zeros_like(self.weight[self.local_rows])

    def of_local(self, rows: slice) -> slice:
        """Number local rows among the rows of all ranks."""
        return slice(self.first + rows.start, self.first + rows.stop)

    def value(self) -> Tensor:
        """Compute the loss times the world size, and keep the denominators of all ranks' rows for the gradient."""
        loss_a, loss_b = self._cross_entropies()
        *losses, pos_logits = collectives.all_gather(torch.stack([loss_a, loss_b, self.local_pos_logits], 1)).T
        for side, loss in zip((self.a, self.b), losses, strict=True):
            log_weight = (side.share * self.weight).log()
            side.denominator = Denominator(pos_logits, (loss - log_weight).masked_fill(~self.valid, torch.inf))
        row_loss = torch.stack([self.a.share * loss_a, self.b.share * loss_b]).sum(0)
        row_loss = row_loss.masked_fill(~self.term.valid, 0)
        return collectives.world_size() * (self.weight[self.local_rows] * row_loss).sum()

    def _cross_entropies(self) -> tuple[Tensor, Tensor]:
        """Compute the losses (b,) of local rows of a and of b as queries: log-sum-exp minus positive logit."""
        by_row, by_column = self._logsumexps()
        loss_a = by_row.minus(self.local_pos_logits)
        loss_b = by_column.at(self.local_rows).minus(self.local_pos_logits)
        if self.term.intra:
            loss_a = torch.logaddexp(loss_a, self._intra_logsumexp(self.a).minus(self.local_pos_logits))
            loss_b = torch.logaddexp(loss_b, self._intra_logsumexp(self.b).minus(self.local_pos_logits))
        return loss_a, loss_b

    def _logsumexps(self) -> tuple[LogSumExp, LogSumExp]:
        """Accumulate the logits of a with b by local row of a (b,) and, over all ranks, by row of b (N,).

        Keeps the positive logits, too, and adds them last: tiles have negatives only.
        """
        by_row = LogSumExp.empty(self.num_local, self.weight)
        by_column = LogSumExp.empty(len(self.valid), self.weight)
        for rows, columns, logits in self._tiles(self.a, self.b, self.local_pos_logits):
            add_logits(logits, *self._pairs(rows, columns), by_row.at(rows), by_column.at(columns))
        by_row.add(self.local_pos_logits)
        by_column.at(self.local_rows).add(self.local_pos_logits)
        return by_row, by_column.of_all_ranks()

    def _intra_logsumexp(self, side: _Side) -> LogSumExp:
        """Accumulate the logits of local rows (b,) with the other rows of the same feature."""
        by_row = LogSumExp.empty(self.num_local, self.weight)
        for rows, columns, logits in self._tiles(side, side):
            add_logits(logits, *self._pairs(rows, columns), by_row.at(rows))
        return by_row

    def _tiles(
        self, query: _Side, key: _Side, pos_logits: Tensor | None = None
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (local rows of query, columns: rows of key, their logits); in place of positives, those of a clip with itself,
        stands the least number: they go into pos_logits (b,), if given.
        """
        size = TILE[self.weight.device.type]
        height = min(self.num_local, 1 << ((size.bit_length() - 1) // 2 - 1))
        width = size // height
        width -= width % 64 if width > 64 else 0  # rows of a tile start where tensor cores can load them
        for top in range(0, self.num_local, height):
            rows = slice(top, min(self.num_local, top + height))
            scaled = self.scale * query.local[rows]
            for left in range(0, len(self.valid), width):
                columns = slice(left, min(len(self.valid), left + width))
                logits = scaled @ key.gathered[columns].T
                positives = self._positives(logits, rows, columns)
                if pos_logits is not None:
                    pos_logits[self._positive_rows(rows, columns)] = positives
                positives.fill_(torch.finfo(logits.dtype).min)
                yield rows, columns, logits

    def _pairs(self, rows: slice, columns: slice) -> tuple[Clips, Clips]:
        """Describe the clips of a tile's rows and of its columns."""
        return self.clips.at(self.of_local(rows)), self.clips.at(columns)

    def _positives(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        """View the elements of a tile that pair a clip with itself, those of _positive_rows."""
        return tile.diagonal(self.first + rows.start - columns.start)

    def _positive_rows(self, rows: slice, columns: slice) -> slice:
        """Find the local rows whose positive pair lies in a tile; none if stop equals start."""
        start = max(rows.start, columns.start - self.first)
        stop = min(rows.stop, columns.stop - self.first)
        return slice(start, max(start, stop))

    def add_gradient(self, feature_grads: list[Tensor], factor: Tensor) -> None:
        """Add factor times the gradient of the value by scale * local rows to `feature_grads` (b, D), in place."""
        grad_a, grad_b = feature_grads[self.term.a], feature_grads[self.term.b]
        if collectives.world_size() == 1:  # the keys are local rows too: one pass gives both gradients
            self._add_gradient(self.a, self.b, factor, grad_a, grad_b)
        else:
            self._add_gradient(self.a, self.b, factor, grad_a)
            self._add_gradient(self.b, self.a, factor, grad_b)
        if self.term.intra:
            self._add_gradient(self.a, self.a, factor, grad_a)
            self._add_gradient(self.b, self.b, factor, grad_b)

    def _add_gradient(
        self, query: _Side, key: _Side, factor: Tensor, query_grad: Tensor, key_grad: Tensor | None = None
    ) -> None:
        """Add the gradient through all logits of local query rows to query_grad (b, D) and, if given, key_grad (b, D)."""
        shares = sum((-side.denominator.log[self.local_rows]).exp() for side in (query, key))
        positive_grads = factor * (shares - self.weight[self.local_rows])
        for rows, columns, tile in self._tiles(query, key):
            denominators = query.denominator.at(self.of_local(rows)), key.denominator.at(columns)
            turn_into_gradients(tile, *self._pairs(rows, columns), *denominators, factor)
            if query is not key:
                self._positives(tile, rows, columns).copy_(positive_grads[self._positive_rows(rows, columns)])
            query_grad[rows].addmm_(tile, key.gathered[columns])
            if key_grad is not None:
                key_grad[columns].addmm_(tile.T, query.local[rows])
