"""Dropout (Srivastava et al. 2014)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.layers.recompute import recomputed
from fmjax.randomness import is_hash


class Dropout(nn.Module):
    """Sets numbers to 0 with probability `rate` and divides the others by 1 - rate, if the caller
    passes a "dropout" key; otherwise returns x.

    The backward pass stores a mask of booleans or, with `train.dropout_rng="hash"`, nothing. The
    draws are those of `nn.Dropout`.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [...] to [...]."""
        if self.rate == 0 or not self.has_rng("dropout"):
            return x
        key, kept = self.make_rng("dropout"), 1 - self.rate

        def drop(x: jax.Array, drawn: jax.Array) -> jax.Array:
            if again:
                drawn = jax.random.bernoulli(drawn, kept, x.shape)
            return jax.lax.select(drawn, x / kept, jnp.zeros_like(x))

        again = is_hash(key)
        drawn = key if again else jax.random.bernoulli(key, kept, x.shape)
        return recomputed(drop)(x, drawn)
