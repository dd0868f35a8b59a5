"""The Transformer (Vaswani et al. 2017, arXiv:1706.03762), encoder and decoder, following Hugging
Face's `modeling_marian.py`.

Sinusoidal positions, normalization after each sum, one table for source, target and output: the
translation models of Marian (opus-mt). Dimensions: B batch, S source length, L target length, D
width, V vocabulary. BART and mBART are this model with another `Form`; see `bart.py` and
`mbart.py`.
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
from fmjax.distributed.sharding import constrain, shard_embedded
from fmjax.errors import UserError
from fmjax.layers.attention import Attention, Context, CrossAttention
from fmjax.layers.blocks import Caches, PostNorm, PreNorm
from fmjax.layers.cache import (
    Cache,
    decoder_context,
    empty_cache,
    encoder_mask,
    memory_mask,
    shift_right,
)
from fmjax.layers.dropout import Dropout
from fmjax.layers.heads import Heads, HeadTable, Lm, chosen
from fmjax.layers.linear import embedding, normal
from fmjax.layers.mlp import Mlp, activation
from fmjax.layers.norm import LayerNorm
from fmjax.layers.position import sinusoids
from fmjax.layers.stack import stack
from fmjax.layers.taps import add_delta
from fmjax.models.inputs import Table, check_length, checked_ids
from fmjax.models.sizes import Compute, check_divides, checked, resolve

Memory = dict[str, jax.Array]

# tiny: Wu et al. 2021 (arXiv:2105.14462); base and big: Vaswani et al. 2017, as in opus-mt.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "layers": 4, "attention_heads": 4, "mlp_width": 256},
    "base": {"width": 512, "layers": 6, "attention_heads": 8, "mlp_width": 2048},
    "big": {"width": 1024, "layers": 6, "attention_heads": 16, "mlp_width": 4096},
}


@dataclasses.dataclass(frozen=True)
class Settings(Compute):
    """The settings of a Transformer; `model` in a config. 0 for the decoder means the same as the
    encoder."""

    width: int
    layers: int
    attention_heads: int
    mlp_width: int
    vocab_size: int
    decoder_layers: int = 0
    decoder_attention_heads: int = 0
    decoder_mlp_width: int = 0
    target_vocab_size: int = 0  # 0: the source's vocabulary and its table
    positions: int = 512
    start_id: int = 0  # what the decoder reads first; padding in Marian
    end_id: int = 0  # the token that ends a text
    scale_embedding: bool = True  # by the square root of the width
    tied: bool = True  # whether the logits use the target's table
    activation: str = "relu"
    initializer_range: float = 0.02
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Form:
    """The differences between the Transformer, BART and mBART."""

    block: type[PostNorm | PreNorm] = PostNorm
    learned_positions: bool = False  # followed by a norm; otherwise sinusoids
    final_norm: bool = False  # norm of the output of the encoder and the decoder


POSITION_OFFSET = 2  # rows of a learned position table before the first position


class Embed(nn.Module):
    """The word table, and the target's own if the vocabularies differ."""

    settings: Settings

    def setup(self) -> None:
        s = self.settings
        table = partial(
            embedding,
            width=s.width,
            axis="vocab",
            init=normal(s.initializer_range),
            dtype=jnp.dtype(s.dtype),
        )
        self.word = table(s.vocab_size)
        if s.target_vocab_size:
            self.target = table(s.target_vocab_size)

    def __call__(self, batch: Batch, prefix: str = "") -> jax.Array:
        """Returns the embedded words [B,L,D], scaled; `prefix` is "decoder_" for the target."""
        s = self.settings
        table = self.target if prefix and s.target_vocab_size else self.word
        x = table(batch[f"{prefix}input_ids"])
        return add_delta(
            shard_embedded(x * s.width**0.5 if s.scale_embedding else x), batch, prefix
        )

    def output_table(self) -> jax.Array:
        """Returns the table [V,D] that computes the logits."""
        table: jax.Array = (self.target if self.settings.target_vocab_size else self.word).embedding
        return table


def decoder_numbers(settings: Settings) -> tuple[int, int, int]:
    """Returns the decoder's layers and heads, and the width of its feed-forward layers."""
    s = settings
    return (
        s.decoder_layers or s.layers,
        s.decoder_attention_heads or s.attention_heads,
        s.decoder_mlp_width or s.mlp_width,
    )


class TransformerStack(nn.Module):
    """The encoder, or the decoder, which has cross-attention: positions and the stack of layers."""

    settings: Settings
    form: Form
    decoder: bool = False

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        places: int,
        context: Context,
        caches: Sequence[Caches] | None = None,
    ) -> tuple[jax.Array, tuple[Caches, ...] | None]:
        """Maps embedded words [B,L,D], at positions less than `places`, to hidden states; also
        returns the caches.

        Raises UserError for more words than there are positions.
        """
        s = self.settings
        layers, heads, width = (
            decoder_numbers(s) if self.decoder else (s.layers, s.attention_heads, s.mlp_width)
        )
        dtype = jnp.dtype(s.dtype)
        shared: Config = {"kernel_init": normal(s.initializer_range), "dtype": dtype}
        sizes = (heads, s.width // heads, s.attention_dropout)
        norm = partial(LayerNorm, 1e-5, dtype)
        block = partial(
            self.form.block,
            attention=partial(Attention, *sizes, **shared),
            mlp=partial(
                Mlp, width, activation(s.activation), dropout=s.activation_dropout, **shared
            ),
            norm=norm,
            dropout=s.dropout,
            stochastic_depth=s.stochastic_depth,
            cross=partial(CrossAttention, *sizes, **shared) if self.decoder else None,
        )
        if (length := x_BLD.shape[1]) > s.positions:
            raise UserError(
                f"{length} tokens exceed model.positions={s.positions}; "
                "raise it, or shorten the texts"
            )
        if self.form.learned_positions:
            init = normal(s.initializer_range)
            table = embedding(
                s.positions + POSITION_OFFSET,
                s.width,
                axis=None,
                init=init,
                dtype=dtype,
                name="position",
            )
            x = norm(name="norm")(x_BLD + table(positions_BL + POSITION_OFFSET))
        else:
            x = x_BLD + jnp.asarray(sinusoids(places, x_BLD.shape[-1]))[positions_BL].astype(
                x_BLD.dtype
            )
        x = Dropout(s.dropout)(x)
        x = constrain(x, "act_batch", "act_length", "act_embed")
        x, after = stack(self, block, s.stacked(layers), x, context, caches)
        return norm(name="final_norm")(x) if self.form.final_norm else x, after


class Transformer(nn.Module):
    """Maps a batch to features: `hidden [B,L,D]`, the decoder's, `encoder_hidden [B,S,D]`, and each
    head's output by kind.

    Inputs: `input_ids [B,S]`, `decoder_input_ids [B,L]` or the `labels` that they would predict;
    optionally `attention_mask [B,S]` and `decoder_attention_mask [B,L]` (mask keys, as the
    reference does), `embedded_delta [B,S,D]` and `decoder_embedded_delta [B,L,D]`. In packed rows,
    `segment_ids`, `position_ids` [B,S] and `decoder_segment_ids`, `decoder_position_ids` [B,L]
    separate the pairs.
    """

    heads: contracts.Heads
    settings: Settings
    form: Form = Form()
    packs: ClassVar[bool] = True
    encoder_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def setup(self) -> None:
        self.embed = Embed(self.settings)
        self.encoder = TransformerStack(self.settings, self.form)
        self.decoder = TransformerStack(self.settings, self.form, decoder=True)
        self.head = Heads(chosen(self.head_makers(), self.heads))

    def head_makers(self) -> HeadTable:
        """Returns a factory for each kind of head that the family has."""
        s = self.settings
        init = normal(s.initializer_range)
        return {
            "lm": partial(
                Lm, tied=s.tied, use_bias=True, kernel_init=init, dtype=jnp.dtype(s.dtype)
            )
        }

    @property
    def start_id(self) -> int:
        """The token that the decoder starts with."""
        return self.settings.start_id

    def encode(self, batch: Batch) -> Memory:
        """Returns the memory: `hidden [B,S,D]`, and `mask [B,S]` bool or, for packed rows,
        `segments [B,S]`, if given."""
        ids, (given, mask) = batch["input_ids"], encoder_mask(batch)
        positions = batch.get("position_ids", jnp.arange(ids.shape[1], dtype=jnp.int32)[None])
        hidden, _ = self.encoder(self.embed(batch), positions, ids.shape[1], Context(mask=mask))
        return {"hidden": hidden} | given

    def decode(
        self, batch: Batch, memory: Memory, cache: Cache | None
    ) -> tuple[Arrays, Cache | None]:
        """Returns the features of `decoder_input_ids [B,L]`, and the cache with their keys and
        values and the memory's."""
        ids = batch["decoder_input_ids"]
        context, positions, cache = decoder_context(batch, cache, "decoder_")
        context = dataclasses.replace(
            context, memory=memory["hidden"], memory_mask=memory_mask(batch, memory)
        )
        places = ids.shape[1] if cache is None else cache["mask"].shape[1]
        caches = None if cache is None else cache["layers"]
        hidden, caches = self.decoder(
            self.embed(batch, "decoder_"), positions, places, context, caches
        )
        features = {"hidden": hidden}
        outputs = self.head(features | {"word_table": self.embed.output_table()}, batch)
        return features | outputs, None if cache is None else {**cache, "layers": caches}

    def empty_cache(self, rows: int, length: int) -> Cache:
        """Returns a cache with room for `length` target tokens in each row."""
        layers, heads, _ = decoder_numbers(self.settings)
        return empty_cache(
            layers,
            rows,
            length,
            heads,
            self.settings.width // heads,
            jnp.dtype(self.settings.dtype),
        )

    def __call__(self, batch: Batch) -> Arrays:
        if "decoder_input_ids" not in batch:
            ids = shift_right(
                batch["labels"], self.settings.start_id, batch.get("decoder_position_ids")
            )
            batch = {**batch, "decoder_input_ids": ids}
        memory = self.encode(batch)
        features, _ = self.decode(batch, memory, None)
        return {**features, "encoder_hidden": memory["hidden"]}

    def one_row_batch(self) -> Batch:
        """Returns a batch of one token on each side."""
        return {name: jnp.zeros((1, 1), jnp.int32) for name in ("input_ids", "decoder_input_ids")}

    def forward_flops(self, batch: Mapping[str, Value]) -> float:
        """Returns the floating-point operations of one forward pass over a batch: those of its
        matrix products, by formula."""
        s = self.settings
        rows, source = batch["input_ids"].shape
        target = batch["decoder_input_ids" if "decoder_input_ids" in batch else "labels"].shape[1]
        width, (layers, _, mlp) = s.width, decoder_numbers(s)
        encoder = (
            s.layers * source * (4 * width * width + 2 * width * s.mlp_width + 2 * width * source)
        )
        decoder = (
            layers * target * (6 * width * width + 2 * width * mlp + 2 * width * (source + target))
        )
        memory = layers * source * 2 * width * width
        head = target * width * (s.target_vocab_size or s.vocab_size) if "lm" in self.heads else 0
        return float(2 * rows * (encoder + decoder + memory + head))


def build(*, heads: contracts.Heads, size: str = "base", **settings: Value) -> Transformer:
    """Returns a Transformer of a named size (SIZES) with the given heads; other settings are the
    fields of Settings.

    Raises UserError for an unknown size, setting or head, and for sizes that do not fit together.
    """
    return checked_model(Transformer(heads, resolve(Settings, SIZES, size, settings)))


def checked_model(model: Transformer) -> Transformer:
    """Returns the model, checked, including the decoder's numbers. Raises UserError like
    `sizes.checked`."""
    s, vocabulary = model.settings, model.settings.target_vocab_size or model.settings.vocab_size
    check_divides("width", s.width, "attention_heads", s.attention_heads)
    if s.decoder_attention_heads:
        check_divides("width", s.width, "decoder_attention_heads", s.decoder_attention_heads)
    if not 0 <= s.start_id < vocabulary:
        raise UserError(
            f"model.start_id={s.start_id} is not in the target's vocabulary of {vocabulary} "
            "tokens; correct it"
        )
    return checked(model)


def settings_from_tokenizer(tokenizer: Tokenizer) -> Config:
    """Returns the settings of a new model that its tokenizer determines: the decoder starts from
    padding, as in Marian."""
    return {"start_id": tokenizer.pad_id, "end_id": ending(tokenizer)}


def ending(tokenizer: Tokenizer) -> int:
    """Returns the token that ends a text. Raises UserError if there is none."""
    return tokenizer.eos_id if tokenizer.end_id is None else tokenizer.end_id


INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


def checked_batch(arrays: HostBatch, settings: Settings) -> dict[str, np.ndarray]:
    """Returns the batch of the inputs: ids [B,S] and [B,L] as int32, masks as bool.

    Raises UserError, naming the value and the table, for an id without an embedding, for rows that
    are too long, and if the decoder's ids are missing.
    """
    if "decoder_input_ids" not in arrays:
        raise UserError(
            "decoder_input_ids is missing; pass the decoder's input, beginning with the start "
            "token, or use .generate"
        )
    tables = {
        "input_ids": Table("vocabulary", settings.vocab_size),
        "decoder_input_ids": Table("vocabulary", settings.target_vocab_size or settings.vocab_size),
    }
    for name in tables:
        check_length(arrays[name].shape[1], settings.positions)
    return checked_ids(arrays, tables)
