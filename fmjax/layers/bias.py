"""Biases of attention scores, as what they are rather than as arrays [B,H,L,S]. Letters as in
`linear.py`; S keys."""

from __future__ import annotations

import dataclasses

import flax
import jax
import jax.numpy as jnp

from fmjax.layers.position import relative_buckets


@flax.struct.dataclass
class RelativeBias:
    """One number per head and bucket of distances (Raffel et al. 2020, section 2.1).

    Queries and keys are both counted from 0, unless `apart` says otherwise, as with a cache. What
    `dense` and `by_distance` return is made once for all layers, by `made_for`.
    """

    table: jax.Array  # [buckets, H]
    bidirectional: bool = flax.struct.field(pytree_node=False, default=True)
    max_distance: int = flax.struct.field(pytree_node=False, default=128)
    apart: jax.Array | None = None  # int32 [L,S], key minus query position
    made: jax.Array | None = None
    distances: jax.Array | None = None

    def numbers(self, distances: jax.Array) -> jax.Array:
        """Returns [..., H] for distances [...], key minus query position."""
        table = jnp.asarray(self.table)
        return table[relative_buckets(distances, self.bidirectional, len(table), self.max_distance)]

    def dense(self, length: int, keys: int) -> jax.Array:
        """Returns [1,H,L,S], to add to the scores of `length` queries and `keys` keys."""
        if self.made is not None:
            return self.made
        distances_LS = self.apart
        if distances_LS is None:
            distances_LS = jnp.arange(keys)[None] - jnp.arange(length)[:, None]
        return self.numbers(distances_LS).transpose(2, 0, 1)[None]

    def by_distance(self, length: int, keys: int) -> jax.Array:
        """Returns [H, L+S-1]: the bias of each distance, from the last query and the first key to
        the first query and the last key. Not for a bias with `apart`."""
        if self.distances is not None:
            return self.distances
        return self.numbers(jnp.arange(1 - length, keys)).T

    def made_for(self, length: int, keys: int) -> RelativeBias:
        """Returns the bias with both of its forms, so that they are made once for all layers; the
        compiler drops those that no layer reads."""
        made = self.dense(length, keys)
        distances = self.by_distance(length, keys) if self.apart is None else None
        return dataclasses.replace(self, made=made, distances=distances)
