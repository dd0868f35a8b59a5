"""Flash attention for TPUs with a bias that depends on the distance from query to key alone (Dao et
al. 2022, arXiv:2205.14135; Raffel et al. 2020, section 2.1). Letters as in `linear.py`; S keys.

The kernel reads one number per head and distance, and makes each block of the bias in fast memory:
in a block, the row of a key is the row before, moved by one query. The gradient of a distance is
the sum along its diagonal. Queries are in the lanes of a TPU, so that heads narrower than 128 need
no padding, and each query's maximum, sum and gradient are rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fmjax.layers.kernels.call import to_save
from fmjax.layers.kernels.plain import LOWEST

Arrays: TypeAlias = dict[str, jax.Array]
Refs: TypeAlias = dict[str, jax.Array]
Shaped: TypeAlias = jax.Array | jax.ShapeDtypeStruct
Part: TypeAlias = slice | pl.Slice
SUBLANES = 8
KEPT = 4 * 2**20  # bytes of blocks of the bias that are kept for all rows of a batch
FAST_MEMORY = 32 * 2**20  # bytes that the kernels may use


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the scores of a head divide into blocks."""

    block: int  # queries, and keys, of a block
    queries: int  # blocks
    keys: int
    causal: bool

    @property
    def diagonals(self) -> int:
        """The number of different blocks of the bias."""
        return self.queries + self.keys - 1

    @property
    def keeps(self) -> bool:
        """Whether the blocks of the bias stay in fast memory for all rows of a batch."""
        return self.diagonals * self.block**2 * 4 <= KEPT

    def diagonal(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the number of a block's diagonal."""
        return query - key + self.keys - 1

    def window(self, diagonal: jax.Array) -> Part:
        """Returns the distances of a diagonal's blocks."""
        return pl.ds(pl.multiple_of(diagonal * self.block, self.block), 2 * self.block)

    def part(self, index: jax.Array) -> Part:
        """Returns the queries or keys of a block."""
        return pl.ds(pl.multiple_of(index * self.block, self.block), self.block)

    def reads(self, query: jax.Array, key: jax.Array) -> jax.Array | bool:
        """Returns whether a query of a block may attend to one of its keys."""
        return key <= query if self.causal else True

    def scratch(self) -> list[pl.MemoryRef]:
        """Returns fp32 blocks of the bias, keys before queries."""
        kept = self.diagonals if self.keeps else 1
        return [pltpu.VMEM((kept, self.block, self.block), jnp.float32)]


def sheared(window: jax.Array, rows: int) -> jax.Array:
    """Returns [rows, W] from [1, W]: each row is the row before, moved right by 1."""
    x = jnp.broadcast_to(window, (SUBLANES, window.shape[1]))
    number = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in (1, 2, 4):
        x = jnp.where(number & bit != 0, pltpu.roll(x, bit, 1), x)
    while len(x) < rows:
        x = jnp.concatenate([x, pltpu.roll(x, len(x), 1)], axis=0)
    return x


def diagonal_sums(x: jax.Array) -> jax.Array:
    """Returns [1, W] from [rows, W]: the sum of its rows, each moved left by its number."""
    width = x.shape[1]
    while (half := len(x) // 2) >= SUBLANES:
        x = x[:half] + pltpu.roll(x[half:], width - half, 1)
    number = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in (1, 2, 4):
        x = jnp.where(number & bit != 0, pltpu.roll(x, width - bit, 1), x)
    return x.sum(0, keepdims=True)


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Returns the product of two matrices in fp32, summed over an axis of each."""
    summed = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, summed, preferred_element_type=jnp.float32)


def scores_of(
    tiling: Tiling, refs: Refs, bias: jax.Array, row: jax.Array, query: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns a block's scores, fp32 [s,q], and its mask."""
    scores = product(refs["k"][...], refs["q"][...], (0, 0))
    if "distances" in refs:
        diagonal = tiling.diagonal(query, key)
        place = diagonal if tiling.keeps else 0

        @pl.when((row == 0) | (not tiling.keeps))
        def make_block() -> None:
            window = refs["distances"][:, tiling.window(diagonal)]
            bias[place] = sheared(window, tiling.block)[:, tiling.block :]

        scores = scores + bias[place]
    seen = None
    if "query_segments" in refs:
        own = jnp.broadcast_to(refs["key_segments"][...], (SUBLANES, tiling.block)).T[:, :1]
        seen = own == refs["query_segments"][...]
    if tiling.causal:
        place, other = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (1, 0))
        before = place - other >= (key - query) * tiling.block
        seen = before if seen is None else seen & before
    return (scores if seen is None else jnp.where(seen, scores, LOWEST)), seen


def weights_of(scores: jax.Array, seen: jax.Array | None, highest: jax.Array) -> jax.Array:
    """Returns exp(scores - highest), and 0 where masked."""
    weights = jnp.exp(scores - highest)
    return weights if seen is None else jnp.where(seen, weights, 0)


def forward_kernel(
    refs: Refs,
    out: Refs,
    bias: jax.Array,
    highest: jax.Array,
    total: jax.Array,
    sums: jax.Array,
    *,
    tiling: Tiling,
) -> None:
    """Computes a block of queries [K,q] over all blocks of keys: the last axis of the grid."""
    row, query, key = (pl.program_id(axis) for axis in (1, 2, 3))

    @pl.when(key == 0)
    def start() -> None:
        highest[...] = jnp.full_like(highest, LOWEST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(tiling.reads(query, key))
    def add_block() -> None:
        scores, seen = scores_of(tiling, refs, bias, row, query, key)
        higher = jnp.maximum(highest[...], scores.max(0, keepdims=True))
        weights = weights_of(scores, seen, higher)
        kept = jnp.exp(highest[...] - higher)
        value = refs["v"][...]
        highest[...] = higher
        total[...] = total[...] * kept + weights.sum(0, keepdims=True)
        sums[...] = sums[...] * kept + product(value, weights.astype(value.dtype), (1, 0))

    @pl.when(key == tiling.keys - 1)
    def end() -> None:
        some = jnp.where(total[...] > 0, total[...], 1)
        out["out"][...] = (sums[...] / some).astype(out["out"].dtype)
        out["summed"][...] = highest[...] + jnp.log(some)


def block_gradients(
    scores: jax.Array, seen: jax.Array | None, refs: Refs
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns a block's shares of the gradients of queries [K,q], keys [K,s] and values [K,s], and
    the gradient of its scores [s,q], all in fp32."""
    weights = weights_of(scores, seen, refs["summed"][...])
    q, k, v, given = (refs[name][...] for name in ("q", "k", "v", "given"))
    by_v = product(given, weights.astype(v.dtype), (1, 1))
    by_scores = weights * (product(v, given, (0, 0)) - refs["own"][...])
    narrow = by_scores.astype(k.dtype)
    return product(k, narrow, (1, 0)), product(q, narrow, (1, 1)), by_v, by_scores


def add_distances(tiling: Tiling, out: Refs, diagonal: jax.Array, by_scores: jax.Array) -> None:
    """Adds the gradient of the scores of a diagonal's block to that of its distances."""
    wide = jnp.concatenate([jnp.zeros_like(by_scores), by_scores], axis=1)
    out["distances"][:, tiling.window(diagonal)] += diagonal_sums(wide)


def add_diagonals(tiling: Tiling, out: Refs, by_bias: jax.Array) -> None:
    """Adds the gradients of all diagonals to those of their distances."""

    def add(diagonal: jax.Array, carry: None) -> None:
        add_distances(tiling, out, diagonal, by_bias[diagonal])

    jax.lax.fori_loop(0, tiling.diagonals, add, None)


def backward_kernel(
    refs: Refs,
    out: Refs,
    bias: jax.Array,
    by_bias: jax.Array,
    of_q: jax.Array,
    of_k: jax.Array,
    of_v: jax.Array,
    *,
    tiling: Tiling,
) -> None:
    """Computes the gradients of a block of keys over all blocks of queries, the last axis of the
    grid, of all queries of a row, and of the distances of a head."""
    row, key, query = (pl.program_id(axis) for axis in (1, 2, 3))
    starts, ends = query == 0, query == tiling.queries - 1
    first, last = starts & (key == 0), ends & (key == tiling.keys - 1)

    @pl.when(first)
    def start_row() -> None:
        of_q[...] = jnp.zeros_like(of_q)

    @pl.when(starts)
    def start_keys() -> None:
        of_k[...] = jnp.zeros_like(of_k)
        of_v[...] = jnp.zeros_like(of_v)

    if "distances" in refs:

        @pl.when(first & (row == 0))
        def start_head() -> None:
            out["distances"][...] = jnp.zeros_like(out["distances"])
            by_bias[...] = jnp.zeros_like(by_bias)

    @pl.when(tiling.reads(query, key))
    def add_block() -> None:
        parts = block_gradients(*scores_of(tiling, refs, bias, row, query, key), refs)
        of_q[:, tiling.part(query)] += parts[0]
        of_k[...] += parts[1]
        of_v[...] += parts[2]
        if "distances" in refs and tiling.keeps:
            by_bias[tiling.diagonal(query, key)] += parts[3]
        elif "distances" in refs:
            add_distances(tiling, out, tiling.diagonal(query, key), parts[3])

    @pl.when(ends)
    def end_keys() -> None:
        out["k"][...] = of_k[...].astype(out["k"].dtype)
        out["v"][...] = of_v[...].astype(out["v"].dtype)

    @pl.when(last)
    def end_row() -> None:
        out["q"][...] = of_q[...].astype(out["q"].dtype)

    if "distances" in refs and tiling.keeps:
        finish = partial(add_diagonals, tiling, out, by_bias)
        pl.when(last & (row == pl.num_programs(1) - 1))(finish)


def specs(
    names: Sequence[str], arrays: Mapping[str, Shaped], tiling: Tiling, query: int, key: int
) -> dict[str, pl.BlockSpec]:
    """Returns the blocks of arrays that a kernel reads or writes; `query` and `key` are the axes of
    the grid (heads, rows, ..., ...) that number the blocks of queries and keys."""

    def spec(name: str) -> pl.BlockSpec:
        axis = key if name in ("k", "v", "key_segments") else query
        if name == "distances":
            return pl.BlockSpec((None, *arrays[name].shape[1:]), lambda head, *_: (head, 0, 0))
        if name in ("query_segments", "key_segments"):
            return pl.BlockSpec((None, 1, tiling.block), lambda *at: (at[1], 0, at[axis]))
        size = arrays[name].shape[2]
        return pl.BlockSpec(
            (None, None, size, tiling.block), lambda *at: (at[1], at[0], 0, at[axis])
        )

    return {name: spec(name) for name in names}


def like(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns an array's shape and dtype."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def lifted(arrays: Arrays) -> Arrays:
    """Returns arrays of which those of rank 2 have an axis of size 1 in the middle: their blocks
    are then rows."""
    return {name: x[:, None] if x.ndim == 2 else x for name, x in arrays.items()}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(tiling: Tiling, arrays: Arrays) -> jax.Array:
    """Returns softmax(q k^T + bias) v, [B,H,K,L]."""
    return forward(tiling, arrays)[0]


def forward(tiling: Tiling, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Returns [B,H,K,L], and the log-sum-exp of each query's scores, fp32 [B,H,1,L]."""
    arrays = lifted(arrays)
    rows, heads, width, length = arrays["q"].shape
    summed = jax.ShapeDtypeStruct((rows, heads, 1, length), jnp.float32)
    shapes = {"out": like(arrays["q"]), "summed": summed}
    line = pltpu.VMEM((1, tiling.block), jnp.float32)
    found = pl.pallas_call(
        partial(forward_kernel, tiling=tiling),
        grid=(heads, rows, tiling.queries, tiling.keys),
        in_specs=[specs(list(arrays), arrays, tiling, 2, 3)],
        out_specs=specs(list(shapes), shapes, tiling, 2, 3),
        out_shape=shapes,
        scratch_shapes=[
            *tiling.scratch(),
            *(line, line, pltpu.VMEM((width, tiling.block), jnp.float32)),
        ],
        compiler_params=parameters(),
    )(arrays)
    return found["out"], found["summed"]


def parameters() -> pltpu.CompilerParams:
    """Returns the options of both kernels: heads are independent, the other axes in order."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
        vmem_limit_bytes=FAST_MEMORY,
    )


def saved(tiling: Tiling, arrays: Arrays) -> tuple[jax.Array, tuple[Arrays, jax.Array, jax.Array]]:
    """Returns the result, and what its gradient needs."""
    out, summed = to_save(*forward(tiling, arrays))
    return out, (arrays, out, summed)


def gradient(
    tiling: Tiling, kept: tuple[Arrays, jax.Array, jax.Array], given: jax.Array
) -> tuple[dict[str, jax.Array | np.ndarray]]:
    """Returns the gradients of the arrays."""
    arrays, out, summed = kept
    own = (given.astype(jnp.float32) * out.astype(jnp.float32)).sum(2, keepdims=True)
    whole = lifted(arrays) | {"given": given, "summed": summed, "own": own}
    rows, heads, width, length = arrays["q"].shape
    wanted = [name for name in ("q", "k", "v", "distances") if name in arrays]
    blocks = specs(list(whole), whole, tiling, 3, 2)
    results = {name: blocks[name] for name in wanted}
    results["q"] = pl.BlockSpec(
        (None, None, width, length), lambda head, row, *_: (row, head, 0, 0)
    )
    part = pltpu.VMEM((width, tiling.block), jnp.float32)
    found = pl.pallas_call(
        partial(backward_kernel, tiling=tiling),
        grid=(heads, rows, tiling.keys, tiling.queries),
        in_specs=[blocks],
        out_specs=results,
        out_shape={name: like(whole[name]) for name in wanted},
        scratch_shapes=[
            *(*tiling.scratch(), *tiling.scratch()),
            *(pltpu.VMEM((width, length), jnp.float32), part, part),
        ],
        compiler_params=parameters(),
    )(whole)
    if "distances" in found:
        found["distances"] = found["distances"][:, 0]
    segments = {name: x for name, x in arrays.items() if name.endswith("segments")}
    none = {name: np.zeros(x.shape, jax.dtypes.float0) for name, x in segments.items()}
    return (found | none,)


attention.defvjp(saved, gradient)
