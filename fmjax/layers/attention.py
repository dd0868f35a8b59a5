"""Multi-head attention (Vaswani et al. 2017) of a sequence to itself or to a memory. Letters as in
`linear.py`; G key heads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fmjax.distributed.sharding import constrain
from fmjax.layers.linear import Dense, Initializer, normal
from fmjax.layers.taps import tap

ALL = ("query", "key", "value", "out")
LOWEST = np.finfo(np.float32).min
Cache = dict[
    str, jax.Array
]  # of one attention layer: "key" and "value" [B,G,S,K], in the layout that products read


@flax.struct.dataclass
class Context:
    """Inputs of a layer besides x: which positions attend to which, and the positions
    themselves."""

    mask: jax.Array | None = None  # bool, broadcastable to [B,H,L,S]
    bias: jax.Array | None = None  # added to the scores, broadcastable to [B,H,L,S]
    rotary: tuple[jax.Array, jax.Array] | None = None  # see position.rotary
    place: jax.Array | int = 0  # index in the cache of the first position of x
    depth: jax.Array | float = 0.0  # 0 for the first layer, 1 for the last
    memory: jax.Array | None = None  # [B,S,D], from an encoder
    memory_mask: jax.Array | None = None  # bool, broadcastable to [B,H,L,S]
    # [B or 1,L,D], added to x for queries and keys but not for values
    positions: jax.Array | None = None
    # [B or 1,S,D], added to the memory for keys but not for values
    memory_positions: jax.Array | None = None


def key_mask(attention_mask_BS: jax.Array) -> jax.Array:
    """Returns bool [B,1,1,S]: the keys that may be attended to. Queries are not masked, as in the
    reference."""
    return attention_mask_BS.astype(bool)[:, None, None, :]


def segment_mask(segment_ids_BL: jax.Array) -> jax.Array:
    """Returns bool [B,1,L,L]: a position attends to its own segment. Padding, 0, is a segment,
    too."""
    return cross_segment_mask(segment_ids_BL, segment_ids_BL)


def cross_segment_mask(segment_ids_BL: jax.Array, memory_segment_ids_BS: jax.Array) -> jax.Array:
    """Returns bool [B,1,L,S]: a position attends to its own segment's part of the memory."""
    return segment_ids_BL[:, None, :, None] == memory_segment_ids_BS[:, None, None, :]


def causal_mask(length: int, keys: int, place: jax.Array | int = 0, window: int = 0) -> jax.Array:
    """Returns bool [1,1,L,S]: position `place + i` attends to positions up to itself; with a
    window, only to the last `window` of them."""
    query, key = place + jnp.arange(length)[:, None], jnp.arange(keys)[None, :]
    mask = key <= query
    return (mask & (key > query - window) if window else mask)[None, None]


def heads_first(x: jax.Array) -> jax.Array:
    """Returns [B,H,L,K] from [B,L,H,K], and vice versa."""
    return x.swapaxes(1, 2)


def attend(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: jax.Array | None,
    drop: Callable[[jax.Array], jax.Array],
    scale: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Returns drop(softmax(scale q k^T + bias)) v as [B,L,H,K]; `scale` is 1 / sqrt(K) unless
    given.

    `drop` maps the weights [B,H,L,S]. With fewer key heads than query heads, neighboring query
    heads share one (Ainslie et al. 2023, arXiv:2305.13245). Scores are computed and normalized in
    fp32. A masked score is the lowest finite number, not -inf, so a row with nothing to attend to
    averages its values, as in the reference, instead of becoming NaN.
    """
    rows, length, heads, width = q_BLHK.shape
    groups = k_BSGK.shape[2]
    scale = width**-0.5 if scale is None else scale
    # With rows and heads in front, the products are plain batched matmuls, which are faster on a
    # CPU.
    q = heads_first(q_BLHK * scale).reshape(rows, groups, heads // groups, length, width)
    k, v = heads_first(k_BSGK), heads_first(v_BSGK)
    scores = jnp.einsum("BGRLK,BGSK->BGRLS", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, heads, length, -1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, LOWEST)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype)).reshape(*q.shape[:4], -1)
    return heads_first(jnp.einsum("BGRLS,BGSK->BGRLK", weights, v).reshape(rows, heads, length, -1))


def rotate(x_BLHK: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns x with each pair of numbers (k, k + K/2) rotated by its position's angle (Su et al.
    2021, arXiv:2104.09864).

    `rotary` holds the cosines and sines [B,L,K/2]. Halves are paired, not neighbors, as in the
    reference.
    """
    cos, sin = (part[:, :, None, :] for part in rotary)
    a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHK.dtype)


class Attention(nn.Module):
    """Self-attention: projections to queries, keys and values, `attend`, and the projection back.

    The tap `weights` [B,H,L,S] has the attention weights before dropout.
    """

    heads: int
    head_width: int
    dropout: float = 0.0
    kernel_init: Initializer = normal(0.02)
    dtype: DTypeLike = jnp.float32
    kv_heads: int = 0  # 0: as many as query heads
    biased: Collection[str] = ALL  # the projections with a bias
    scale: float | None = None  # None: 1 / sqrt(head_width)
    # initializers of projections that do not use kernel_init
    inits: Mapping[str, Initializer] | None = None

    def dense(self, name: str, features: tuple[int, ...], axes: tuple[str, ...]) -> Dense:
        """Returns the projection named `name`."""
        init = (self.inits or {}).get(name, self.kernel_init)
        return Dense(
            features, axes, init, use_bias=name in self.biased, dtype=self.dtype, name=name
        )

    def project(self, x: jax.Array, name: str) -> jax.Array:
        """Returns the queries [B,L,H,K], or the keys or values [B,L,G,K]."""
        heads = self.heads if name == "query" else self.kv_heads or self.heads
        layer = self.dense(name, (heads, self.head_width), ("embed", "heads", "kv"))
        return constrain(layer(x), "act_batch", "act_length", "act_heads", None)

    def finish(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array | None,
        bias: jax.Array | None,
        width: int,
    ) -> jax.Array:
        """Returns the attention output, projected back to [B,L,D]."""
        # Dropout is active exactly when the caller passes a "dropout" key.
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        out = attend(
            q, k, v, mask, lambda weights: drop(tap(self, "weights", weights)), self.scale, bias
        )
        return self.dense("out", (width,), ("heads", "kv", "embed"))(out)

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Attends from x to x or, with a cache, to its content after writing the keys and values of
        x at `context.place`. Returns [B,L,D] and the cache."""
        compared = add_positions(x_BLD, context.positions)
        q, k, v = (
            self.project(compared, "query"),
            self.project(compared, "key"),
            self.project(x_BLD, "value"),
        )
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        if cache is not None:
            new = {"key": heads_first(k), "value": heads_first(v)}
            at = (0, 0, context.place, 0)
            write = jax.lax.dynamic_update_slice
            cache = {
                name: write(old, new[name].astype(old.dtype), at) for name, old in cache.items()
            }
            k, v = heads_first(cache["key"]), heads_first(cache["value"])
        return self.finish(q, k, v, context.mask, context.bias, x_BLD.shape[-1]), cache


class CrossAttention(Attention):
    """Attention to the memory."""

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Attends from x to the memory, whose keys and values are the cache. Returns [B,L,D] and
        the cache."""
        q = self.project(add_positions(x_BLD, context.positions), "query")
        if cache is None:
            if context.memory is None:
                raise ValueError(
                    "cross-attention needs a memory, or a cache with its keys and values"
                )
            read = {
                "key": add_positions(context.memory, context.memory_positions),
                "value": context.memory,
            }
            cache = {name: heads_first(self.project(memory, name)) for name, memory in read.items()}
        k, v = heads_first(cache["key"]), heads_first(cache["value"])
        return self.finish(q, k, v, context.memory_mask, None, x_BLD.shape[-1]), cache


def add_positions(x_BLD: jax.Array, positions: jax.Array | None) -> jax.Array:
    """Returns x plus its positions, if any."""
    return x_BLD if positions is None else x_BLD + positions.astype(x_BLD.dtype)
