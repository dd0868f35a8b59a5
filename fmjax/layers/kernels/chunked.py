"""Attention in blocks of queries and keys, in XLA: memory grows with the length, not its square.

A running maximum and sum normalize the softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe &
Staats 2021, arXiv:2112.05682). The backward pass computes the weights again from each row's
log-sum-exp (Dao et al. 2022, arXiv:2205.14135). Letters as in `linear.py`; G key heads, R query
heads of each, q and s the queries and keys of a block."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple, TypeAlias

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fmjax.layers.bias import RelativeBias
from fmjax.layers.kernels.call import Call, to_save
from fmjax.layers.kernels.plain import LOWEST, heads_first
from fmjax.layers.mask import Mask

# The gradients of keys, values and the bias, in fp32.
Sums: TypeAlias = tuple[jax.Array, jax.Array, jax.Array | None]
BLOCK = 256  # queries and keys: their scores stay in the second-level cache of a core


class Arrays(NamedTuple):
    """The inputs by which attention is differentiated."""

    q_BGRLK: jax.Array  # scaled
    k_BGSK: jax.Array
    v_BGSK: jax.Array
    bias: jax.Array | None  # [B or 1, H or 1, L, S], or [H, L+S-1] of distances


@flax.struct.dataclass
class Blocks:
    """How the scores divide into blocks, and which of them are masked."""

    mask: Mask  # of whole blocks
    query: int = flax.struct.field(pytree_node=False)  # queries of a block
    key: int = flax.struct.field(pytree_node=False)
    skips: bool = flax.struct.field(pytree_node=False)  # blocks that a causal mask rules out

    def bounds(self, first: jax.Array, keys: int) -> tuple[jax.Array | int, jax.Array | int]:
        """Returns the first and the last block of keys, exclusive, for the queries from `first`."""
        mask, count = self.mask, keys // self.key
        if not self.skips:
            return 0, count
        start = first + mask.place
        end = jnp.minimum((start + self.query - 1) // self.key + 1, count) if mask.causal else count
        if not mask.window:
            return 0, end
        if not mask.causal:
            end = jnp.minimum((start + self.query + mask.window - 2) // self.key + 1, count)
        return jnp.maximum(start - mask.window + 1, 0) // self.key, end

    def scores(
        self, arrays: Arrays, query: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns fp32 [B,G,R,q,s] for the queries and keys from those places on, and their mask,
        broadcastable to it."""
        q = cut(arrays.q_BGRLK, query, self.query, 3)
        k = cut(arrays.k_BGSK, key, self.key, 2)
        scores = jnp.einsum("BGRqK,BGsK->BGRqs", q, k, preferred_element_type=jnp.float32)
        if arrays.bias is not None:
            bias = jax.lax.dynamic_slice(arrays.bias, *self.bias_at(arrays, query, key))
            if bias.ndim == 2:
                bias = diagonals(bias, self.query)[None]
            scores = scores + by_group(bias, *scores.shape[1:3])
        seen = self.mask.block(query, key, self.query, self.key).dense(self.query, self.key)
        return scores, None if seen is None else seen[:, :, None]

    def bias_at(
        self, arrays: Arrays, query: jax.Array, key: jax.Array
    ) -> tuple[tuple[jax.Array | int, ...], tuple[int, ...]]:
        """Returns the start and the shape of the part of the bias for the queries and keys from
        those places on."""
        if arrays.bias is None:
            return (), ()
        if arrays.bias.ndim == 4:
            return (0, 0, query, key), (*arrays.bias.shape[:2], self.query, self.key)
        start = key - query + arrays.q_BGRLK.shape[3] - self.query
        return (0, start), (len(arrays.bias), self.query + self.key - 1)


def diagonals(window: jax.Array, rows: int) -> jax.Array:
    """Returns [H, rows, S] of equal numbers along each diagonal from [H, rows+S-1]: the first is
    that of the last row and the first column."""
    heads, count = window.shape
    # Rows that are longer by 1 than where they are written: each moves by 1 against the one before.
    wide = jnp.pad(window, ((0, 0), (0, 1)))[:, None]
    flat = jnp.broadcast_to(wide, (heads, rows, count + 1)).reshape(heads, -1)
    return flat[:, : rows * count].reshape(heads, rows, count)[:, :, rows - 1 :]


def cut(x: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    """Returns `size` entries of an axis."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def by_group(bias: jax.Array, groups: int, each: int) -> jax.Array:
    """Returns [B or 1, G, R, L, S] from [B or 1, H, L, S], or with one head from one."""
    rows, heads, *lengths = bias.shape
    return bias.reshape(rows, *((1, 1) if heads == 1 else (groups, each)), *lengths)


def refusal(call: Call) -> str:
    """Returns "": it serves every call."""
    return ""


def attend(call: Call) -> jax.Array:
    """Returns [B,L,H,K]; 0 for a query that attends to no key."""
    (length, keys), (rows, _, heads, width) = call.lengths, call.q.shape
    groups = call.k.shape[2]
    query, key = min(BLOCK, length), min(BLOCK, keys)
    over, under = -length % query, -keys % key
    mask = dataclasses.replace(call.mask, made=None).padded(length, keys, over, under)
    skips = mask.causal or (bool(mask.window) and mask.key_positions is None)
    q = heads_first(call.q * call.scale).reshape(rows, groups, heads // groups, length, width)
    bias: jax.Array | None = None
    if isinstance(call.bias, RelativeBias):
        bias = call.bias.by_distance(length, keys).astype(jnp.float32)
        bias = jnp.pad(bias, ((0, 0), (over, under)))
    elif call.bias is not None:
        bias = call.bias
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], length, keys)).astype(jnp.float32)
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, over), (0, under)))
    arrays = Arrays(
        jnp.pad(q, ((0, 0),) * 3 + ((0, over), (0, 0))),
        jnp.pad(heads_first(call.k), ((0, 0),) * 2 + ((0, under), (0, 0))),
        jnp.pad(heads_first(call.v), ((0, 0),) * 2 + ((0, under), (0, 0))),
        bias,
    )
    out = attention(arrays, Blocks(mask, query, key, skips))
    return heads_first(out.reshape(rows, heads, length + over, width)[:, :, :length])


@jax.custom_vjp
def attention(arrays: Arrays, blocks: Blocks) -> jax.Array:
    """Returns softmax(q k^T + bias) v, [B,G,R,L,K]."""
    return forward(arrays, blocks)[0]


def forward(arrays: Arrays, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Returns [B,G,R,L,K], and the log-sum-exp of each query's scores, fp32 [B,G,R,L]."""
    *lead, length, width = arrays.q_BGRLK.shape

    def queries(_: None, number: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        start = Running.start((*lead, blocks.query), width)
        running = folded(arrays, blocks, number * blocks.query, start)
        return None, running.finished(arrays.v_BGSK.dtype)

    _, (out, summed) = jax.lax.scan(queries, None, jnp.arange(length // blocks.query))
    return joined(out, 3), joined(summed, 3)


class Running(NamedTuple):
    """The softmax of the keys that some queries have met, in fp32."""

    highest: jax.Array  # [..., q], the largest score
    total: jax.Array  # [..., q], of the exponentials below it
    out: jax.Array  # [..., q, K], of the values, times those

    @classmethod
    def start(cls, queries: tuple[int, ...], width: int) -> Running:
        """Returns that of no keys."""
        return cls(jnp.full(queries, LOWEST), jnp.zeros(queries), jnp.zeros((*queries, width)))

    def finished(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Returns the result, in a dtype, and the log-sum-exp of the scores."""
        some = jnp.where(self.total > 0, self.total, 1)
        return (self.out / some[..., None]).astype(dtype), self.highest + jnp.log(some)


def folded(arrays: Arrays, blocks: Blocks, first: jax.Array, running: Running) -> Running:
    """Returns the softmax of a block of queries, from number `first` on, after it has met all keys
    of `arrays` too."""
    dtype = arrays.v_BGSK.dtype

    def turn(index: jax.Array, carry: Running) -> Running:
        highest, total, out = carry
        scores, seen = blocks.scores(arrays, first, index * blocks.key)
        if seen is not None:
            scores = jnp.where(seen, scores, LOWEST)
        higher = jnp.maximum(highest, scores.max(-1))
        weights = jnp.exp(scores - higher[..., None])
        if seen is not None:
            weights = jnp.where(seen, weights, 0)
        kept = jnp.exp(highest - higher)
        v = cut(arrays.v_BGSK, index * blocks.key, blocks.key, 2)
        part = jnp.einsum(
            "BGRqs,BGsK->BGRqK", weights.astype(dtype), v, preferred_element_type=jnp.float32
        )
        return Running(higher, total * kept + weights.sum(-1), out * kept[..., None] + part)

    keys = arrays.k_BGSK.shape[2]
    found: Running = jax.lax.fori_loop(*blocks.bounds(first, keys), turn, running)
    return found


def joined(parts: jax.Array, axis: int) -> jax.Array:
    """Returns blocks, stacked on a first axis, one after the other along an axis."""
    moved = jnp.moveaxis(parts, 0, axis)
    shape = moved.shape
    return moved.reshape(*shape[:axis], -1, *shape[axis + 2 :])


def saved(arrays: Arrays, blocks: Blocks) -> tuple[jax.Array, tuple[object, ...]]:
    """Returns the result, and what its gradient needs."""
    out, summed = to_save(*forward(arrays, blocks))
    return out, (arrays, blocks, out, summed)


def gradient(
    kept: tuple[Arrays, Blocks, jax.Array, jax.Array], given: jax.Array
) -> tuple[Arrays, Blocks]:
    """Returns the gradients of the arrays."""
    arrays, blocks, out, summed = kept
    length = arrays.q_BGRLK.shape[3]
    own = jnp.sum(given.astype(jnp.float32) * out.astype(jnp.float32), -1)
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    start = (
        zeros(arrays.k_BGSK.shape),
        zeros(arrays.v_BGSK.shape),
        None if arrays.bias is None else zeros(arrays.bias.shape),
    )

    def queries(carry: Sums, number: jax.Array) -> tuple[Sums, jax.Array]:
        first = number * blocks.query
        part = [cut(x, first, blocks.query, 3) for x in (arrays.q_BGRLK, given, summed, own)]
        sums, query = folded_back(arrays, blocks, part, first, (carry, zeros(part[0].shape)))
        return sums, query.astype(arrays.q_BGRLK.dtype)

    (k, v, bias), q = jax.lax.scan(queries, start, jnp.arange(length // blocks.query))
    found = Arrays(joined(q, 3), k.astype(arrays.k_BGSK.dtype), v.astype(arrays.v_BGSK.dtype), bias)
    return found, jax.tree.map(no_gradient, blocks)


def folded_back(
    arrays: Arrays,
    blocks: Blocks,
    part: list[jax.Array],
    first: jax.Array,
    sums: tuple[Sums, jax.Array],
) -> tuple[Sums, jax.Array]:
    """Adds the share of a block of queries, from number `first` on, with all keys of `arrays`.

    `part` holds its queries, the gradient of its result, the log-sum-exp of its scores, and the sum
    of that gradient times the result over K.
    """

    def turn(index: jax.Array, sums: tuple[Sums, jax.Array]) -> tuple[Sums, jax.Array]:
        return turn_back(arrays, blocks, part, first, index * blocks.key, sums)

    keys = arrays.k_BGSK.shape[2]
    found: tuple[Sums, jax.Array] = jax.lax.fori_loop(*blocks.bounds(first, keys), turn, sums)
    return found


def turn_back(
    arrays: Arrays,
    blocks: Blocks,
    part: list[jax.Array],
    first: jax.Array,
    key: jax.Array,
    sums: tuple[Sums, jax.Array],
) -> tuple[Sums, jax.Array]:
    """Adds one block's share to the gradients of keys, values, bias and the block's queries."""
    (q, given, summed, own), ((of_k, of_v, of_bias), of_q) = part, sums
    scores, seen = blocks.scores(arrays, first, key)
    if seen is not None:
        scores = jnp.where(seen, scores, LOWEST)
    weights = jnp.exp(scores - summed[..., None])
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    k, v = (cut(x, key, blocks.key, 2) for x in (arrays.k_BGSK, arrays.v_BGSK))
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    by_v = product("BGRqs,BGRqK->BGsK", weights.astype(v.dtype), given)
    by_weights = product("BGRqK,BGsK->BGRqs", given, v)
    by_scores = weights * (by_weights - own[..., None])
    narrow = by_scores.astype(k.dtype)
    of_k = added(of_k, product("BGRqs,BGRqK->BGsK", narrow, q), (2, key))
    of_v = added(of_v, by_v, (2, key))
    if of_bias is not None:
        rows, groups, each, *lengths = by_scores.shape
        by_bias = by_scores.reshape(rows, groups * each, *lengths)
        start, shape = blocks.bias_at(arrays, first, key)
        old = jax.lax.dynamic_slice(of_bias, start, shape)
        if of_bias.ndim == 2:
            along = jax.linear_transpose(partial(diagonals, rows=blocks.query), old)
            (by_bias,) = along(by_bias.sum(0))
        else:
            axes = tuple(axis for axis in (0, 1) if of_bias.shape[axis] == 1)
            by_bias = by_bias.sum(axes, keepdims=True)
        of_bias = jax.lax.dynamic_update_slice(of_bias, old + by_bias, start)
    return (of_k, of_v, of_bias), of_q + product("BGRqs,BGsK->BGRqK", narrow, k)


def added(whole: jax.Array, part: jax.Array, *starts: tuple[int, jax.Array]) -> jax.Array:
    """Returns an array to which a part is added, from a place on along each named axis."""
    at: list[jax.Array | int] = [0] * whole.ndim
    for axis, start in starts:
        at[axis] = start
    old = jax.lax.dynamic_slice(whole, at, part.shape)
    return jax.lax.dynamic_update_slice(whole, old + part, at)


def no_gradient(leaf: jax.Array | int) -> np.ndarray:
    """Returns the gradient of what has none."""
    return np.zeros(jnp.shape(leaf), jax.dtypes.float0)


attention.defvjp(saved, gradient)
