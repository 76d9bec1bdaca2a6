"""Choose the samples of each batch by pure functions of (seed, sizes of the shards, number of the batch), on any ranks."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clip4vla.errors import UserError

EVERYTHING = slice(None)


class SampleIndex(NamedTuple):
    """Locates one sample of a batch: entry `entry` of shard `shard` of source `source`, met for the `epoch`-th time."""

    source: int
    shard: int
    entry: int
    epoch: int


class TrainSampler:
    """Shuffles several sources endlessly, each with its fixed part of every batch.

    sizes: samples of each shard of each source. Shards are shuffled in every epoch, then samples inside a window of
    shards. An epoch of a source ends with its last whole part of a batch: the tail is dropped, and differs every epoch.
    """

    def __init__(self, sizes: list[list[int]], shares: Sequence[float], batch_size: int, seed: int, window: int):
        self.sizes, self.seed, self.window = [np.array(s) for s in sizes], seed, window
        self.batch_size = batch_size
        self.parts = _apportion(shares, batch_size)
        for source, part in enumerate(self.parts):
            if part > self.sizes[source].sum():
                raise UserError(
                    f"data.train: source {source + 1} has {self.sizes[source].sum()} samples, fewer than its {part} of "
                    f"a batch of {batch_size}: lower train.batch_size or its share"
                )

    def batch(self, k: int, rows: slice = EVERYTHING) -> list[SampleIndex]:
        """List rows of global batch k, sources interleaved at random."""
        return [SampleIndex(*row) for row in self._batch(k)[rows].tolist()]

    @functools.lru_cache(maxsize=4)  # noqa: B019  (its pieces are asked for one by one)
    def _batch(self, k: int) -> np.ndarray:
        """Compute the fields of SampleIndex of all rows of global batch k, (batch_size, 4)."""
        parts = []
        for source, part in enumerate(self.parts):
            if part:
                epoch, place = divmod(k, int(self.sizes[source].sum()) // part)
                entries = self._at(source, epoch, np.arange(place * part, (place + 1) * part))
                parts.append(np.column_stack([np.full(part, source), entries, np.full(part, epoch)]))
        return np.random.default_rng((self.seed, k, 1)).permutation(np.concatenate(parts))

    def _at(self, source: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Look up (shard, entry), (n, 2), at n ascending positions of an epoch."""
        _, ends = self._shards(source, epoch)
        windows = np.searchsorted(ends, positions, side="right")
        firsts = np.concatenate([[0], ends])[windows]
        return np.concatenate(
            [
                self._window(source, epoch, int(window))[(positions - firsts)[windows == window]]
                for window in np.unique(windows)
            ]
        )

    @functools.lru_cache(maxsize=32)  # noqa: B019  (an order lives as long as its run)
    def _shards(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffle an epoch's shards: (shard numbers, position after the last sample of each window of shards)."""
        shards = np.random.default_rng((self.seed, source, epoch, 2)).permutation(len(self.sizes[source]))
        ends = self.sizes[source][shards].cumsum()
        return shards, ends[[*range(self.window - 1, len(shards) - 1, self.window), len(shards) - 1]]

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def _window(self, source: int, epoch: int, window: int) -> np.ndarray:
        """Shuffle the samples of one window: (shard, entry), (n, 2)."""
        shards = self._shards(source, epoch)[0][window * self.window : (window + 1) * self.window]
        pairs = np.concatenate(
            [
                np.stack([np.full(n, s), np.arange(n)], 1)
                for s, n in zip(shards, self.sizes[source][shards], strict=True)
            ]
        )
        return np.random.default_rng((self.seed, source, epoch, window, 3)).permutation(pairs)


class EvalSampler:
    """Orders every sample once, as in the shards; the last batch is padded with None so that ranks stay in step.

    most: samples of each source at most; 0: all.
    """

    def __init__(self, sizes: list[list[int]], batch_size: int, most: int = 0):
        self.batch_size = batch_size
        self.places: Sequence[SampleIndex] = _Places(sizes, most)

    @classmethod
    def for_ranks(cls, sizes: list[list[int]], clips: int, ranks: int, most: int = 0) -> "EvalSampler":
        """Order every sample once, in as few batches as `clips` of a rank at a time allow, all about as large."""
        order = cls(sizes, clips * ranks, most)
        order.batch_size = ranks * -(-len(order.places) // (len(order) * ranks))
        return order

    def __len__(self) -> int:
        return -(-len(self.places) // self.batch_size)

    def batch(self, k: int, rows: slice = EVERYTHING) -> list[SampleIndex | None]:
        """List rows of global batch k; None beyond the last sample."""
        places = list(self.places[k * self.batch_size : (k + 1) * self.batch_size])
        return (places + [None] * (self.batch_size - len(places)))[rows]


class _Places(Sequence[SampleIndex]):
    """Numbers all samples, or the first `most` of each source, without a list of them."""

    def __init__(self, sizes: list[list[int]], most: int):
        counts = [np.minimum(np.cumsum(shards), most or np.inf) for shards in sizes]
        counts = [np.diff(ends, prepend=0).astype(int) for ends in counts]
        self.shards = [(source, shard) for source, part in enumerate(sizes) for shard in range(len(part))]
        self.ends = np.concatenate(counts).cumsum()
        self.counts = np.concatenate(counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # IndexError, and numbers from the end
        at = int(np.searchsorted(self.ends, number, side="right"))
        return SampleIndex(*self.shards[at], number - int(self.ends[at] - self.counts[at]), 0)


def _apportion(shares: Sequence[float], total: int) -> list[int]:
    """Split `total` into whole numbers in proportion to the shares (largest remainders)."""
    if min(shares) < 0 or sum(shares) <= 0:
        raise UserError(f"data.train: shares must be positive, not {list(shares)}")
    exact = np.array(shares, float) / sum(shares) * total
    parts = np.floor(exact).astype(int)
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return parts.tolist()
