"""Digests of arrays, computed on the devices that hold them.

Our code does not see the bytes that Orbax writes to a bucket, and reading them back would take as
long as writing them. So the manifest of a step in a bucket has a digest of each array as it
was in memory, which is compared when the array has been restored.

A digest is the sum, modulo 2^32, of the elements' bits, each multiplied by an odd number that
depends on its position; and a second such sum. A sum does not depend on the order or the sharding,
so hosts and meshes may differ. A change of one element always changes it; other damage leaves both
sums unchanged with a probability of about 2^-64. It finds damage, but does not protect against
forgery.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmjax.contracts import PyTree

BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of an element
SEEDS = 0x9E3779B9, 0x85EBCA6B


def start(leaves: Mapping[str, PyTree]) -> jax.Array:
    """Starts computing the digests of arrays; returns uint32 [arrays, 2], which may be awaited."""
    found: jax.Array = digests(list(leaves.values()))
    return found


def read(names: Iterable[str], found: jax.Array) -> dict[str, str]:
    """Returns the digests of arrays by their names, in hexadecimal."""
    rows = np.asarray(found).tolist()
    return {name: f"{one:08x}{two:08x}" for name, (one, two) in zip(names, rows, strict=True)}


@jax.jit
def digests(arrays: list[jax.Array]) -> jax.Array:
    """Returns the digests of arrays, uint32 [arrays, 2]."""
    return jnp.stack([digest(array) for array in arrays])


def digest(array: jax.Array) -> jax.Array:
    """Returns the digest of an array, uint32 [2]."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(array, BITS[array.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.stack([jnp.sum(bits * factor(place, seed), dtype=jnp.uint32) for seed in SEEDS])


def factor(place: jax.Array, seed: int) -> jax.Array:
    """Returns an odd number for each place, mixed as in MurmurHash3."""
    mixed = place + jnp.uint32(seed)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    odd: jax.Array = mixed ^ (mixed >> 16) | jnp.uint32(1)
    return odd
