"""Take the log-sum-exps of a tile of logits, and turn it into the gradient by them, in few passes over the tile.

A GPU's tile is far larger than its caches, so that every read or write of the tile is one of its memory: operation by
operation the losses would move nine times the bytes that their products take time for. There torch.compile fuses each of these
functions: forward reads a tile once by rows and once by columns (online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867),
backward reads it once and writes it once; masks cost nothing. tests/losses/test_loss_traffic.py counts the passes.

Notation: a tile (h, w) has the logits of h queries with w keys.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clip4vla.distributed import collectives

# what compiles, by device; a CPU's tile lies in its cache, where the products take most of the time
BACKEND = {"cuda": "inductor"}


class Clips(NamedTuple):
    """Describes the clips of rows or columns, m of them, as far as it makes pairs no negatives."""

    valid: Tensor | None  # m bool; None: all are valid
    group: Tensor | None  # m int64; None: each is the only one of its group

    def at(self, where: slice) -> "Clips":
        """Select some of the clips."""
        return Clips(*(x if x is None else x[where] for x in self))


class LogSumExp(NamedTuple):
    """Holds log-sum-exps of m sets of logits that arrive in tiles: their maxima, and the sums of exp(logit - maximum)."""

    max: Tensor  # m
    sum: Tensor  # m

    @classmethod
    def empty(cls, m: int, like: Tensor) -> "LogSumExp":
        """Start with m sets that are empty."""
        return cls(like.new_full((m,), torch.finfo(like.dtype).min), like.new_zeros(m))

    def at(self, where: slice) -> "LogSumExp":
        """View some of the sets."""
        return LogSumExp(self.max[where], self.sum[where])

    def add(self, logits: Tensor, number: Tensor | float = 1.0) -> None:
        """Add to each set `number` times exp of its logit (m,), in place."""
        new_max = torch.maximum(self.max, logits)
        self.sum.mul_((self.max - new_max).exp()).add_(number * (logits - new_max).exp())
        self.max.copy_(new_max)

    def of_all_ranks(self) -> "LogSumExp":
        """Join with what the other ranks have accumulated for the same sets: two all-reduces of m numbers."""
        if collectives.world_size() == 1:
            return self
        maxima = collectives.all_reduce_max(self.max)
        return LogSumExp(maxima, collectives.all_reduce_sum(self.sum * (self.max - maxima).exp()))

    def minus(self, pos_logits: Tensor) -> Tensor:
        """Subtract pos_logits (m,) from the log-sum-exps: without the digits that large sums would lose."""
        return (self.max - pos_logits) + self.sum.log()


class Denominator(NamedTuple):
    """Holds what the gradient needs of m rows as queries: the denominators of their softmax, relative to the positive pair.

    log is that of denominator / exp(positive logit) / weight in the loss; infinite for rows that are not valid.
    """

    pos_logits: Tensor  # m
    log: Tensor  # m

    def at(self, where: slice) -> "Denominator":
        """Select some of the rows."""
        return Denominator(self.pos_logits[where], self.log[where])


def fused(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function of a tile at its first call on a GPU; where that fails, warn once and run it as it is."""
    compiled: dict[str, Callable[..., None]] = {}

    @functools.wraps(function)
    def run(tile: Tensor, *args: object) -> None:
        backend = BACKEND.get(tile.device.type)
        if backend is None:
            return function(tile, *args)
        try:
            if backend not in compiled:
                compiled[backend] = torch.compile(function, backend=backend, dynamic=False)
            return compiled[backend](tile, *args)
        except Exception as error:  # compilers raise what they like, before anything has run
            if compiled.get(backend) is function:
                raise
            compiled[backend] = function
            cause = getattr(error, "inner_exception", error)
            why = f"{type(cause).__name__}: {cause}".splitlines()[0]
            warnings.warn(
                f"the losses run uncompiled and move about nine times the bytes: torch.compile({function.__name__}): {why}",
                stacklevel=2,
            )
            return function(tile, *args)

    return run


@fused
def add_logits(
    logits: Tensor, rows: Clips, columns: Clips, by_row: LogSumExp, by_column: LogSumExp | None = None
) -> None:
    """Add a tile of logits (h, w) to the log-sum-exps of its rows (h) and, if given, of its columns (w), in place."""
    excluded = _excluded(rows, columns)
    if excluded is not None:
        logits = logits.masked_fill(excluded, torch.finfo(logits.dtype).min)
    _add_logits(by_row, logits, 1)
    if by_column is not None:
        _add_logits(by_column, logits, 0)


def _add_logits(sets: LogSumExp, logits: Tensor, dim: int) -> None:
    """Add logits to sets, each of which has its logits along `dim`."""
    tile_max = logits.amax(dim, keepdim=True)
    tile_sum = (logits - tile_max).exp_().sum(dim, keepdim=True)  # inductor knows an online softmax by these two lines
    sets.add(tile_max.squeeze(dim), tile_sum.squeeze(dim))


@fused
def turn_into_gradients(
    logits: Tensor, rows: Clips, columns: Clips, by_row: Denominator, by_column: Denominator, factor: Tensor
) -> None:
    """Turn a tile of logits (h, w) into factor times the loss's gradient by them, in place; positives are the caller's.

    A logit is in the denominator of its row, as query, and in that of its column, as query of the other direction.
    """
    row_part = (logits - by_row.pos_logits[:, None]).sub_(by_row.log[:, None]).exp_()
    logits.sub_(by_column.pos_logits).sub_(by_column.log).exp_().add_(row_part).mul_(factor)
    excluded = _excluded(rows, columns)
    if excluded is not None:
        logits.masked_fill_(excluded, 0)


def _excluded(rows: Clips, columns: Clips) -> Tensor | None:
    """Mark pairs (h, w) that are no negatives: of clips that are not valid, or of one group."""
    excluded = None
    if rows.valid is not None and columns.valid is not None:
        excluded = ~rows.valid[:, None] | ~columns.valid
    if rows.group is not None and columns.group is not None:
        same_group = rows.group[:, None] == columns.group
        excluded = same_group if excluded is None else excluded | same_group
    return excluded
