"""Cross entropy over a vocabulary without the logits: they exist for a chunk of rows at a time.

A head returns `VocabularyLogits` in place of logits [..., V] and leaves the product with its table
to the loss. The loss computes the gradients of a chunk beside its cross entropy, while its logits
are there, so the backward pass only scales them and no product is taken twice (as Liger Kernel
does, Hsu et al. 2024, arXiv:2410.10989). Under a mesh each device reads its own rows and, where the
vocabulary is sharded, its own part of the table: of the other parts it learns the maximum and the
sums of a chunk's rows.

Dimensions: N rows, n rows of a chunk, D width, V vocabulary; on one device, inside `shard_map`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import flax
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fmjax import losses
from fmjax.distributed.sharding import axes_in_force

# Logits of a device, in bytes, up to which `loss_chunk=0` computes all at once, and the rows of a
# chunk above. Each chunk reads and writes the table's gradient, so that with fewer rows memory is
# the bound: at 1,024 a chunk takes 256 floating-point operations per byte of it, about what chips
# do in the time of a byte.
WHOLE = 2**28
ROWS = 1024

Names: TypeAlias = tuple[str | None, ...]
# Of hidden [..., D], table [V, D], bias [V] and weights [...].
Gradients: TypeAlias = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]
# The loss, and the gradients of table and bias, in fp32.
Sums: TypeAlias = tuple[jax.Array, jax.Array, jax.Array | None]


@flax.struct.dataclass
class VocabularyLogits:
    """Logits [..., V] in fp32 that are not computed yet: hidden @ table.T + bias."""

    hidden: jax.Array  # [..., D], in the dtype of the product
    table: jax.Array  # [V, D]
    bias: jax.Array | None  # [V]
    rows: int = flax.struct.field(pytree_node=False)  # of a chunk, on each device
    axes: Names = flax.struct.field(pytree_node=False)  # logical names of the axes before D

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits."""
        return (*self.hidden.shape[:-1], self.table.shape[0])

    def reshape(self, *shape: int) -> VocabularyLogits:
        """Returns the same logits with other axes before V."""
        if shape == self.shape:
            return self
        hidden = self.hidden.reshape(*shape[:-1], self.hidden.shape[-1])
        axes = (self.axes[0], *[None] * (len(shape) - 2))
        return dataclasses.replace(self, hidden=hidden, axes=axes)


Logits: TypeAlias = jax.Array | VocabularyLogits


def chunk_rows(chunk: int, rows: tuple[int, ...], axes: Names, vocabulary: int) -> int:
    """Returns how many of a device's rows `model.loss_chunk` computes at once; 0: all of them.

    `rows` are the sizes of the axes before V, and `axes` their logical names.
    """
    own = math.prod(rows) // math.prod(map(devices_along, axes, rows))
    size = 4 * own * (vocabulary // devices_along("vocab", vocabulary))
    if chunk == 0 and size > WHOLE:
        chunk = ROWS
    return chunk if 0 < chunk < own else 0


def devices_along(logical: str | None, size: int) -> int:
    """Returns the number of devices that share an axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes_in_force(logical, size))


def cross_entropy_sum(
    logits: Logits, labels: jax.Array, weights: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Returns the sum of weights [...] times the cross entropies, fp32, of logits [..., V] and
    whole-number labels [...]; see `losses.softmax_cross_entropy`."""
    if not isinstance(logits, VocabularyLogits):
        return (losses.softmax_cross_entropy(logits, labels, label_smoothing) * weights).sum()
    how = Division.of(logits, label_smoothing)
    found: jax.Array = weighted_sum(how, logits.hidden, logits.table, logits.bias, labels, weights)
    return found


def compare(logits: Logits, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the cross entropies, fp32 [...], of logits [..., V] and whole-number labels [...],
    and whether each label has the largest logit (the first of equal ones), bool [...].

    There are no gradients for `VocabularyLogits`.
    """
    if not isinstance(logits, VocabularyLogits):
        return losses.softmax_cross_entropy(logits, labels), logits.argmax(axis=-1) == labels
    how = Division.of(logits, 0.0)
    return compare_chunks(how, logits.hidden, logits.table, logits.bias, labels)


@dataclasses.dataclass(frozen=True)
class Division:
    """How the rows and the table of a loss are divided over chunks and over a mesh."""

    rows: int  # of a chunk
    label_smoothing: float
    row_axes: tuple[tuple[str, ...], ...]  # mesh axes of each axis before D
    vocab: tuple[str, ...]  # mesh axes over which the vocabulary stays divided
    # Mesh axes over which the table's width is divided and rows are, too: there it is gathered, in
    # the dtype of the product, and its gradient is scattered.
    embed: tuple[str, ...]

    @classmethod
    def of(cls, logits: VocabularyLogits, label_smoothing: float) -> Division:
        """Returns the division by the mesh and the rules in force."""
        sizes = logits.hidden.shape[:-1]
        row_axes = tuple(map(axes_in_force, logits.axes, sizes))
        used = [axis for axes in row_axes for axis in axes]
        vocabulary, width = logits.table.shape
        vocab = tuple(axis for axis in axes_in_force("vocab", vocabulary) if axis not in used)
        embed = tuple(axis for axis in axes_in_force("embed", width) if axis in used)
        return cls(logits.rows, label_smoothing, row_axes, vocab, embed)

    @property
    def shared(self) -> tuple[str, ...]:
        """The mesh axes over which rows are divided."""
        return tuple(axis for axes in self.row_axes for axis in axes)

    @property
    def specs(self) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec, PartitionSpec]:
        """The partitions of hidden [..., D], table [V, D], bias [V] and labels [...]."""
        rows = [axes or None for axes in self.row_axes]
        table = PartitionSpec(self.vocab or None, self.embed or None)
        return PartitionSpec(*rows, None), table, PartitionSpec(*table[:1]), PartitionSpec(*rows)

    def on_devices(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
        """Returns a function of global arrays from one of each device's parts."""
        if not (self.shared or self.vocab):
            return function
        return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)

    def whole_width(self, table: jax.Array, dtype: Any) -> jax.Array:
        """Returns a device's part of the table [V, D] in a dtype, its width whole."""
        table = table.astype(dtype)
        if not self.embed:
            return table
        gathered: jax.Array = jax.lax.all_gather(table, self.embed, axis=1, tiled=True)
        return gathered

    def reduced(self, gradient: jax.Array) -> jax.Array:
        """Returns the sum of the table's gradients [V, D] of all rows, its width as divided as that
        of the table."""
        if self.embed:
            gradient = jax.lax.psum_scatter(gradient, self.embed, scatter_dimension=1, tiled=True)
        others = tuple(axis for axis in self.shared if axis not in self.embed)
        summed: jax.Array = total(gradient, others)
        return summed


def total(x: Any, axes: tuple[str, ...]) -> Any:
    """Returns the sum over mesh axes; over none, x itself."""
    return jax.lax.psum(x, axes) if axes else x


class Chunk(NamedTuple):
    """What a device computes of a chunk: its own part of the vocabulary, [n, V]."""

    logits: jax.Array  # fp32
    peak: jax.Array  # [n], the largest of all parts
    probabilities: jax.Array
    is_label: jax.Array  # bool
    loss: jax.Array  # [n]
    first: jax.Array  # the class that its part begins with
    classes: int  # of all parts


def chunk_of(
    how: Division, x: jax.Array, table: jax.Array, bias: jax.Array | None, labels: jax.Array
) -> Chunk:
    """Returns the loss of rows x [n, D] with labels [n], and what it is computed from."""
    logits = jnp.dot(x, table.T, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[None]
    own, peak, first = logits.shape[-1], logits.max(axis=-1), jnp.int32(0)
    classes = own * math.prod(map(jax.lax.axis_size, how.vocab))
    if how.vocab:
        first, peak = jax.lax.axis_index(how.vocab) * own, jax.lax.pmax(peak, how.vocab)
    safe = jnp.clip(labels, 0, classes - 1)
    is_label = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == (safe - first)[:, None]

    shifted = logits - peak[:, None]
    exps = jnp.exp(shifted)
    sums = [exps.sum(axis=-1), jnp.where(is_label, shifted, 0).sum(axis=-1)]
    if how.label_smoothing:
        sums.append(shifted.sum(axis=-1))
    normalizer, label, *every = total(sums, how.vocab)
    loss = jnp.log(normalizer) - label
    if every:
        uniform = jnp.log(normalizer) - every[0] / classes
        loss = (1 - how.label_smoothing) * loss + how.label_smoothing * uniform
    return Chunk(logits, peak, exps / normalizer[:, None], is_label, loss, first, classes)


def in_chunks(most: int, hidden: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Returns hidden [..., D] as [chunks, n, D] and the others [...] as [chunks, n], n at most
    `most`; zeros fill the last chunk up."""
    rows = math.prod(hidden.shape[:-1])
    chunks = -(-rows // most)
    size = -(-rows // chunks)
    empty = chunks * size - rows

    def one(x: jax.Array, *width: int) -> jax.Array:
        flat = x.reshape(-1, *width)
        filled = jnp.pad(flat, [(0, empty)] + [(0, 0)] * len(width)) if empty else flat
        return filled.reshape(chunks, size, *width)

    return one(hidden, hidden.shape[-1]), *map(one, others)


def from_chunks(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns [chunks, n, ...] in a shape [..., ...], without what fills the last chunk up."""
    rows = math.prod(shape) // math.prod(x.shape[2:])
    return x.reshape(-1, *x.shape[2:])[:rows].reshape(shape)


def compare_chunks(
    how: Division, hidden: jax.Array, table: jax.Array, bias: jax.Array | None, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns what `compare` does, chunk by chunk."""

    def own(
        hidden: jax.Array, table: jax.Array, bias: jax.Array | None, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        table = how.whole_width(table, hidden.dtype)

        def one(part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            x, label = part
            chunk = chunk_of(how, x, table, bias, label)
            best = chunk.logits.argmax(axis=-1).astype(jnp.int32) + chunk.first
            if how.vocab:
                here = chunk.logits.max(axis=-1) == chunk.peak
                best = jax.lax.pmin(jnp.where(here, best, chunk.classes), how.vocab)
            return chunk.loss, best == label

        loss, right = jax.lax.map(one, in_chunks(how.rows, hidden, labels))
        return from_chunks(loss, labels.shape), from_chunks(right, labels.shape)

    *_, per_row = how.specs
    divided = how.on_devices(own, how.specs, (per_row, per_row))
    found: tuple[jax.Array, jax.Array] = divided(hidden, table, bias, labels)
    return found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sum(
    how: Division,
    hidden: jax.Array,
    table: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """Returns the sum of weights [...] times the losses of hidden [..., D] with labels [...]."""
    return weighted_sum_forward(how, hidden, table, bias, labels, weights)[0]


def weighted_sum_forward(
    how: Division,
    hidden: jax.Array,
    table: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, Gradients]:
    """Returns the sum, and its gradients with respect to hidden, table, bias and weights."""
    rows, of_table, of_bias, per_row = how.specs
    divided = how.on_devices(
        partial(own_gradients, how),
        (rows, of_table, of_bias, per_row, per_row),
        (PartitionSpec(), (rows, of_table, of_bias, per_row)),
    )
    found: tuple[jax.Array, Gradients] = divided(hidden, table, bias, labels, weights)
    return found


def own_gradients(
    how: Division,
    hidden: jax.Array,
    table: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, Gradients]:
    """Returns what `weighted_sum_forward` does, from one device's parts."""
    dtype = hidden.dtype
    whole = how.whole_width(table, dtype)

    def add(sums: Sums, part: tuple[jax.Array, ...]) -> tuple[Sums, tuple[jax.Array, jax.Array]]:
        x, label, weight = part
        chunk = chunk_of(how, x, whole, bias, label)
        target = jnp.where(chunk.is_label, 1 - how.label_smoothing, 0.0)
        if how.label_smoothing:
            target = target + how.label_smoothing / chunk.classes
        slope = (chunk.probabilities - target) * weight[:, None]
        low = slope.astype(dtype)
        d_x = total(jnp.dot(low, whole, preferred_element_type=jnp.float32), how.vocab)
        sum_, d_table, d_bias = sums
        d_table = d_table + jnp.dot(low.T, x, preferred_element_type=jnp.float32)
        d_bias = None if d_bias is None else d_bias + slope.sum(axis=0)
        return (sum_ + (chunk.loss * weight).sum(), d_table, d_bias), (
            d_x.astype(dtype),
            chunk.loss,
        )

    zeros = jnp.zeros(whole.shape, jnp.float32)
    begin = (jnp.float32(0), zeros, None if bias is None else jnp.zeros(bias.shape, jnp.float32))
    (sum_, d_table, d_bias), (d_x, loss) = jax.lax.scan(
        add, begin, in_chunks(how.rows, hidden, labels, weights)
    )
    d_table = how.reduced(d_table).astype(table.dtype)
    if bias is not None:
        d_bias = total(d_bias, how.shared).astype(bias.dtype)
    gradients = from_chunks(d_x, hidden.shape), d_table, d_bias, from_chunks(loss, labels.shape)
    return total(sum_, how.shared), gradients


def weighted_sum_backward(
    how: Division, gradients: Gradients, factor: jax.Array
) -> tuple[jax.Array | None, ...]:
    """Returns the gradients times that of the sum; labels have none."""

    def scaled(x: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) * factor).astype(x.dtype)

    d_hidden, d_table, d_bias, loss = jax.tree.map(scaled, gradients)
    return d_hidden, d_table, d_bias, None, loss


weighted_sum.defvjp(weighted_sum_forward, weighted_sum_backward)
