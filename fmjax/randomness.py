"""The keys of dropout, by the name of their generator (`train.dropout_rng`).

"threefry2x32" and "rbg" are JAX's. "hash" is only for masks: each number is a hash of its position
in the array and of the key, which XLA fuses into the multiplication by the mask. On two CPU cores a
jitted multiplication by a mask of 2048 x 256 took 0.6 ms with it, 5.0 ms with threefry and 7.0 ms
with rbg (0.3 ms without a mask; medians of 55). It is the same on every kind of device and for any
sharding.

The hash is two rounds of Chris Wellons' lowbias32 (https://github.com/skeeto/hash-prospector),
whose every output bit depends on every input bit; it is not cryptographic, and neither
initialization nor sampling uses it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

from fmjax.errors import UserError, in_range, nearest

MOST_SEED = 2**32 - 1
WORDS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}


def mixed(x: jax.Array) -> jax.Array:
    """Returns lowbias32 of each uint32."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    mixed_x: jax.Array = x ^ (x >> jnp.uint32(16))
    return mixed_x


def random_bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    """Returns random unsigned numbers of `width` bits from a key uint32 [2]."""
    # The index of a position is a sum over axes, so each device computes only its own part of the
    # array.
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return mixed(mixed(place ^ key[0]) + key[1]).astype(WORDS[width])


def seeded(seed: jax.Array) -> jax.Array:
    """Returns the key for a seed."""
    number = seed.astype(jnp.uint32)
    return jnp.stack(
        [mixed(number + jnp.uint32(0x9E3779B9)), mixed(number ^ jnp.uint32(0x85EBCA6B))]
    )


def folded(key: jax.Array, given: jax.Array | int) -> jax.Array:
    """Returns a key folded with a number."""
    number = jnp.asarray(given, jnp.uint32)
    first = mixed(key[0] ^ mixed(number + jnp.uint32(0x9E3779B9)))
    return jnp.stack([first, mixed((key[1] ^ mixed(number ^ jnp.uint32(0xC2B2AE35))) + first)])


def split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns keys [*shape,2]."""
    return random_bits(folded(key, jnp.uint32(0x27D4EB2F)), 32, (*shape, 2))


HASH = define_prng_impl(
    key_shape=(2,),
    seed=seeded,
    split=split,
    random_bits=random_bits,
    fold_in=folded,
    name="fmjax_hash",
    tag="fmh",
)
GENERATORS: dict[str, Any] = {"threefry2x32": "threefry2x32", "rbg": "rbg", "hash": HASH}


def is_hash(key: jax.Array) -> bool:
    """Returns whether a key is of the generator "hash", whose numbers are cheap to make twice."""
    return str(jax.random.key_impl(key)) == str(HASH)


def dropout_key(seed: int, generator: str) -> jax.Array:
    """Returns the dropout key of a run. Raises UserError for an unknown generator."""
    if generator not in GENERATORS:
        known = ", ".join(GENERATORS)
        hint = nearest(generator, GENERATORS)
        raise UserError(
            f'train.dropout_rng="{generator}": no such generator{hint}; choose from {known}'
        )
    return seeded_key(seed, "train.seed", generator)


def check_seed(seed: object, setting: str) -> None:
    """Raises UserError, naming the setting, unless the seed is a whole number that fits into a key.

    A key has 32 bits for the seed; a larger seed would give the same numbers as a smaller one.
    """
    in_range(setting, seed, least=0, most=MOST_SEED, whole=True)


def seeded_key(seed: int, setting: str, generator: str = "threefry2x32") -> jax.Array:
    """Returns the key of a seed. Raises UserError, naming the setting, for a seed out of range."""
    check_seed(seed, setting)
    return jax.random.key(seed, impl=GENERATORS[generator])
