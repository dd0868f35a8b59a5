"""Heads for any model. Each maps the model's features and the batch to logits.

A head that reads the pooled output says so in `reads_pooled`; the model builds its pooler only
then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from fmjax import contracts
from fmjax.distributed.sharding import axes_in_force, shard_embedded
from fmjax.layers.dropout import Dropout
from fmjax.layers.linear import Dense, Initializer, barrier, normal, parameter
from fmjax.layers.norm import LayerNorm
from fmjax.layers.vocabulary import Logits, VocabularyLogits, chunk_rows

Features = Mapping[str, jax.Array]


class Head(Protocol):
    """A Linen module that maps features and a batch to logits."""

    reads_pooled: ClassVar[bool]

    def __call__(self, features: Features, batch: Features) -> Logits: ...


# Builds a Head: partial(module class, ...), whose arguments mypy does not see.
HeadMaker = Callable[..., Any]
HeadTable = Mapping[str, HeadMaker]  # by kind


def chosen(table: HeadTable, heads: contracts.Heads) -> dict[str, HeadMaker]:
    """Returns the builders of the given kinds of head, with the numbers of each."""
    return {kind: partial(table[kind], **numbers) for kind, numbers in heads.items()}


def pooled_is_read(makers: HeadTable) -> bool:
    """Returns whether one of the heads reads the pooled output."""
    return any(make(parent=None).reads_pooled for make in makers.values())


def gather_positions(hidden_BLD: jax.Array, positions_BM: jax.Array) -> jax.Array:
    """Returns the hidden states [B,M,D] at the given positions of each row."""
    return jnp.take_along_axis(hidden_BLD, positions_BM[:, :, None], axis=1)


class Pooled(nn.Module):
    """The pooled output itself, for a model without a head (`BertModel`)."""

    reads_pooled: ClassVar[bool] = True

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns [B,D]."""
        return features["pooled"]


class Classify(nn.Module):
    """Dropout and a linear layer over the pooled output: [B,C]."""

    reads_pooled: ClassVar[bool] = True
    classes: int = 2
    dropout: float = 0.1
    kernel_init: Initializer = normal(0.02)

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,C] in fp32."""
        drop = Dropout(self.dropout)
        return linear_head(self, drop(features["pooled"]))


class ClassifyMean(nn.Module):
    """Dropout and a linear layer over the mean of the hidden states, weighted by the batch's
    `pool_weights [B,L]`."""

    reads_pooled: ClassVar[bool] = False
    classes: int = 2
    dropout: float = 0.1
    kernel_init: Initializer = normal(0.02)

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,C] in fp32."""
        weights = batch["pool_weights"].astype(jnp.float32)
        total = jnp.einsum("BL,BLD->BD", weights, features["hidden"].astype(jnp.float32))
        mean = total / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-6)
        drop = Dropout(self.dropout)
        return linear_head(self, drop(mean))


class Tag(nn.Module):
    """Dropout and a linear layer over every token's hidden state: [B,L,C]."""

    reads_pooled: ClassVar[bool] = False
    classes: int = 2
    dropout: float = 0.1
    kernel_init: Initializer = normal(0.02)

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,L,C] in fp32."""
        drop = Dropout(self.dropout)
        return linear_head(self, drop(features["hidden"]))


def linear_head(head: Any, x: jax.Array) -> jax.Array:
    """Returns the logits [B,C] or [B,L,C] of the last layer of a classifier over [B,D] or [B,L,D].

    Its `kernel` and `bias` are directly in the head; all is in fp32.
    """
    kernel = parameter(
        head, "kernel", head.kernel_init, ("embed", None), (x.shape[-1], head.classes)
    )
    bias = parameter(head, "bias", nn.initializers.zeros_init(), (None,), (head.classes,))
    rows = shard_embedded(x.astype(jnp.float32)).reshape(-1, x.shape[-1])
    return (rows @ kernel + bias[None]).reshape(*x.shape[:-1], head.classes)


class MaskedLm(nn.Module):
    """BERT's masked-language-model head: dense, activation, norm, and a decoder tied to the word
    embedding.

    Where the batch has `masked_positions [B,M]`, logits are computed at those alone.
    """

    activation: Callable[[jax.Array], jax.Array]
    epsilon: float
    reads_pooled: ClassVar[bool] = False
    kernel_init: Initializer = normal(0.02)
    dtype: DTypeLike = jnp.float32
    chunk: int | None = None  # `model.loss_chunk` for a loss; None: an array of logits

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> Logits:
        """Returns logits [B,M,V] (or [B,L,V]) in fp32."""
        x, table_VE = features["hidden"], features["word_table"]
        if "masked_positions" in batch:
            x = gather_positions(x, batch["masked_positions"])
        vocabulary, width = table_VE.shape
        x = Dense((width,), ("embed", None), self.kernel_init, dtype=self.dtype, name="dense")(x)
        x = LayerNorm(self.epsilon, self.dtype, name="norm")(self.activation(x))
        bias = parameter(self, "bias", nn.initializers.zeros_init(), ("vocab",), (vocabulary,))
        gathered = "masked_positions" in batch
        if later := in_chunks(self.chunk, x, table_VE, None, bias, gathered):
            return later
        rows = x.reshape(-1, width)
        logits = (
            jnp.dot(rows, table_VE.astype(self.dtype).T, preferred_element_type=jnp.float32)
            + bias[None]
        )
        return logits.reshape(*x.shape[:-1], vocabulary)


def in_chunks(
    chunk: int | None,
    x: jax.Array,
    table_VE: jax.Array,
    kernel_EV: jax.Array | None,
    bias: jax.Array | None,
    gathered: bool,
) -> VocabularyLogits | None:
    """Returns the logits of x [B,L,E], to be computed in chunks, or None if they are to be whole.

    A kernel, if there is one, takes the place of the table. `gathered` says that L counts chosen
    positions, which the mesh does not divide.
    """
    axes = ("act_batch", None if gathered else "act_length")
    rows = 0 if chunk is None else chunk_rows(chunk, x.shape[:-1], axes, table_VE.shape[0])
    if not rows:
        return None
    return VocabularyLogits(x, table_VE if kernel_EV is None else kernel_EV.T, bias, rows, axes)


FEW = range(2, 33)  # rows for which a CPU computes the transposed product


def project_to_vocabulary(x: jax.Array, table_VE: jax.Array) -> jax.Array:
    """Returns x [rows, E] @ table.T as fp32 [rows, V].

    For the few rows of a decoding step, table @ x.T takes half to all of that product's time on a
    CPU; a barrier keeps XLA from transposing it back. Other devices take the same time for both.
    """

    def usual(x: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.dot(x, table.T, preferred_element_type=jnp.float32)

    def transposed(x: jax.Array, table: jax.Array) -> jax.Array:
        product_VR: jax.Array = barrier(jnp.dot(table, x.T, preferred_element_type=jnp.float32))
        return product_VR.T

    on_cpu = {"cpu": transposed} if x.shape[0] in FEW else {}
    logits: jax.Array = jax.lax.platform_dependent(x, table_VE, default=usual, **on_cpu)
    return logits


class Lm(nn.Module):
    """A language model's head: logits over the vocabulary for the next token, from the word table
    or a kernel of its own.

    Where the batch has `predicted_positions [B,M]`, logits are computed at those alone.
    """

    tied: bool = True
    use_bias: bool = False
    scale: float = 1.0  # of the hidden states
    reads_pooled: ClassVar[bool] = False
    kernel_init: Initializer = normal(0.02)
    dtype: DTypeLike = jnp.float32
    chunk: int | None = None  # `model.loss_chunk` for a loss; None: an array of logits

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> Logits:
        """Returns logits [B,M,V] (or [B,L,V]) in fp32."""
        x, table_VE = features["hidden"], features["word_table"]
        if "predicted_positions" in batch:
            x = gather_positions(x, batch["predicted_positions"])
        vocabulary, width = table_VE.shape
        x = (x * self.scale).astype(self.dtype)
        kernel = bias = None
        if not self.tied:
            axes = ("embed", "vocab")
            kernel = parameter(self, "kernel", self.kernel_init, axes, (width, vocabulary))
        if self.use_bias:
            init = nn.initializers.zeros_init()
            bias = parameter(self, "bias", init, ("vocab",), (vocabulary,))
        gathered = "predicted_positions" in batch
        if later := in_chunks(self.chunk, x, table_VE, kernel, bias, gathered):
            return later
        rows = x.reshape(-1, width)
        # Where the table's width is divided, each device multiplies its own part for all of a few
        # rows: adding up their logits moves less than gathering the table.
        divided = axes_in_force("embed", width) if self.chunk is None and len(rows) < width else ()
        rows = constrain_last(rows, divided)
        if kernel is None:
            logits = project_to_vocabulary(rows, table_VE.astype(self.dtype))
        else:
            logits = jnp.dot(rows, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        if divided:
            logits = constrain_last(logits, (*axes_in_force("vocab", vocabulary), *divided))
        if bias is not None:
            logits = logits + bias[None]
        return logits.reshape(*x.shape[:-1], vocabulary)


def constrain_last(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Divides the last axis of x over mesh axes, and no other; does nothing without any, or if they
    do not divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    if not axes or x.shape[-1] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    spec = PartitionSpec(*[None] * (x.ndim - 1), axes)
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, spec)
    return constrained


class Heads(nn.Module):
    """The heads of a model by kind; the parameters of each are under `head/<kind>`."""

    kinds: HeadTable

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> dict[str, Any]:
        """Returns each head's output by kind: an array, or `VocabularyLogits` where asked for."""
        return {kind: make(name=kind)(features, batch) for kind, make in self.kinds.items()}
