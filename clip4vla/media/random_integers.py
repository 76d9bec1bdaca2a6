"""Draw integers by many keys at once, the same to the last bit as np.random.default_rng(key).integers gives for each.

What takes the time there is the hash of the key (NumPy's SeedSequence) and Python around few numbers. Both are done here for all
keys together; the bits are those of NumPy's own PCG64.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

Words = np.ndarray[Any, np.dtype[np.uint32]]
WORD, LARGEST = np.uint64(32), np.uint64(0xFFFFFFFF)  # bits of a word
POOL = 4  # words that keys are hashed to
TAKE = 0x43B0D7E5, 0x931E8875  # first constant and factor of the hash while words go in
GIVE = 0x8B51F9DD, 0x58F38DED  # and while they come out
LEFT, RIGHT, SHIFT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715), np.uint32(16)


def integers(keys: Sequence[tuple[int, ...]], calls: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
    """Draw rng.integers(0, high, count) of rng = np.random.default_rng(key) for each of B keys.

    calls: (highs (B,), counts (B,)) of one call of `integers` after the other. Returns the numbers of all keys for each call,
    (sum of its counts,) int64. Keys have as many numbers, which take as many words of 32 bits; highs are less than 2**32.
    """
    if not keys:
        return [np.zeros(0, np.int64) for _ in calls]
    highs, counts = (np.array(rows, np.uint64).T for rows in zip(*calls, strict=True))  # B, calls
    sizes = counts.ravel().astype(np.int64)
    high, key, call = (x.ravel().repeat(sizes) for x in (highs, *np.indices(counts.shape)))
    some = high > 1  # the others are 0, and take no words
    words = np.zeros(len(high), np.uint64)
    words[some] = _streams(keys, np.bincount(key[some], minlength=len(keys)).tolist())
    products = words * high  # Lemire, "Fast random integer generation in an interval", 2019
    numbers = (products >> WORD).astype(np.int64)
    for i in set(key[_rejected(products, high)].tolist()):  # very few, which move the numbers after them
        rng = np.random.default_rng(keys[i])
        numbers[key == i] = np.concatenate([rng.integers(0, *drawn) for drawn in zip(highs[i], counts[i], strict=True)])
    return [numbers[call == i] for i in range(len(calls))]


def _rejected(products: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Find the products (n,) whose lower word is one of 2**32 % high, which would make some numbers likelier."""
    low = products & LARGEST
    few = np.flatnonzero(low < high)
    return few[low[few] < (LARGEST + np.uint64(1) - high[few]) % high[few]]


def _streams(keys: Sequence[tuple[int, ...]], counts: list[int]) -> np.ndarray:
    """Draw the first `counts` words of 32 bits of each key, (sum of counts,): the lower half of each 64 bits is the first."""
    states: Any = map(_Hashed, _hashed(_words(keys)))  # NumPy's types know of no seed but its own
    drawn = [np.random.PCG64(state).random_raw(-(-count // 2)) for state, count in zip(states, counts, strict=True)]
    return np.concatenate([bits.view("<u4")[:count] for bits, count in zip(drawn, counts, strict=True)])


class _Hashed(ISeedSequence):
    """Holds the state (4,) uint64 that PCG64 begins with."""

    def __init__(self, state: np.ndarray) -> None:
        self.state = state

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        """Return the state, which is what PCG64 asks for."""
        return self.state


def _words(keys: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Cut the numbers of B keys into words, the lowest first, and zeros up to POOL of them: (words, B) uint32."""
    rows = []
    for numbers in zip(*keys, strict=True):
        few, many = (max(1, -(-number.bit_length() // 32)) for number in (min(numbers), max(numbers)))
        assert few == many, f"{min(numbers)} and {max(numbers)} take {few} and {many} words"
        rows += [[number >> 32 * i & 0xFFFFFFFF for number in numbers] for i in range(many)]
    rows += [[0] * len(keys)] * (POOL - len(rows))
    return np.array(rows, np.uint32)


def _hashed(words: np.ndarray) -> np.ndarray:
    """Compute np.random.SeedSequence(key).generate_state(4, np.uint64) of B keys (words, B): (B, 4)."""
    constants = _constants(*TAKE, POOL * len(words) + 1)
    pool, used = _hash(words[:POOL], constants), POOL
    for i in range(POOL):
        others = [j for j in range(POOL) if j != i]
        pool[others] = _mix(pool[others], _hash(pool[[i] * len(others)], constants[used:]))
        used += len(others)
    for word in words[POOL:]:
        pool = _mix(pool, _hash(np.tile(word, (POOL, 1)), constants[used:]))
        used += POOL
    state = _hash(np.tile(pool, (2, 1)), _constants(*GIVE, 2 * POOL + 1)).astype(np.uint64)
    return (state[::2] | state[1::2] << WORD).T.copy()


@functools.cache
def _constants(first: int, factor: int, count: int) -> Words:
    """Compute first * factor**i, of 32 bits, (count, 1)."""
    every = itertools.accumulate(itertools.repeat(factor, count - 1), lambda a, b: a * b & 0xFFFFFFFF, initial=first)
    return np.array(list(every), np.uint32)[:, None]


def _hash(rows: Words, constants: Words) -> Words:
    """Hash words (rows, B), each row with the next constant and the one after it."""
    rows = (rows ^ constants[: len(rows)]) * constants[1 : len(rows) + 1]
    return rows ^ rows >> SHIFT


def _mix(left: Words, right: Words) -> Words:
    """Mix words with others, as many."""
    rows = LEFT * left - RIGHT * right
    return rows ^ rows >> SHIFT
