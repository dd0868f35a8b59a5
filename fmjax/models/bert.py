"""BERT (Devlin et al. 2019, arXiv:1810.04805), following Hugging Face's `modeling_bert.py`.

Dimensions: B batch, L length, M masked positions, D width, E embedding width, V vocabulary.
RoBERTa, DistilBERT and ELECTRA are this encoder with other embeddings and heads; see `roberta.py`,
`distilbert.py` and `electra.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmjax import contracts
from fmjax.contracts import Arrays, Batch, Config, HostBatch, Value
from fmjax.distributed.sharding import constrain, shard_embedded
from fmjax.layers.attention import Attention, Context
from fmjax.layers.blocks import PostNorm
from fmjax.layers.dropout import Dropout
from fmjax.layers.heads import (
    Classify,
    ClassifyMean,
    Features,
    HeadMaker,
    Heads,
    HeadTable,
    MaskedLm,
    Pooled,
    Tag,
    chosen,
    linear_head,
    pooled_is_read,
)
from fmjax.layers.linear import Dense, Initializer, embedding, normal
from fmjax.layers.mask import Mask, text_mask
from fmjax.layers.mlp import Mlp, activation
from fmjax.layers.norm import LayerNorm
from fmjax.layers.stack import stack
from fmjax.layers.taps import add_delta
from fmjax.models.inputs import Table, check_length, checked_ids
from fmjax.models.sizes import Compute, check_divides, checked, resolve

# tiny to medium are the miniatures of Turc et al. 2019 (arXiv:1908.08962).
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "layers": 2, "attention_heads": 2, "mlp_width": 512},
    "mini": {"width": 256, "layers": 4, "attention_heads": 4, "mlp_width": 1024},
    "small": {"width": 512, "layers": 4, "attention_heads": 8, "mlp_width": 2048},
    "medium": {"width": 512, "layers": 8, "attention_heads": 8, "mlp_width": 2048},
    "base": {"width": 768, "layers": 12, "attention_heads": 12, "mlp_width": 3072},
    "large": {"width": 1024, "layers": 24, "attention_heads": 16, "mlp_width": 4096},
}


@dataclasses.dataclass(frozen=True)
class Settings(Compute):
    """The settings of a BERT model; `model` in a config."""

    width: int
    layers: int
    attention_heads: int
    mlp_width: int
    vocab_size: int
    positions: int = 512
    position_offset: int = 0
    token_types: int = 2
    embedding_width: int = 0  # 0: same as the layers
    activation: str = "gelu"
    epsilon: float = 1e-12
    initializer_range: float = 0.02
    dropout: float = 0.1
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1


class Embed(nn.Module):
    """Word + position + token-type embeddings, normalized."""

    settings: Settings

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the embedded input [B,L,D] and the word table [V,E]."""
        s = self.settings
        dtype, init = jnp.dtype(s.dtype), normal(s.initializer_range)
        width = s.embedding_width or s.width
        table = partial(embedding, width=width, init=init, dtype=dtype)
        ids = batch["input_ids"]
        positions = batch.get("position_ids", jnp.arange(ids.shape[1], dtype=jnp.int32)[None])

        word = table(s.vocab_size, axis="vocab", name="word")
        position = table(s.positions + s.position_offset, axis=None, name="position")
        x = shard_embedded(word(ids)) + shard_embedded(position(positions + s.position_offset))
        if s.token_types:
            types = batch.get("token_type_ids", jnp.zeros_like(ids))
            x = x + shard_embedded(table(s.token_types, axis=None, name="token_type")(types))
        x = LayerNorm(s.epsilon, dtype, name="norm")(x)
        x = Dropout(s.embedding_dropout)(x)
        if width != s.width:
            x = Dense((s.width,), (None, "embed"), init, dtype=dtype, name="projection")(x)
        return add_delta(
            constrain(x, "act_batch", "act_length", "act_embed"), batch
        ), word.embedding


class Encoder(nn.Module):
    """The stack of layers, and the pooler if a head reads it."""

    settings: Settings
    pool: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask: Mask) -> Arrays:
        """Returns the features `hidden [B,L,D]` and, if pooled, `pooled [B,D]`."""
        s = self.settings
        shared: Config = {
            "kernel_init": normal(s.initializer_range),
            "dtype": jnp.dtype(s.dtype),
        }
        head_width = s.width // s.attention_heads
        block = partial(
            PostNorm,
            attention=partial(
                Attention, s.attention_heads, head_width, s.attention_dropout, **shared
            ),
            mlp=partial(Mlp, s.mlp_width, activation(s.activation), **shared),
            norm=partial(LayerNorm, s.epsilon, jnp.dtype(s.dtype)),
            dropout=s.dropout,
            stochastic_depth=s.stochastic_depth,
        )
        hidden, _ = stack(self, block, s.stacked(s.layers), x_BLD, Context(mask=mask))
        if not self.pool:
            return {"hidden": hidden}
        pooler = Dense((s.width,), ("embed", None), name="pooler", **shared)
        return {"hidden": hidden, "pooled": jnp.tanh(pooler(shard_embedded(hidden[:, 0])))}


class ClassifyFirst(nn.Module):
    """The classifier of BERT's descendants: dense, activation and linear layer over the first
    token's hidden state."""

    activation: Callable[[jax.Array], jax.Array]
    input_dropout: float
    reads_pooled: ClassVar[bool] = False
    classes: int = 2
    dropout: float = 0.1
    kernel_init: Initializer = normal(0.02)

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,C] in fp32."""
        x = Dropout(self.input_dropout)(features["hidden"][:, 0].astype(jnp.float32))
        dense = Dense(x.shape[-1:], ("embed", None), self.kernel_init, name="dense")
        x = self.activation(dense(shard_embedded(x)))
        return linear_head(self, Dropout(self.dropout)(x))


def masked_lm(settings: Settings, name: str) -> HeadMaker:
    """Returns a factory for a masked-language-model head with the named activation."""
    init = normal(settings.initializer_range)
    return partial(
        MaskedLm,
        activation(name),
        settings.epsilon,
        kernel_init=init,
        dtype=jnp.dtype(settings.dtype),
    )


def classify_first(
    settings: Settings, name: str, input_dropout: float, **numbers: Value
) -> HeadMaker:
    """Returns a factory for the classifier of BERT's descendants with the named activation."""
    fixed = {
        "dropout": settings.classifier_dropout,
        "kernel_init": normal(settings.initializer_range),
    }
    return partial(ClassifyFirst, activation(name), input_dropout, **{**fixed, **numbers})


def common_heads(settings: Settings) -> HeadTable:
    """Returns the heads that BERT and all its descendants have."""
    init, dropout = normal(settings.initializer_range), settings.classifier_dropout
    return {
        "classify_mean": partial(ClassifyMean, dropout=dropout, kernel_init=init),
        "tag": partial(Tag, dropout=dropout, kernel_init=init),
        "span": partial(Tag, classes=2, dropout=0.0, kernel_init=init),
    }


def heads_of(settings: Settings) -> HeadTable:
    """Returns a factory for each kind of head that BERT has."""
    init, dropout = normal(settings.initializer_range), settings.classifier_dropout
    return {
        "pooled": Pooled,
        "mlm": masked_lm(settings, settings.activation),
        "nsp": partial(Classify, classes=2, dropout=0.0, kernel_init=init),
        "classify": partial(Classify, dropout=dropout, kernel_init=init),
        "choice": partial(Classify, classes=1, dropout=dropout, kernel_init=init),
        **common_heads(settings),
    }


class Bert(nn.Module):
    """Maps a batch to features: `hidden [B,L,D]`, `pooled [B,D]` if a head reads it, and each
    head's output by kind.

    Inputs: `input_ids [B,L]`; optionally `position_ids`, `token_type_ids` [B,L], `attention_mask
    [B,L]` (masks keys, as the reference does), `segment_ids [B,L]` (packed rows; 0 is padding) and
    `embedded_delta [B,L,D]`. An example of several texts, as in multiple choice, is [B,N,L]: the
    outputs then are [B,N,...].
    """

    heads: contracts.Heads
    settings: Settings
    table: Callable[[Value], HeadTable] = heads_of  # factories from the family's settings

    def head_makers(self) -> HeadTable:
        """Returns a factory for each kind of head that the family has."""
        return self.table(self.settings)

    @nn.compact
    def __call__(self, batch: Batch) -> Arrays:
        kinds = chosen(self.head_makers(), self.heads)
        rows = batch["input_ids"].shape[:-1]
        batch = {
            name: flat_rows(array, rows, 2 if name == "embedded_delta" else 1)
            for name, array in batch.items()
        }
        x, word_table = Embed(self.settings, name="embed")(batch)
        encoder = Encoder(self.settings, pooled_is_read(kinds), name="encoder")
        features = encoder(x, text_mask(batch))
        features |= Heads(kinds, name="head")(features | {"word_table": word_table}, batch)
        return {name: array.reshape(*rows, *array.shape[1:]) for name, array in features.items()}

    def one_row_batch(self) -> Batch:
        """Returns a batch of one token, with everything that a head may read."""
        return {"input_ids": jnp.zeros((1, 1), jnp.int32), "pool_weights": jnp.zeros((1, 1))}

    def forward_flops(self, batch: Mapping[str, Value]) -> float:
        """Returns the floating-point operations of one forward pass over a batch: those of its
        matrix products, by formula."""
        s = self.settings
        *rows, length = batch["input_ids"].shape
        predicted = batch["masked_positions"].shape[1] if "masked_positions" in batch else length
        width, embedded = s.width, s.embedding_width or s.width
        layer = 4 * width * width + 2 * width * s.mlp_width + 2 * width * length
        token = s.layers * layer + (embedded * width if embedded != width else 0)
        head = predicted * embedded * (width + s.vocab_size) if "mlm" in self.heads else 0
        return float(2 * math.prod(rows) * (length * token + head))


def flat_rows(array: jax.Array, rows: tuple[int, ...], inner: int) -> jax.Array:
    """Returns an array [*rows, ...] with `inner` further axes as [B, ...]; other arrays
    unchanged."""
    own = array.shape[array.ndim - inner :]
    return array.reshape(-1, *own) if array.shape == (*rows, *own) else array


def build(*, heads: contracts.Heads, size: str = "base", **settings: Value) -> Bert:
    """Returns a BERT of a named size (SIZES) with the given heads; other settings are the fields of
    Settings.

    Raises UserError for an unknown size, setting or head, and for sizes that do not fit together.
    """
    return checked_model(Bert(heads, resolve(Settings, SIZES, size, settings)))


def checked_model(model: Bert) -> Bert:
    """Returns the model, checked; see `sizes.checked`."""
    check_divides("width", model.settings.width, "attention_heads", model.settings.attention_heads)
    return checked(model)


INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def checked_batch(arrays: HostBatch, settings: Settings) -> dict[str, np.ndarray]:
    """Returns the batch of the inputs, [B,L] or [B,N,L]: ids as int32, positions counted from 0,
    the mask as bool.

    Raises UserError, naming the value and the table, for an id without an embedding, and for rows
    that are too long.
    """
    tables = {
        "input_ids": Table("vocabulary", settings.vocab_size),
        "token_type_ids": Table("token-type table", settings.token_types),
        "position_ids": Table("position table", settings.positions, settings.position_offset),
    }
    if "position_ids" not in arrays:
        check_length(arrays["input_ids"].shape[-1], settings.positions)
    return checked_ids(arrays, tables)
