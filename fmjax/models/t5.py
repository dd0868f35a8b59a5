"""T5 (Raffel et al. 2020, arXiv:1910.10683), following Hugging Face's `modeling_t5.py`; also T5
v1.1, FLAN and mT5.

Dimensions: B batch, S source length, T target length, L either, D width, H heads, V vocabulary. No
biases, no scaling of scores (initialization does it), norms without a mean, and positions only as a
bias on the scores of self-attention: one table for all layers number of encoder layers, another for
those of the decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmjax import contracts
from fmjax.contracts import Arrays, Batch, Config, HostBatch, Value
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.distributed.sharding import constrain
from fmjax.errors import UserError, nearest
from fmjax.layers.attention import Attention, Context, CrossAttention
from fmjax.layers.bias import RelativeBias
from fmjax.layers.blocks import Caches, PreNorm
from fmjax.layers.cache import (
    Cache,
    decoder_context,
    empty_cache,
    encoder_mask,
    memory_mask,
    shift_right,
)
from fmjax.layers.dropout import Dropout
from fmjax.layers.heads import ClassifyMean, Heads, HeadTable, Lm, chosen
from fmjax.layers.linear import embedding, normal, parameter
from fmjax.layers.mlp import GatedMlp, Mlp, activation
from fmjax.layers.norm import RmsNorm
from fmjax.layers.stack import stack
from fmjax.layers.taps import add_delta
from fmjax.models.inputs import Table, checked_ids
from fmjax.models.sizes import Compute, checked, resolve


def sizes(
    width: int, mlp_width: int, layers: int, heads: int, head_width: int = 64, **others: Value
) -> Config:
    """Returns a size whose decoder is as deep as its encoder."""
    widths = {
        "width": width,
        "mlp_width": mlp_width,
        "attention_heads": heads,
        "head_width": head_width,
    }
    return widths | {"layers": layers, "decoder_layers": layers} | others


V1_1: Config = {"feed_forward": "gated-gelu", "tied": False}
# FLAN and mT5 have the sizes of v1.1, mT5 with 250,112 embeddings. tiny is not a published model.
SIZES: dict[str, Config] = {
    "tiny": sizes(128, 512, 2, 4, 32),
    "small": sizes(512, 2048, 6, 8),
    "base": sizes(768, 3072, 12, 12),
    "large": sizes(1024, 4096, 24, 16),
    "3b": sizes(1024, 16384, 24, 32, 128),
    "11b": sizes(1024, 65536, 24, 128, 128),
    "v1_1-small": sizes(512, 1024, 8, 6, **V1_1),
    "v1_1-base": sizes(768, 2048, 12, 12, **V1_1),
    "v1_1-large": sizes(1024, 2816, 24, 16, **V1_1),
    "v1_1-xl": sizes(2048, 5120, 24, 32, **V1_1),
    "v1_1-xxl": sizes(4096, 10240, 24, 64, **V1_1),
}

# The reference's names -> the feed-forward layer and its activation. Its "gated-gelu" has the tanh
# approximation.
FEED_FORWARD: dict[str, tuple[type[Mlp], str]] = {
    "relu": (Mlp, "relu"),
    "gated-gelu": (GatedMlp, "gelu_new"),
    "gated-silu": (GatedMlp, "silu"),
}


@dataclasses.dataclass(frozen=True)
class Settings(Compute):
    """The settings of a T5 model; `model` in a config."""

    width: int
    layers: int  # of the encoder
    decoder_layers: int  # 0: encoder only
    attention_heads: int
    head_width: int
    mlp_width: int
    vocab_size: int
    positions: int = 0  # no limit
    buckets: int = 32  # of distances
    max_distance: int = 128  # all larger distances share a bucket
    feed_forward: str = "relu"  # or gated-gelu, gated-silu
    # whether logits come from the word table; hidden states are then scaled by D^-1/2
    tied: bool = True
    start_id: int = 0  # what the decoder reads first: padding
    epsilon: float = 1e-6
    initializer_factor: float = 1.0
    dropout: float = 0.1
    attention_dropout: float | None = None  # None: same as dropout


RENAMED = {"furthest": "max_distance"}  # settings of older configs


class Embed(nn.Module):
    """The word table, which the encoder and the decoder share."""

    settings: Settings

    def setup(self) -> None:
        s = self.settings
        init, dtype = normal(s.initializer_factor), jnp.dtype(s.dtype)
        self.word = embedding(s.vocab_size, s.width, axis="vocab", init=init, dtype=dtype)

    def __call__(self, batch: Batch, prefix: str = "") -> jax.Array:
        """Returns [B,L,D]; `prefix` is "decoder_" for the target."""
        x = constrain(
            self.word(batch[f"{prefix}input_ids"]), "act_batch", "act_length", "act_embed"
        )
        return add_delta(x, batch, prefix)

    def table(self) -> jax.Array:
        """Returns [V,D]."""
        table: jax.Array = self.word.embedding
        return table


class T5Stack(nn.Module):
    """Relative positions, a stack of layers, and a norm: the encoder or, with `cross`, the
    decoder."""

    settings: Settings
    layers: int
    cross: type[CrossAttention] | None = None

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: Context, caches: Sequence[Caches] | None = None
    ) -> tuple[jax.Array, tuple[Caches, ...] | None]:
        """Maps [B,L,D] to [B,L,D]; the decoder also takes and returns its layers' caches."""
        s = self.settings
        dtype, drop = (
            jnp.dtype(s.dtype),
            Dropout(s.dropout),
        )
        keys = x_BLD.shape[1] if caches is None else caches[0]["attention"]["key"].shape[2]
        wide, inner = (
            s.initializer_factor * s.width**-0.5,
            s.initializer_factor * (s.attention_heads * s.head_width) ** -0.5,
        )
        # Scores are not scaled by K^-1/2; instead, queries start smaller by that factor.
        inits = {"query": normal(wide * s.head_width**-0.5), "out": normal(inner)}
        attending: Config = {
            "scale": 1.0,
            "biased": (),
            "dtype": dtype,
            "kernel_init": normal(wide),
            "inits": inits,
        }
        weights = s.dropout if s.attention_dropout is None else s.attention_dropout
        attend = (s.attention_heads, s.head_width, weights)
        mlp, act = FEED_FORWARD[s.feed_forward]
        down = normal(s.initializer_factor * s.mlp_width**-0.5)
        block = partial(
            PreNorm,
            attention=partial(Attention, *attend, **attending),
            mlp=partial(
                mlp, s.mlp_width, activation(act), normal(wide), dtype, False, down, s.dropout
            ),
            norm=partial(RmsNorm, s.epsilon, dtype),
            dropout=s.dropout,
            stochastic_depth=s.stochastic_depth,
            cross=self.cross and partial(self.cross, *attend, **attending),
        )
        context = dataclasses.replace(context, bias=self.bias(x_BLD.shape[1], keys, context))
        x_BLD, after = stack(self, block, s.stacked(self.layers), drop(x_BLD), context, caches)
        return drop(RmsNorm(s.epsilon, dtype, name="norm")(x_BLD)), after

    def bias(self, length: int, keys: int, context: Context) -> RelativeBias:
        """Returns what is added to scores, by the distances between keys and `length` queries."""
        s = self.settings
        init = normal(s.initializer_factor * s.width**-0.5)
        table = parameter(self, "relative", init, (None, "heads"), (s.buckets, s.attention_heads))
        # This is also correct for packed rows: the tokens of a text are adjacent, and those of
        # others are masked.
        bias = RelativeBias(
            jnp.asarray(table), self.cross is None, s.max_distance, context.distances
        )
        return bias.made_for(length, keys)


class T5(nn.Module):
    """Maps a batch to features: `hidden [B,T,D]` of the decoder, `encoder_hidden [B,S,D]`, and each
    head's output by kind.

    Inputs: `input_ids [B,S]`, `decoder_input_ids [B,T]` or the `labels [B,T]` that they would
    predict; optionally `attention_mask [B,S]` and `decoder_attention_mask [B,T]`, which mask keys,
    `embedded_delta [B,S,D]` and `decoder_embedded_delta [B,T,D]`. Without a decoder, `hidden` is
    the encoder's. In packed rows, `segment_ids [B,S]` and `decoder_segment_ids [B,T]` separate the
    pairs; each target begins where `decoder_position_ids [B,T]` is 0.
    """

    heads: contracts.Heads
    settings: Settings
    packs: ClassVar[bool] = True
    encoder_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def setup(self) -> None:
        s = self.settings
        self.embed = Embed(s)
        self.encoder = T5Stack(s, s.layers)
        if s.decoder_layers:
            self.decoder = T5Stack(s, s.decoder_layers, CrossAttention)
        self.head = Heads(chosen(self.head_makers(), self.heads))

    def head_makers(self) -> HeadTable:
        """Returns a factory for each kind of head that the family has."""
        s = self.settings
        # The reference initializes an untied head at order 1, which makes the first losses huge;
        # T5's own code does it as here.
        init = normal(s.initializer_factor * s.width**-0.5)
        if not s.decoder_layers:
            return {"classify_mean": partial(ClassifyMean, dropout=s.dropout, kernel_init=init)}
        scale = s.width**-0.5 if s.tied else 1.0
        return {"lm": partial(Lm, s.tied, scale=scale, kernel_init=init, dtype=jnp.dtype(s.dtype))}

    @property
    def start_id(self) -> int:
        return self.settings.start_id

    def encode(self, batch: Batch) -> Arrays:
        """Returns the memory: `hidden [B,S,D]`, and `mask [B,S]` bool or, for packed rows,
        `segments [B,S]`, if given."""
        given, mask = encoder_mask(batch)
        hidden, _ = self.encoder(self.embed(batch), Context(mask=mask))
        return {"hidden": hidden} | given

    def decode(
        self, batch: Batch, memory: Batch, cache: Cache | None
    ) -> tuple[Arrays, Cache | None]:
        """Returns the features and heads' outputs of `decoder_input_ids`, and the cache with their
        keys and values."""
        context, _, moved = decoder_context(batch, cache, "decoder_")
        context = dataclasses.replace(
            context, memory=memory["hidden"], memory_mask=memory_mask(batch, memory)
        )
        hidden, layers = self.decoder(
            self.embed(batch, "decoder_"), context, None if cache is None else cache["layers"]
        )
        features = {"hidden": hidden}
        outputs = features | self.head(features | {"word_table": self.embed.table()}, batch)
        return outputs, None if moved is None else {**moved, "layers": layers}

    def empty_cache(self, rows: int, length: int) -> Cache:
        """Returns a cache with room for `length` target tokens in each row."""
        s = self.settings
        return empty_cache(
            s.decoder_layers, rows, length, s.attention_heads, s.head_width, jnp.dtype(s.dtype)
        )

    def __call__(self, batch: Batch) -> Arrays:
        memory = self.encode(batch)
        if not self.settings.decoder_layers:
            features = {"hidden": memory["hidden"]}
            return features | self.head(features, batch)
        if "decoder_input_ids" not in batch:
            ids = shift_right(
                batch["labels"], self.settings.start_id, batch.get("decoder_position_ids")
            )
            batch = {**batch, "decoder_input_ids": ids}
        outputs, _ = self.decode(batch, memory, None)
        return outputs | {"encoder_hidden": memory["hidden"]}

    def one_row_batch(self) -> Batch:
        """Returns a batch of one token, with everything that a head may read."""
        token = jnp.zeros((1, 1), jnp.int32)
        return {"input_ids": token, "labels": token, "pool_weights": jnp.zeros((1, 1))}

    def forward_flops(self, batch: Mapping[str, Value]) -> float:
        """Returns the floating-point operations of one forward pass over a batch: those of its
        matrix products, by formula."""
        s = self.settings
        rows, source = batch["input_ids"].shape
        target = batch.get("decoder_input_ids", batch.get("labels", batch["input_ids"])).shape[1]
        inner = s.attention_heads * s.head_width
        mlp = (3 if FEED_FORWARD[s.feed_forward][0] is GatedMlp else 2) * s.width * s.mlp_width
        total = s.layers * source * (4 * s.width * inner + mlp + 2 * inner * source)
        token = 6 * s.width * inner + mlp + 2 * inner * (target + source)
        total += s.decoder_layers * (target * token + source * 2 * s.width * inner)
        return float(
            2 * rows * (total + (target * s.width * s.vocab_size if "lm" in self.heads else 0))
        )


def build(*, heads: contracts.Heads, size: str = "small", **settings: Value) -> T5:
    """Returns a T5 of a named size (SIZES) with the given heads; other settings are the fields of
    Settings.

    Raises UserError for an unknown size, setting, head or feed-forward layer, and for sizes that do
    not fit together.
    """
    resolved = resolve(
        Settings, SIZES, size, {RENAMED.get(name, name): value for name, value in settings.items()}
    )
    if resolved.feed_forward not in FEED_FORWARD:
        hint = nearest(resolved.feed_forward, FEED_FORWARD)
        known = ", ".join(FEED_FORWARD)
        raise UserError(
            f'model.feed_forward="{resolved.feed_forward}" is not known{hint}; '
            f"choose one of {known}"
        )
    if resolved.buckets < 4 or resolved.max_distance <= resolved.buckets // 2:
        raise UserError(
            f"model.buckets={resolved.buckets}, model.max_distance={resolved.max_distance}: half "
            "of the buckets hold one distance each; use at least 4 buckets, and a "
            "model.max_distance above half their number"
        )
    return checked(T5(heads, resolved))


def settings_from_tokenizer(tokenizer: Tokenizer) -> Config:
    """Returns the settings of a new model that its tokenizer determines."""
    return {"start_id": tokenizer.pad_id}


INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels")


def checked_batch(arrays: HostBatch, settings: Settings) -> dict[str, np.ndarray]:
    """Returns the batch of the inputs: ids [B,S] and [B,T] as int32, masks as bool.

    Raises UserError for an id without an embedding, if the decoder's input is missing, and if there
    is no decoder for it.
    """
    target = {name for name in arrays if name.startswith("decoder_")} | ({"labels"} & set(arrays))
    if target and not settings.decoder_layers:
        raise UserError(
            f"{min(target)}: this model is only an encoder; leave it out, or load a model with a "
            "decoder"
        )
    if settings.decoder_layers and not target & {"decoder_input_ids", "labels"}:
        raise UserError(
            "decoder_input_ids is missing; pass it, or the labels to predict, or use .generate"
        )
    table = Table("vocabulary", settings.vocab_size)
    return checked_ids(arrays, dict.fromkeys(("input_ids", "decoder_input_ids", "labels"), table))
