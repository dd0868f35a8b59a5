"""Keys of dropout: the hash's masks have the rate asked for, and neither neighbours nor keys nor layers resemble each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.errors import UserError
from fmjax.randomness import GENERATORS, dropout_key, mixed

SHAPE = (256, 512)


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    """Masks of 8 steps and 4 layers [8,4,256,512], of rate 0.1, keys folded as the trainer and the stack fold them."""

    def one(step, layer):
        key = jax.random.fold_in(jax.random.fold_in(dropout_key(0, "hash"), step), layer)
        return jax.random.bernoulli(key, 0.9, SHAPE)

    rows = jax.vmap(lambda step: jax.vmap(lambda layer: one(step, layer))(jnp.arange(4)))
    return np.asarray(jax.jit(rows)(jnp.arange(8)))


def test_rate(masks):
    count = SHAPE[0] * SHAPE[1]
    error = (0.9 * 0.1 / count) ** 0.5
    assert np.abs(masks.mean(axis=(2, 3)) - 0.9).max() < 4 * error
    assert np.abs(masks.mean(axis=(0, 1, 2)) - 0.9).max() < 5 * (0.09 / (32 * SHAPE[0])) ** 0.5
    assert np.abs(masks.mean(axis=(0, 1, 3)) - 0.9).max() < 5 * (0.09 / (32 * SHAPE[1])) ** 0.5


def test_nothing_resembles_its_neighbour(masks):
    flat = (masks.reshape(32, -1) - 0.9) / 0.3
    within = np.abs(flat @ flat.T / flat.shape[1] - np.eye(32))
    assert within.max() < 5 / flat.shape[1] ** 0.5 + 0.01  # the diagonal is the variance
    for lag in (1, 2, 3, SHAPE[1], SHAPE[1] + 1, 2 * SHAPE[1]):
        assert np.abs((flat[:, lag:] * flat[:, :-lag]).mean(axis=1)).max() < 5 / flat.shape[1] ** 0.5


def test_hash():
    # lowbias32's published constants, by Python's own whole numbers.
    def reference(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert mixed(jnp.asarray(numbers, jnp.uint32)).tolist() == [reference(number) for number in numbers]


def test_every_bit_is_even():
    bits = np.asarray(jax.random.bits(dropout_key(3, "hash"), (1 << 16,)))
    shares = [(bits >> bit & 1).mean() for bit in range(32)]
    assert np.abs(np.array(shares) - 0.5).max() < 5 * 0.5 / 2**8


def test_keys():
    key = dropout_key(5, "hash")
    several = [key, *jax.random.split(key, 3), jax.random.fold_in(key, 0), jax.random.fold_in(key, 1), dropout_key(6, "hash")]
    assert len({tuple(jax.random.key_data(one).tolist()) for one in several}) == 7
    assert jax.random.split(key, (2, 3)).shape == (2, 3)
    for name in GENERATORS:
        assert 0.6 < float(jax.random.bernoulli(dropout_key(0, name), 0.7, (1000,)).mean()) < 0.8
    with pytest.raises(UserError, match='did you mean "rbg"'):
        dropout_key(0, "rgb")
