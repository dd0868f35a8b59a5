"""Heads that any encoder can carry. Each maps the encoder's features and the batch to logits.

A head that reads the pooled output says so in `reads_pooled`; the model builds its pooler only then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.distributed.sharding import shard_embedded
from fmjax.layers.linear import Dense, Initializer, normal, parameter
from fmjax.layers.norm import LayerNorm

Features = Mapping[str, jax.Array]


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
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        return linear_head(self, drop(features["pooled"]))


class ClassifyMean(nn.Module):
    """Dropout and a linear layer over the mean of the hidden states, weighted by the batch's `pool_weights [B,L]`."""

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
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
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
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        return linear_head(self, drop(features["hidden"]))


def linear_head(head: Any, x: jax.Array) -> jax.Array:
    """The last layer of a classifier, over [B,D] or [B,L,D], in fp32.

    Its `kernel` and `bias` are directly in the head.
    """
    kernel = parameter(head, "kernel", head.kernel_init, ("embed", None), (x.shape[-1], head.classes))
    bias = parameter(head, "bias", nn.initializers.zeros_init(), (None,), (head.classes,))
    rows = shard_embedded(x.astype(jnp.float32)).reshape(-1, x.shape[-1])
    return (rows @ kernel + bias[None]).reshape(*x.shape[:-1], head.classes)


class MaskedLm(nn.Module):
    """BERT's masked-language-model head: dense, activation, norm, and a decoder tied to the word embedding.

    Where the batch has `masked_positions [B,M]`, logits are computed at those alone.
    """

    activation: Callable[[jax.Array], jax.Array]
    epsilon: float
    reads_pooled: ClassVar[bool] = False
    kernel_init: Initializer = normal(0.02)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,M,V] (or [B,L,V]) in fp32."""
        x, table_VE = features["hidden"], features["word_table"]
        if "masked_positions" in batch:
            x = gather_positions(x, batch["masked_positions"])
        vocabulary, width = table_VE.shape
        x = Dense((width,), ("embed", None), self.kernel_init, dtype=self.dtype, name="dense")(x)
        x = LayerNorm(self.epsilon, self.dtype, name="norm")(self.activation(x))
        bias = parameter(self, "bias", nn.initializers.zeros_init(), ("vocab",), (vocabulary,))
        rows = x.reshape(-1, width)
        logits = jnp.dot(rows, table_VE.astype(self.dtype).T, preferred_element_type=jnp.float32) + bias[None]
        return logits.reshape(*x.shape[:-1], vocabulary)


FEW = range(2, 33)  # rows for which a CPU takes the product with a table the other way round


def scores(x: jax.Array, table_VE: jax.Array) -> jax.Array:
    """Returns x [rows, E] @ table.T as fp32 [rows, V].

    For the few rows of a step of decoding, table @ x.T takes a half to all of that product's time on a CPU; a barrier keeps
    XLA from turning it back. Other devices take either in the same time.
    """

    def usual(x: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.dot(x, table.T, preferred_element_type=jnp.float32)

    def turned(x: jax.Array, table: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(jnp.dot(table, x.T, preferred_element_type=jnp.float32)).T

    on_cpu = {"cpu": turned} if x.shape[0] in FEW else {}
    return jax.lax.platform_dependent(x, table_VE, default=usual, **on_cpu)


class Lm(nn.Module):
    """A language model's head: logits over the vocabulary for the next token, from the word table or a kernel of its own.

    Where the batch has `predicted_positions [B,M]`, logits are computed at those alone.
    """

    tied: bool = True
    use_bias: bool = False
    scale: float = 1.0  # of the hidden states
    reads_pooled: ClassVar[bool] = False
    kernel_init: Initializer = normal(0.02)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,M,V] (or [B,L,V]) in fp32."""
        x, table_VE = features["hidden"], features["word_table"]
        if "predicted_positions" in batch:
            x = gather_positions(x, batch["predicted_positions"])
        vocabulary, width = table_VE.shape
        rows = (x * self.scale).astype(self.dtype).reshape(-1, width)
        if self.tied:
            logits = scores(rows, table_VE.astype(self.dtype))
        else:
            kernel = parameter(self, "kernel", self.kernel_init, ("embed", "vocab"), (width, vocabulary))
            logits = jnp.dot(rows, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        if self.use_bias:
            logits = logits + parameter(self, "bias", nn.initializers.zeros_init(), ("vocab",), (vocabulary,))[None]
        return logits.reshape(*x.shape[:-1], vocabulary)


class Heads(nn.Module):
    """The heads of a model by kind; the parameters of each stand under `head/<kind>`."""

    kinds: Mapping[str, Callable[..., nn.Module]]

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> dict[str, jax.Array]:
        """Returns each head's output by kind."""
        return {kind: make(name=kind)(features, batch) for kind, make in self.kinds.items()}
