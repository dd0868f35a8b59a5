"""The cache of a decoder, a value of constant shape that decoding takes and returns. Letters as in
`linear.py`.

`index` counts the places in use; `mask [B,S]` marks those with a token, not padding; `next [B]` is
each row's next position; `layers` is a tuple with the keys and values of each layer, so that a loop
writes them in place. Padding before or after a prompt takes a place in the cache but no position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax.layers.attention import Context
from fmjax.layers.mask import Mask, text_mask

Cache = dict[str, Any]  # arrays, and the tuple of layers


def empty_cache(
    layers: int, rows: int, length: int, heads: int, head_width: int, dtype: DTypeLike
) -> Cache:
    """Returns a cache with room for `length` tokens in each row."""
    room = jnp.zeros((rows, heads, length, head_width), dtype)
    return {
        "index": jnp.int32(0),
        "mask": jnp.zeros((rows, length), bool),
        "next": jnp.zeros(rows, jnp.int32),
        "layers": ({"attention": {"key": room, "value": room}},) * layers,
    }


def advance(cache: Cache, mask_BL: jax.Array, window: int = 0) -> tuple[Cache, Mask, jax.Array]:
    """Adds tokens; `mask` marks the real ones. Returns the cache without their keys and values,
    the places that each token may attend to, and their positions [B,L]."""
    mask_BL, place = mask_BL.astype(bool), cache["index"]
    real = jax.lax.dynamic_update_slice(cache["mask"], mask_BL, (0, place))
    counted = jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32)
    positions = jnp.maximum(cache["next"][:, None] + counted - 1, 0)
    seen = Mask(keys=real, place=place, causal=True, window=window)
    if window:  # counted in tokens, without padding between them
        stands = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        seen = dataclasses.replace(seen, query_positions=positions, key_positions=stands)
    moved = {
        "index": place + mask_BL.shape[1],
        "mask": real,
        "next": cache["next"] + counted[:, -1],
    }
    return {**cache, **moved}, seen, positions


def decoder_context(
    batch: Mapping[str, jax.Array], cache: Cache | None, prefix: str = "", window: int = 0
) -> tuple[Context, jax.Array, Cache | None]:
    """Returns the context of a decoder's layers, its tokens' positions [B or 1, L], and the cache
    without their keys.

    Reads `input_ids` and, if present, `attention_mask` (masks keys) or `segment_ids` (packed rows)
    and `position_ids`, each name prefixed by `prefix`. Without a cache, positions also count
    padding, as in the reference's forward; with one, they count only tokens.
    """
    length = batch[f"{prefix}input_ids"].shape[1]
    if cache is not None:
        place, real = cache["index"], batch.get(f"{prefix}attention_mask")
        given = jnp.ones_like(batch[f"{prefix}input_ids"]) if real is None else real
        cache, mask, positions = advance(cache, given, window)
    else:
        place, mask = 0, text_mask(batch, prefix, causal=True, window=window)
        positions = jnp.arange(length, dtype=jnp.int32)[None]
    return Context(mask=mask, place=place), batch.get(f"{prefix}position_ids", positions), cache


def encoder_mask(batch: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], Mask]:
    """Returns what a decoder needs to know about the source (`segments [B,S]` for packed rows, or
    else `mask [B,S]`, if given), and the encoder's mask."""
    if "segment_ids" in batch:
        segments = batch["segment_ids"]
        return {"segments": segments}, Mask(query_segments=segments, key_segments=segments)
    if "attention_mask" in batch:
        real = batch["attention_mask"].astype(bool)
        return {"mask": real}, Mask(real)
    return {}, Mask()


def memory_mask(batch: Mapping[str, jax.Array], memory: Mapping[str, jax.Array]) -> Mask:
    """Returns the memory positions that a decoder's tokens may attend to: those of their segment,
    or all but padding."""
    if "segments" in memory:
        own = batch["decoder_segment_ids"]
        return Mask(query_segments=own, key_segments=memory["segments"])
    return Mask(memory["mask"].astype(bool)) if "mask" in memory else Mask()


def shift_right(
    labels_BT: jax.Array, start_id: int, positions_BT: jax.Array | None = None
) -> jax.Array:
    """Returns the decoder input that predicts `labels`: the start token, then all labels but the
    last. In packed rows, each text has its own start token, at position 0."""
    shifted = jnp.pad(labels_BT[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)
    return shifted if positions_BT is None else jnp.where(positions_BT == 0, start_id, shifted)
