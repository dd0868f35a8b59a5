"""Which keys each query attends to, as what it is rather than as an array [B,H,L,S]. Letters as in
`linear.py`; S keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp

MASKED = -1  # the segment of a key that nobody attends to; segments of texts are 0 or more


@flax.struct.dataclass
class Mask:
    """A query attends to the keys that all of the conditions allow; without any, to all keys.

    `place` is the number of the first query, counted as the keys are: where in the cache it stands.
    With `window`, a query attends to its own place and the `window - 1` before it and, unless
    `causal`, to as many after it.
    """

    keys: jax.Array | None = None  # bool [B,S]: real ones; queries are not masked
    query_segments: jax.Array | None = None  # int [B,L], with key_segments:
    key_segments: jax.Array | None = None  # int [B,S]; equal ones attend to each other
    # int [B,L] and [B,S]: what a causal window counts in, instead of places
    query_positions: jax.Array | None = None
    key_positions: jax.Array | None = None
    place: jax.Array | int = 0
    causal: bool = flax.struct.field(pytree_node=False, default=False)
    window: int = flax.struct.field(pytree_node=False, default=0)  # 0: none
    made: jax.Array | None = None  # what `dense` returns, once it is made

    @property
    def empty(self) -> bool:
        """Whether it allows everything."""
        given = (self.keys, self.query_segments, self.made)
        return not (self.causal or self.window or any(one is not None for one in given))

    def dense(self, length: int, keys: int) -> jax.Array | None:
        """Returns bool, broadcastable to [B,1,L,S]: which keys each of `length` queries attends
        to; None for all."""
        if self.made is not None:
            return self.made
        parts = []
        if self.causal or (self.window and self.key_positions is None):
            parts.append(self.by_place(length, keys))
        if self.keys is not None:
            parts.append(key_mask(self.keys))
        if self.query_segments is not None and self.key_segments is not None:
            parts.append(cross_segment_mask(self.query_segments, self.key_segments))
        if self.query_positions is not None and self.key_positions is not None:
            first = self.query_positions[:, None, :, None] - self.window
            parts.append(self.key_positions[:, None, None, :] > first)
        whole = None
        for part in parts:
            whole = part if whole is None else whole & part
        return whole

    def by_place(self, length: int, keys: int) -> jax.Array:
        """Returns bool [1,1,L,S]: which keys the places of the queries allow."""
        counted = 0 if self.key_positions is not None else self.window
        if self.causal:
            return causal_mask(length, keys, self.place, counted)
        apart = (self.place + jnp.arange(length)[:, None]) - jnp.arange(keys)[None]
        return (jnp.abs(apart) < counted)[None, None]

    def made_dense(self, length: int, keys: int) -> Mask:
        """Returns the mask with its dense form, so that it is made once for all layers."""
        return dataclasses.replace(self, made=self.dense(length, keys))

    def padded(self, length: int, keys: int, over: int, under: int) -> Mask:
        """Returns the mask with `over` more queries, and `under` more keys that nobody attends to,
        which follow `length` queries and `keys` keys."""
        real = self.keys
        if real is None and under:
            real = jnp.ones((1, keys), bool)

        def pad(array: jax.Array | None, more: int) -> jax.Array | None:
            return array if array is None or not more else jnp.pad(array, ((0, 0), (0, more)))

        return dataclasses.replace(
            self,
            keys=pad(real, under),
            query_segments=pad(self.query_segments, over),
            key_segments=pad(self.key_segments, under),
            query_positions=pad(self.query_positions, over),
            key_positions=pad(self.key_positions, under),
        )

    def block(self, query: jax.Array | int, key: jax.Array | int, length: int, keys: int) -> Mask:
        """Returns the mask of `length` queries from number `query` on and `keys` keys from number
        `key` on, both counted from 0."""

        def cut(array: jax.Array | None, start: jax.Array | int, size: int) -> jax.Array | None:
            return (
                None if array is None else jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)
            )

        return Mask(
            cut(self.keys, key, keys),
            cut(self.query_segments, query, length),
            cut(self.key_segments, key, keys),
            cut(self.query_positions, query, length),
            cut(self.key_positions, key, keys),
            self.place + query - key,
            self.causal,
            self.window,
        )

    def segments(
        self, rows: int, length: int, keys: int
    ) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
        """Returns int32 [B,L] and [B,S]: the conditions apart from places as segments, in which
        masked keys have the segment MASKED; None if there are none."""
        if self.keys is None and self.query_segments is None:
            return None, None
        query = key = jnp.int32(0)
        if self.query_segments is not None and self.key_segments is not None:
            query, key = self.query_segments, self.key_segments
        if self.keys is not None:
            key = jnp.where(self.keys, key, MASKED)
        wide = jnp.broadcast_to(query, (rows, length)), jnp.broadcast_to(key, (rows, keys))
        return wide[0].astype(jnp.int32), wide[1].astype(jnp.int32)


def text_mask(
    batch: Mapping[str, jax.Array], prefix: str = "", causal: bool = False, window: int = 0
) -> Mask:
    """Returns the mask of a batch's texts: `attention_mask [B,L]` masks keys, as the reference
    does, and `segment_ids [B,L]` separate the texts of packed rows; padding, 0, is a segment too.
    Each name stands behind `prefix`; both are optional."""
    real, segments = batch.get(f"{prefix}attention_mask"), batch.get(f"{prefix}segment_ids")
    keys = None if real is None else real.astype(bool)
    return Mask(keys, segments, segments, causal=causal, window=window)


def key_mask(attention_mask_BS: jax.Array) -> jax.Array:
    """Returns bool [B,1,1,S]: which keys may be attended to. Queries are not masked, as in the
    reference."""
    return attention_mask_BS.astype(bool)[:, None, None, :]


def segment_mask(segment_ids_BL: jax.Array) -> jax.Array:
    """Returns bool [B,1,L,L]: a position attends to those of its own segment; padding, 0, is a
    segment too."""
    return cross_segment_mask(segment_ids_BL, segment_ids_BL)


def cross_segment_mask(segment_ids_BL: jax.Array, memory_segment_ids_BS: jax.Array) -> jax.Array:
    """Returns bool [B,1,L,S]: a position attends to its own segment's part of the memory."""
    return segment_ids_BL[:, None, :, None] == memory_segment_ids_BS[:, None, None, :]


def causal_mask(length: int, keys: int, place: jax.Array | int = 0, window: int = 0) -> jax.Array:
    """Returns bool [1,1,L,S]: position `place + i` attends to those up to itself; with a window, to
    the last `window` only."""
    query, key = place + jnp.arange(length)[:, None], jnp.arange(keys)[None, :]
    mask = key <= query
    return (mask & (key > query - window) if window else mask)[None, None]
