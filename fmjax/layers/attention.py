"""Multi-head attention (Vaswani et al. 2017) of a sequence to itself or to a memory. Letters as in
`linear.py`; G key heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax.distributed.sharding import constrain
from fmjax.layers.bias import RelativeBias
from fmjax.layers.dropout import Dropout
from fmjax.layers.kernels.call import Call, to_save
from fmjax.layers.kernels.choice import AUTO, choose
from fmjax.layers.kernels.filled import attend_filled
from fmjax.layers.kernels.plain import attend, heads_first
from fmjax.layers.linear import Dense, Initializer, normal
from fmjax.layers.mask import Mask
from fmjax.layers.taps import is_tapped, tap

ALL = ("query", "key", "value", "out")
# of one attention layer: "key" and "value" [B,G,S,K], in the layout that products read
Cache = dict[str, jax.Array]


@flax.struct.dataclass
class Context:
    """Inputs of a layer besides x: which positions attend to which, and the positions
    themselves."""

    mask: Mask = Mask()  # which keys each query attends to
    # added to the scores: broadcastable to [B,H,L,S], or of distances
    bias: jax.Array | RelativeBias | None = None
    rotary: tuple[jax.Array, jax.Array] | None = None  # see position.rotary
    place: jax.Array | int = 0  # index in the cache of the first position of x
    distances: jax.Array | None = None  # with a cache, int32 [L,S]: see `cache.distances`
    depth: jax.Array | float = 0.0  # 0 for the first layer, 1 for the last
    memory: jax.Array | None = None  # [B,S,D], from an encoder
    memory_mask: Mask = Mask()  # which of its positions each query attends to
    # [B or 1,L,D], added to x for queries and keys but not for values
    positions: jax.Array | None = None
    # [B or 1,S,D], added to the memory for keys but not for values
    memory_positions: jax.Array | None = None
    kernel: str = flax.struct.field(pytree_node=False, default=AUTO)  # see kernels/choice.py
    where: str = flax.struct.field(pytree_node=False, default="")  # the stack's name, for messages

    def with_dense_masks(self, length: int, keys: int, memory_keys: int) -> Context:
        """Returns the context whose masks are dense too, made once for all layers that read it; the
        compiler drops those that no layer reads."""
        return dataclasses.replace(
            self,
            mask=self.mask.made_dense(length, keys),
            memory_mask=self.memory_mask.made_dense(length, memory_keys),
        )


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
    """Self-attention: projections to queries, keys and values, the kernel of `context.kernel`, and
    the projection back.

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
        context: Context,
        width: int,
        crosses: bool = False,
        cached: bool = False,
    ) -> jax.Array:
        """Returns the attention output, projected back to [B,L,D]."""
        mask, bias = (context.memory_mask, None) if crosses else (context.mask, context.bias)
        scale = self.head_width**-0.5 if self.scale is None else self.scale
        drops, tapped = self.dropout > 0 and self.has_rng("dropout"), is_tapped(self, "weights")
        call = Call(q, k, v, mask, scale, bias, crosses, drops, tapped)
        kernel = None
        if not cached:
            name = self.path[-1] if self.path else "attention"
            kernel = choose(context.kernel, call, f"{context.where}/{name}".strip("/"))
        if kernel is not None:
            out = kernel.attend(call)
        else:
            # Dropout is active exactly when the caller passes a "dropout" key.
            drop = Dropout(self.dropout)
            rows, seen = len(k), mask.dense(q.shape[1], k.shape[1])
            if seen is not None and len(seen) > 1:
                seen = by_row(seen[:, 0], rows)[:, None]

            def weighed(weights: jax.Array) -> jax.Array:
                return drop(tap(self, "weights", weights))

            own, added = by_row(q, rows), call.dense_bias()
            if cached and not crosses and seen is not None and not (drops or tapped):
                filled = context.place + own.shape[1]
                out = attend_filled(own, k, v, seen, filled, scale, added)
            else:
                out = attend(own, k, v, seen, weighed, scale, added)
            (out,) = to_save(out.reshape(q.shape))
        return self.dense("out", (width,), ("heads", "kv", "embed"))(out)

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Attends from x to x or, with a cache, to its content after writing the keys and values of
        x at `context.place`. Returns [B,L,D] and the cache, which may have fewer rows than x:
        those that the tokens continue (`cache.branched`)."""
        compared = add_positions(x_BLD, context.positions)
        q, k, v = (
            self.project(compared, "query"),
            self.project(compared, "key"),
            self.project(x_BLD, "value"),
        )
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        if cache is not None:
            rows, at = len(cache["key"]), (0, 0, context.place, 0)
            new = {"key": heads_first(by_row(k, rows)), "value": heads_first(by_row(v, rows))}
            write = jax.lax.dynamic_update_slice
            cache = {
                name: write(old, new[name].astype(old.dtype), at) for name, old in cache.items()
            }
            k, v = heads_first(cache["key"]), heads_first(cache["value"])
        cached = cache is not None
        return self.finish(q, k, v, context, x_BLD.shape[-1], cached=cached), cache


class CrossAttention(Attention):
    """Attention to the memory."""

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Attends from x to the memory, whose keys and values are the cache. Returns [B,L,D] and
        the cache, which may have fewer rows than x, as in `Attention`."""
        q = self.project(add_positions(x_BLD, context.positions), "query")
        cached = cache is not None
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
        return self.finish(q, k, v, context, x_BLD.shape[-1], True, cached), cache


def by_row(x: jax.Array, rows: int) -> jax.Array:
    """Returns [B, N/B x L, ...] of x [N,L,...]: a row's continuations as tokens of one row."""
    return x.reshape(rows, -1, *x.shape[2:])


def add_positions(x_BLD: jax.Array, positions: jax.Array | None) -> jax.Array:
    """Returns x plus its positions, if any."""
    return x_BLD if positions is None else x_BLD + positions.astype(x_BLD.dtype)
