"""random_integers.py: the numbers of NumPy's own generators, to the last bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip4vla.media.random_integers import integers

SEEDS = [0, 5, 2**32 - 1, 2**40, 2**64, 2**100, 2**200]
HIGHS = [1, 2, 3, 1000, 2**31 + 1, 3 * 10**9]  # of the last two many words are rejected
WORDS = st.integers(0, 2**32 - 1)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(SEEDS), st.integers(0, 4), st.integers(1, 6), st.integers(1, 4))
def test_each_key_draws_what_a_generator_of_its_own_would(data, seed, more, keys, calls):
    keys = [(seed, *data.draw(st.lists(WORDS, min_size=more, max_size=more))) for _ in range(keys)]
    of_each = lambda values: st.lists(values, min_size=len(keys), max_size=len(keys))  # noqa: E731
    calls = [(data.draw(of_each(st.sampled_from(HIGHS))), data.draw(of_each(st.integers(0, 9)))) for _ in range(calls)]
    rngs = [np.random.default_rng(key) for key in keys]
    for got, (highs, counts) in zip(integers(keys, calls), calls, strict=True):
        want = [rng.integers(0, high, count) for rng, high, count in zip(rngs, highs, counts, strict=True)]
        assert got.tolist() == np.concatenate(want).tolist() and got.dtype == np.int64


def test_a_single_number_is_that_of_a_call_without_a_size():
    keys = [(3, i, 1) for i in range(300)]
    assert integers(keys, [([10] * 300, [1] * 300)])[0].tolist() == [
        np.random.default_rng(key).integers(10) for key in keys
    ]


def test_no_keys_draw_nothing_and_keys_of_unequal_length_are_a_mistake():
    assert [len(numbers) for numbers in integers([], [([], []), ([], [])])] == [0, 0]
    with pytest.raises(AssertionError, match="5 and 1099511627776 take 1 and 2 words"):
        integers([(5, 0), (2**40, 0)], [([10] * 2, [1] * 2)])
