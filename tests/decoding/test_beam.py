"""Choosing among scores: the quick ways choose what the plain ones do, among equal ones too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.decoding import beam, loop


def drawn(rows: int, size: int, kinds: int, seed: int) -> jax.Array:
    """Scores [rows,size] of so many different values, -inf among them."""
    values = np.array([-np.inf, *np.random.default_rng(seed).normal(size=kinds)], np.float32)
    return jnp.array(np.random.default_rng(seed + 1).choice(values, (rows, size)))


@pytest.mark.parametrize("size", [1, 7, 128 * 8, 128 * 9, 128 * 9 + 1, 4001, 7 * 301])
@pytest.mark.parametrize("kinds", [1, 40, 5000])
def test_top_k_is_that_of_all(size, kinds):
    scores, count = drawn(3, size, kinds, seed=size + kinds), min(8, size)
    if kinds == 40:
        scores = jnp.sort(scores, axis=1)  # the greatest all in the last blocks
    expected = jax.lax.top_k(scores, count)
    for beams in (1, 7) if size % 7 == 0 else (1,):
        found = beam.top_k(scores.reshape(3, beams, -1), count)
        jax.tree.map(np.testing.assert_array_equal, found, tuple(expected))


@pytest.mark.parametrize("kinds", [1, 40, 5000])
def test_the_greatest_is_the_first_of_equals(kinds):
    scores = drawn(50, 300, kinds, seed=kinds)
    np.testing.assert_array_equal(loop.first_argmax(scores), scores.argmax(axis=1))
    np.testing.assert_array_equal(loop.first_argmax(jnp.full((2, 5), -jnp.inf)), [0, 0])
