"""Multi-head attention (Vaswani et al. 2017), of a sequence to itself or to a memory. Letters as in `linear.py`; G key heads."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.distributed.sharding import constrain
from fmjax.layers.linear import Dense, Initializer, normal

ALL = ("query", "key", "value", "out")
Cache = dict[str, Any]  # of one attention: keys and values [B,G,S,K], as products read them


@flax.struct.dataclass
class Context:
    """What the layers of a stack share: who may attend to what, and where everything stands."""

    mask: jax.Array | None = None  # bool, broadcastable to [B,H,L,S]
    bias: jax.Array | None = None  # added to the scores, broadcastable to [B,H,L,S]
    rotary: tuple[jax.Array, jax.Array] | None = None  # see position.rotary
    place: jax.Array | int = 0  # where in the cache the first position of x stands
    depth: jax.Array | float = 0.0  # of the layer: 0 of the first, 1 of the last
    memory: Any = None  # [B,S,D], of an encoder
    memory_mask: jax.Array | None = None  # bool, broadcastable to [B,H,L,S]


def key_mask(attention_mask_BS: jax.Array) -> jax.Array:
    """Returns bool [B,1,1,S]: which keys may be attended to. Queries are not masked, as in the reference."""
    return attention_mask_BS.astype(bool)[:, None, None, :]


def segment_mask(segment_ids_BL: jax.Array) -> jax.Array:
    """Returns bool [B,1,L,L]: a position attends to those of its own segment (0, the padding, being one too)."""
    return cross_segment_mask(segment_ids_BL, segment_ids_BL)


def cross_segment_mask(segment_ids_BL: jax.Array, memory_segment_ids_BS: jax.Array) -> jax.Array:
    """Returns bool [B,1,L,S]: a position attends to the part of the memory that is of its own segment."""
    return segment_ids_BL[:, None, :, None] == memory_segment_ids_BS[:, None, None, :]


def causal_mask(length: int, keys: int, place: jax.Array | int = 0, window: int = 0) -> jax.Array:
    """Returns bool [1,1,L,S]: position `place + i` attends to those up to itself, to the last `window` alone if that is not 0."""
    query, key = place + jnp.arange(length)[:, None], jnp.arange(keys)[None, :]
    mask = key <= query
    return (mask & (key > query - window) if window else mask)[None, None]


def swapped(x: jax.Array) -> jax.Array:
    """Returns [B,H,L,K] from [B,L,H,K], and the other way round."""
    return x.swapaxes(1, 2)


def attend(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: jax.Array | None,
    drop: nn.Dropout,
    scale: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(scale q k^T + bias) v as [B,L,H,K]; `scale` is 1 / sqrt(K) unless given.

    With fewer key than query heads, neighbouring query heads share one (Ainslie et al. 2023, arXiv:2305.13245). Scores
    are taken and normalised in fp32. A masked score is the type's lowest number rather than -inf, so that a row with
    nothing to attend to averages its values, as in the reference, and is not NaN.
    """
    rows, length, heads, width = q_BLHK.shape
    groups = k_BSGK.shape[2]
    scale = width**-0.5 if scale is None else scale
    # With rows and heads in front, the products are plain batched ones, which a CPU does in less time.
    q = swapped(q_BLHK * scale).reshape(rows, groups, heads // groups, length, width)
    k, v = swapped(k_BSGK), swapped(v_BSGK)
    scores = jnp.einsum("BGRLK,BGSK->BGRLS", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, heads, length, -1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype)).reshape(*q.shape[:4], -1)
    return swapped(jnp.einsum("BGRLS,BGSK->BGRLK", weights, v).reshape(rows, heads, length, -1))


def rotate(x_BLHK: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns x with each pair of numbers (k, k + K/2) turned by its position's angle (Su et al. 2021, arXiv:2104.09864).

    `rotary` holds the cosines and sines [B,L,K/2]. The halves are paired, not the neighbours, as in the reference.
    """
    cos, sin = (part[:, :, None, :] for part in rotary)
    a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHK.dtype)


class Attention(nn.Module):
    """Self-attention: projections to queries, keys and values, `attend`, and the projection back."""

    heads: int
    head_width: int
    dropout: float = 0.0
    kernel_init: Initializer = normal(0.02)
    dtype: Any = jnp.float32
    kv_heads: int = 0  # 0: as many as query heads
    biased: Collection[str] = ALL  # the projections that have a bias
    scale: float | None = None  # None: 1 / sqrt(head_width)
    query_init: Initializer | None = None  # None: kernel_init
    out_init: Initializer | None = None  # None: kernel_init

    def project(self, x: jax.Array, name: str) -> jax.Array:
        """Returns the queries [B,L,H,K], or the keys or values [B,L,G,K]."""
        heads = self.heads if name == "query" else self.kv_heads or self.heads
        init = self.query_init if name == "query" and self.query_init else self.kernel_init
        features, axes = (heads, self.head_width), ("embed", "heads", "kv")
        layer = Dense(features, axes, init, use_bias=name in self.biased, dtype=self.dtype, name=name)
        return constrain(layer(x), "act_batch", "act_length", "act_heads", None)

    def finish(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, bias: jax.Array | None, width: int
    ) -> jax.Array:
        """Returns what the queries gather, projected back to [B,L,D]."""
        # Dropout is active exactly when the caller passes a "dropout" key.
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        out = attend(q, k, v, mask, drop, self.scale, bias)
        init, axes = self.out_init or self.kernel_init, ("heads", "kv", "embed")
        return Dense((width,), axes, init, use_bias="out" in self.biased, dtype=self.dtype, name="out")(out)

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """Attends from x to x or, with a cache, to what that holds once the keys and values of x are written at
        `context.place`. Returns [B,L,D] and the cache."""
        q, k, v = (self.project(x_BLD, name) for name in ("query", "key", "value"))
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        if cache is not None:
            new = {"key": swapped(k), "value": swapped(v)}
            at = (0, 0, context.place, 0)
            write = jax.lax.dynamic_update_slice
            cache = {name: write(old, new[name].astype(old.dtype), at) for name, old in cache.items()}
            k, v = swapped(cache["key"]), swapped(cache["value"])
        return self.finish(q, k, v, context.mask, context.bias, x_BLD.shape[-1]), cache


class CrossAttention(Attention):
    """Attention to the memory."""

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """Attends from x to the memory, whose keys and values are the cache. Returns [B,L,D] and the cache."""
        q = self.project(x_BLD, "query")
        if cache is None:
            cache = {name: swapped(self.project(context.memory, name)) for name in ("key", "value")}
        k, v = swapped(cache["key"]), swapped(cache["value"])
        return self.finish(q, k, v, context.memory_mask, None, x_BLD.shape[-1]), cache
