"""Orders and random numbers are Grain's."""

from __future__ import annotations

import pickle

import grain
import numpy as np
import pytest

from fmjax.data.stream.randomness import Generators, Shuffled


def draws(rng: np.random.Generator) -> list[float]:
    """Several kinds of draws, among them one of half a word of the generator, which keeps the other."""
    return [rng.random(), float(rng.integers(7, dtype=np.uint32)), rng.normal(), *rng.permutation(5).tolist()]


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1])
def test_a_shuffled_stream_is_that_of_grain(count, seed):
    source = grain.MapDataset.range(count).seed(seed)
    order, generators = Shuffled(count, seed), Generators(seed, shuffled=True)
    expected = source.shuffle().repeat(None).random_map(lambda index, rng: [index, *draws(rng)])
    for at in (0, 1, count - 1, count, 3 * count + 1, 10**9 + 7):
        assert [order[at], *draws(generators[at])] == expected[at]
    epochs = np.array([order[at] for at in range(3 * count)]).reshape(3, count)
    np.testing.assert_array_equal(np.sort(epochs), [np.arange(count)] * 3)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_stream_in_order_is_that_of_grain(seed):
    generators = pickle.loads(pickle.dumps(Generators(seed)))
    expected = grain.MapDataset.range(9).seed(seed).random_map(lambda index, rng: draws(rng))
    assert [draws(generators[at]) for at in range(9)] == [expected[at] for at in range(9)]
