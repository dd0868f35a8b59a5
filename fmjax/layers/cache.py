"""The cache of a decoder: a value of constant shape that decoding takes and returns. Letters as in `linear.py`.

`index` counts the places that are taken; `mask [B,S]` says which of them hold a token and not padding; `next [B]` is each
row's next position; `layers` holds every layer's keys and values, stacked. Padding may stand left or right of a prompt: it
takes a place in the cache and no position.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fmjax.layers.attention import causal_mask

Cache = dict[str, Any]


def empty_cache(layers: int, rows: int, length: int, heads: int, head_width: int, dtype: Any) -> Cache:
    """Returns a cache with room for `length` tokens in each row."""
    room = jnp.zeros((layers, rows, length, heads, head_width), dtype)
    return {
        "index": jnp.int32(0),
        "mask": jnp.zeros((rows, length), bool),
        "next": jnp.zeros(rows, jnp.int32),
        "layers": {"attention": {"key": room, "value": room}},
    }


def advance(cache: Cache, mask_BL: jax.Array, window: int = 0) -> tuple[Cache, jax.Array, jax.Array]:
    """Enters tokens, of which `mask` says which are real: returns the cache but for their keys and values, bool [B,1,L,S]
    (which places each may attend to), and their positions [B,L]."""
    mask_BL, place = mask_BL.astype(bool), cache["index"]
    length = mask_BL.shape[1]
    real = jax.lax.dynamic_update_slice(cache["mask"], mask_BL, (0, place))
    counted = jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32)
    positions = jnp.maximum(cache["next"][:, None] + counted - 1, 0)
    seen = causal_mask(length, real.shape[1], place, window) & real[:, None, None, :]
    moved = {"index": place + length, "mask": real, "next": cache["next"] + counted[:, -1]}
    return {**cache, **moved}, seen, positions
