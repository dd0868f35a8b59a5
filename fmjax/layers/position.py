"""Token positions: rotary angles, sinusoids, and relative distances in buckets. Letters as in
`linear.py`."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def rotary(
    position_ids_BL: jax.Array,
    head_width: int,
    base: float,
    change: Callable[[np.ndarray], np.ndarray] = lambda frequencies: frequencies,
) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines [B,L,K/2] of the angles position x f (Su et al. 2021,
    arXiv:2104.09864).

    The frequencies f [K/2] are base^(-2k/K); `change` may lower them for texts longer than in
    training.
    """
    frequencies = change(base ** (-np.arange(0, head_width, 2, dtype=np.float32) / head_width))
    angles = (
        position_ids_BL[:, :, None].astype(jnp.float32)
        * jnp.asarray(frequencies, jnp.float32)[None, None]
    )
    return jnp.cos(angles), jnp.sin(angles)


def sinusoids(positions: int, width: int) -> np.ndarray:
    """Returns fp32 [P,D]: sines in the first half of each row and cosines in the second.

    The frequencies are those of Vaswani et al. 2017, section 3.5; the order is that of Marian and
    Hugging Face, while the paper alternates sines and cosines.
    """
    k = np.arange(width)
    angles = np.arange(positions)[:, None] / 10000 ** (2 * (k // 2) / width)[None]
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1).astype(
        np.float32
    )


def relative_buckets(
    distances: jax.Array, bidirectional: bool, buckets: int, max_distance: int
) -> jax.Array:
    """Returns the bucket, int32, of each distance (key minus query position), as T5 does (Raffel et
    al. 2020, section 2.1).

    Half of a direction's buckets hold one distance each. The others grow logarithmically up to
    `max_distance`, beyond which all distances share the last. With one direction, keys ahead of the
    query share bucket 0.
    """
    first = jnp.zeros_like(distances)
    if bidirectional:
        buckets //= 2
        first = jnp.where(distances > 0, buckets, 0)
        distances = jnp.abs(distances)
    else:
        distances = jnp.maximum(-distances, 0)
    exact = buckets // 2
    # In fp32, as in the reference: at the borders of buckets, rounding decides.
    ratio = jnp.log(jnp.maximum(distances, 1).astype(jnp.float32) / exact) / math.log(
        max_distance / exact
    )
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return (first + jnp.where(distances < exact, distances, far)).astype(jnp.int32)
