"""The cache of a decoder, a value of constant shape that decoding takes and returns. Letters as in
`linear.py`.

`index` counts the places in use; `mask [B,S]` marks those that a row has a token in, not padding;
`next [B]` is each row's next position; `layers` is a tuple with the keys and values of each layer,
so that a loop writes them in place. Padding before or after a prompt takes a place in the cache but
no position.

After the prompt, a row may have several continuations: beams, or samples (`branched`). They share
the row's keys and values, [B,G,S,K], while `mask [N,S]` and `next [N]` have a row for each of the N
continuations. Each step adds one token to each of them, at neighboring places from `branch` on. Its
mask is all that tells a continuation from the others, so that beams are chosen by choosing masks
(`chosen`): no keys are copied. Attention computes its scores for the keys of all the row's
continuations, in one product with as many queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax.layers.attention import Context
from fmjax.layers.mask import Mask, text_mask

Cache = dict[str, Any]  # arrays, and the tuple of layers
SHARED = ("attention", "cross")  # what the continuations of a row share of a layer's cache


def empty_cache(
    layers: int, rows: int, length: int, heads: int, head_width: int, dtype: DTypeLike
) -> Cache:
    """Returns a cache with room for `length` tokens in each row."""
    room = jnp.zeros((rows, heads, length, head_width), dtype)
    return {
        "index": jnp.int32(0),
        "branch": jnp.int32(0),
        "mask": jnp.zeros((rows, length), bool),
        "next": jnp.zeros(rows, jnp.int32),
        "layers": ({"attention": {"key": room, "value": room}},) * layers,
    }


def each_row(tree: Any, apply: Callable[[jax.Array], jax.Array]) -> Any:
    """Returns the tree with `apply` on its arrays, but not on numbers."""
    return jax.tree.map(lambda leaf: apply(leaf) if leaf.ndim else leaf, tree)


def per_continuation(cache: Cache, apply: Callable[[jax.Array], jax.Array]) -> Cache:
    """Returns the cache with `apply` on every array that has a row for each continuation: all but
    numbers and what SHARED names."""

    def mapped(tree: Any) -> Any:
        return each_row(tree, apply)

    own = {name: mapped(part) for name, part in cache.items() if name != "layers"}
    layers = tuple(
        {name: part if name in SHARED else mapped(part) for name, part in layer.items()}
        for layer in cache["layers"]
    )
    return own | {"layers": layers}


def branched(cache: Cache, times: int, sharing: int) -> Cache:
    """Returns the cache with `times` continuations of each row, of which `sharing` share its keys
    and values, those of row 0 first. From here on, each of their tokens has a place of its own."""
    begun = {"branch": cache["index"]} if "branch" in cache else {}
    copied = each_row(cache | begun, lambda leaf: jnp.repeat(leaf, times // sharing, axis=0))
    return per_continuation(copied, lambda leaf: jnp.repeat(leaf, sharing, axis=0))


def chosen(cache: Cache, parents_BM: jax.Array) -> Cache:
    """Returns the cache in which continuation i of each row goes on from its `parents[i]`."""
    rows, times = parents_BM.shape
    flat = (jnp.arange(rows)[:, None] * times + parents_BM).reshape(-1)
    return per_continuation(cache, lambda leaf: leaf[flat])


def continuations(cache: Cache) -> int:
    """Returns the number of continuations of each row."""
    return len(cache["mask"]) // len(cache["layers"][0]["attention"]["key"])


def advance(cache: Cache, mask_NL: jax.Array, window: int = 0) -> tuple[Cache, Mask, jax.Array]:
    """Adds tokens, one for each continuation if rows have several; `mask` marks the real ones.
    Returns the cache without their keys and values, the places that each token may attend to, and
    their positions [N,L]."""
    mask_NL, place, times = mask_NL.astype(bool), cache["index"], continuations(cache)
    written = mask_NL
    if times > 1:
        if mask_NL.shape[1] > 1:
            raise ValueError("each of a row's continuations takes one token at a time")
        written = mask_NL & jnp.tile(jnp.eye(times, dtype=bool), (len(mask_NL) // times, 1))
    real = jax.lax.dynamic_update_slice(cache["mask"], written, (0, place))
    counted = jnp.cumsum(mask_NL, axis=1, dtype=jnp.int32)
    positions = jnp.maximum(cache["next"][:, None] + counted - 1, 0)
    # All places that continuations have are before their new tokens.
    seen = Mask(keys=real, place=place, causal=times == 1, window=window)
    if window:  # counted in tokens, without padding between them
        stands = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        seen = dataclasses.replace(seen, query_positions=positions, key_positions=stands)
    moved = {
        "index": place + written.shape[1],
        "mask": real,
        "next": cache["next"] + counted[:, -1],
    }
    return {**cache, **moved}, seen, positions


def distances(cache: Cache, length: int) -> jax.Array:
    """Returns int32 [L,S]: how many tokens later than each of the next `length` tokens the token at
    each place stands. Tokens of a row's continuations stand beside each other."""
    places, times, branch = (
        jnp.arange(cache["mask"].shape[1]),
        continuations(cache),
        cache["branch"],
    )

    def standing(place: jax.Array) -> jax.Array:
        return jnp.where(place < branch, place, branch + (place - branch) // times)

    return standing(places)[None] - (standing(cache["index"]) + jnp.arange(length))[:, None]


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
    apart = None
    if cache is not None:
        place, real = cache["index"], batch.get(f"{prefix}attention_mask")
        apart = distances(cache, length)
        given = jnp.ones_like(batch[f"{prefix}input_ids"]) if real is None else real
        cache, mask, positions = advance(cache, given, window)
    else:
        place, mask = 0, text_mask(batch, prefix, causal=True, window=window)
        positions = jnp.arange(length, dtype=jnp.int32)[None]
    context = Context(mask=mask, place=place, distances=apart)
    return context, batch.get(f"{prefix}position_ids", positions), cache


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
