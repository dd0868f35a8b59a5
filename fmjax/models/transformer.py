"""The Transformer (Vaswani et al. 2017, arXiv:1706.03762), encoder and decoder, following Hugging Face's `modeling_marian.py`.

Sinusoidal positions, normalisation after each sum, one table for source, target and output. Reads and writes the
translation models of Marian (opus-mt). Letters: B batch, S source length, L target length, D width, V vocabulary.
BART and mBART are this model with other edges; see `bart.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmjax.contracts import HostBatch
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.distributed.sharding import constrain, shard_embedded
from fmjax.errors import UserError
from fmjax.layers.attention import Attention, Context, CrossAttention
from fmjax.layers.blocks import PostNorm, stack
from fmjax.layers.cache import Cache, decoder_context, empty_cache, encoder_mask, memory_mask, shift_right
from fmjax.layers.heads import Heads, Lm
from fmjax.layers.linear import embedding, normal
from fmjax.layers.mlp import Mlp, activation
from fmjax.layers.norm import LayerNorm
from fmjax.layers.position import sinusoids
from fmjax.models.inputs import Table, check_length, checked_ids
from fmjax.models.sizes import checked, resolve

Batch = Mapping[str, jax.Array]
Memory = dict[str, jax.Array]

# tiny: Wu et al. 2021 (arXiv:2105.14462); base and big: Vaswani et al. 2017, as opus-mt has them.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "layers": 4, "attention_heads": 4, "mlp_width": 256},
    "base": {"width": 512, "layers": 6, "attention_heads": 8, "mlp_width": 2048},
    "big": {"width": 1024, "layers": 6, "attention_heads": 16, "mlp_width": 4096},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers and choices that make one Transformer; `model` in a config. A decoder's number of 0 is the encoder's."""

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
    start_id: int = 0  # what the decoder reads first; the padding in Marian
    end_id: int = 0  # what ends a text
    scale_embedding: bool = True  # by the root of the width
    tied: bool = True  # whether the logits are taken with the target's table
    activation: str = "relu"
    initializer_range: float = 0.02
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"  # or dots, everything: what the backward pass computes again


class Embed(nn.Module):
    """The word tables: one, or where the vocabularies differ, the target's besides."""

    settings: Settings

    def setup(self) -> None:
        s = self.settings
        table = partial(embedding, width=s.width, axis="vocab", init=normal(s.initializer_range), dtype=jnp.dtype(s.dtype))
        self.word = table(s.vocab_size)
        if s.target_vocab_size:
            self.target = table(s.target_vocab_size)

    def __call__(self, ids_BL: jax.Array, to_decoder: bool = False) -> jax.Array:
        """Returns the embedded words [B,L,D], scaled."""
        s = self.settings
        x = self.target(ids_BL) if to_decoder and s.target_vocab_size else self.word(ids_BL)
        return shard_embedded(x * s.width**0.5 if s.scale_embedding else x)

    def output_table(self) -> jax.Array:
        """Returns the table [V,D] with which logits are taken."""
        return (self.target if self.settings.target_vocab_size else self.word).embedding


class Side(nn.Module):
    """The encoder, or the decoder, which has a cross-attention: positions, and the stack of layers.

    `enter`, `block` and `leave` are what BART and mBART have otherwise.
    """

    settings: Settings
    decoder: bool = False
    block: ClassVar[type[nn.Module]] = PostNorm

    def numbers(self) -> tuple[int, int, int]:
        """Returns how many layers and heads there are, and the width of the feed-forward layer."""
        s = self.settings
        layers, heads, width = s.layers, s.attention_heads, s.mlp_width
        if not self.decoder:
            return layers, heads, width
        return s.decoder_layers or layers, s.decoder_attention_heads or heads, s.decoder_mlp_width or width

    @property
    def norm(self) -> Callable[..., nn.Module]:
        return partial(LayerNorm, 1e-5, jnp.dtype(self.settings.dtype))

    def enter(self, x_BLD: jax.Array, positions_BL: jax.Array, places: int) -> jax.Array:
        """Returns what the first layer reads, before dropout; positions are less than `places`."""
        table = jnp.asarray(sinusoids(places, x_BLD.shape[-1]))
        return x_BLD + table[positions_BL].astype(x_BLD.dtype)

    def leave(self, x_BLD: jax.Array) -> jax.Array:
        """Returns what the last layer gives as others read it."""
        return x_BLD

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, positions_BL: jax.Array, places: int, context: Context, caches: Any = None
    ) -> tuple[jax.Array, Any]:
        """Maps embedded words [B,L,D], standing at positions less than `places`, to hidden states; returns the caches too."""
        s = self.settings
        layers, heads, width = self.numbers()
        shared: dict[str, Any] = {"kernel_init": normal(s.initializer_range), "dtype": jnp.dtype(s.dtype)}
        sizes = (heads, s.width // heads, s.attention_dropout)
        block = partial(
            self.block,
            attention=partial(Attention, *sizes, **shared),
            mlp=partial(Mlp, width, activation(s.activation), dropout=s.activation_dropout, **shared),
            norm=self.norm,
            dropout=s.dropout,
            stochastic_depth=s.stochastic_depth,
            cross=partial(CrossAttention, *sizes, **shared) if self.decoder else None,
        )
        if (length := x_BLD.shape[1]) > s.positions:
            raise UserError(f"{length} tokens are more than model.positions={s.positions}; raise it, or shorten the texts")
        x = self.enter(x_BLD, positions_BL, places)
        x = nn.Dropout(s.dropout, deterministic=not self.has_rng("dropout"))(x)
        x = constrain(x, "act_batch", "act_length", "act_embed")
        x, caches = stack(self, block, layers, s.scan_layers, s.remat, x, context, caches)
        return self.leave(x), caches


class Transformer(nn.Module):
    """Maps a batch to features: `hidden [B,L,D]`, the decoder's, `encoder_hidden [B,S,D]`, and each head's output by kind.

    Inputs: `input_ids [B,S]`, `decoder_input_ids [B,L]` or the `labels` that they would predict; optionally
    `attention_mask [B,S]` and `decoder_attention_mask [B,L]` (mask keys, as the reference does). In packed rows,
    `segment_ids`, `position_ids` [B,S] and `decoder_segment_ids`, `decoder_position_ids` [B,L] tell pairs apart.
    """

    heads: Mapping[str, Mapping[str, Any]]
    settings: Settings
    side: ClassVar[type[Side]] = Side
    packs: ClassVar[bool] = True
    encoder_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def setup(self) -> None:
        makers = self.head_makers()
        self.embed = Embed(self.settings)
        self.encoder = self.side(self.settings)
        self.decoder = self.side(self.settings, decoder=True)
        self.head = Heads({kind: partial(makers[kind], **numbers) for kind, numbers in self.heads.items()})

    def head_makers(self) -> dict[str, Callable[..., nn.Module]]:
        """Returns, for each kind of head that the family has, what builds it from the kind's numbers."""
        s = self.settings
        init = normal(s.initializer_range)
        return {"lm": partial(Lm, tied=s.tied, use_bias=True, kernel_init=init, dtype=jnp.dtype(s.dtype))}

    @property
    def start_id(self) -> int:
        """The token that the decoder begins with."""
        return self.settings.start_id

    def encode(self, batch: Batch) -> Memory:
        """Returns the memory: `hidden [B,S,D]`, and `mask [B,S]` bool or, of packed rows, `segments [B,S]`, where given."""
        ids, (given, mask) = batch["input_ids"], encoder_mask(batch)
        positions = batch.get("position_ids", jnp.arange(ids.shape[1], dtype=jnp.int32)[None])
        hidden, _ = self.encoder(self.embed(ids), positions, ids.shape[1], Context(mask=mask))
        return {"hidden": hidden} | given

    def decode(self, batch: Batch, memory: Memory, cache: Cache | None) -> tuple[dict[str, jax.Array], Cache | None]:
        """Returns the features of `decoder_input_ids [B,L]` and the cache with their keys and values, and the memory's."""
        ids = batch["decoder_input_ids"]
        context, positions, cache = decoder_context(batch, cache, "decoder_")
        context = context.replace(memory=memory["hidden"], memory_mask=memory_mask(batch, memory))  # type: ignore[attr-defined]
        places = ids.shape[1] if cache is None else cache["mask"].shape[1]
        caches = None if cache is None else cache["layers"]
        hidden, caches = self.decoder(self.embed(ids, to_decoder=True), positions, places, context, caches)
        features = {"hidden": hidden}
        outputs = self.head(features | {"word_table": self.embed.output_table()}, batch)
        return features | outputs, None if cache is None else {**cache, "layers": caches}

    def empty_cache(self, rows: int, length: int) -> Cache:
        """Returns a cache with room for `length` target tokens in each row."""
        layers, heads, _ = self.side(self.settings, decoder=True, parent=None).numbers()
        return empty_cache(layers, rows, length, heads, self.settings.width // heads, jnp.dtype(self.settings.dtype))

    def __call__(self, batch: Batch) -> dict[str, jax.Array]:
        if "decoder_input_ids" not in batch:
            ids = shift_right(batch["labels"], self.settings.start_id, batch.get("decoder_position_ids"))
            batch = {**batch, "decoder_input_ids": ids}
        memory = self.encode(batch)
        features, _ = self.decode(batch, memory, None)
        return {**features, "encoder_hidden": memory["hidden"]}

    def smallest(self) -> Batch:
        """Returns a batch of one token on each side."""
        return {name: jnp.zeros((1, 1), jnp.int32) for name in ("input_ids", "decoder_input_ids")}

    def forward_flops(self, batch: Mapping[str, Any]) -> float:
        """Returns the floating-point operations of one forward pass over a batch: its matrix products, by formula."""
        s = self.settings
        rows, source = batch["input_ids"].shape
        target = batch["decoder_input_ids" if "decoder_input_ids" in batch else "labels"].shape[1]
        width, (layers, _, mlp) = s.width, self.side(s, decoder=True, parent=None).numbers()
        encoder = s.layers * source * (4 * width * width + 2 * width * s.mlp_width + 2 * width * source)
        decoder = layers * target * (6 * width * width + 2 * width * mlp + 2 * width * (source + target))
        memory = layers * source * 2 * width * width
        head = target * width * (s.target_vocab_size or s.vocab_size) if "lm" in self.heads else 0
        return 2.0 * rows * (encoder + decoder + memory + head)


def build(*, heads: Mapping[str, Mapping[str, Any]], size: str = "base", **settings: Any) -> Transformer:
    """Returns a Transformer of a named size (SIZES) with the given heads; other settings are the fields of Settings.

    Raises UserError for an unknown size, setting or head, and for sizes that do not fit together.
    """
    return made(Transformer(heads, resolve(Settings, SIZES, size, settings)))


def made(model: Transformer) -> Any:
    """Returns a model that is checked, the decoder's numbers too."""
    s = model.settings
    heads, vocabulary = s.decoder_attention_heads, s.target_vocab_size or s.vocab_size
    if heads and s.width % heads:
        raise UserError(f"model.width={s.width} does not divide over model.decoder_attention_heads={heads}; change one")
    if not 0 <= s.start_id < vocabulary:
        raise UserError(f"model.start_id={s.start_id} is not in the target's vocabulary of {vocabulary} tokens; correct it")
    return checked(model)


def settings_from_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the settings of a fresh model that follow from its tokenizer: the decoder starts from padding, as in Marian."""
    return {"start_id": tokenizer.pad_id, "end_id": ending(tokenizer)}


def ending(tokenizer: Tokenizer) -> int:
    """Returns the token that ends a text. Raises UserError if there is none."""
    return tokenizer.eos_id if tokenizer.end_id is None else tokenizer.end_id


INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


def checked_batch(arrays: HostBatch, settings: Settings) -> dict[str, np.ndarray]:
    """Returns the batch of the inputs: ids [B,S] and [B,L] as int32, masks as bool.

    Raises UserError, naming the value and the table, for an id that has no embedding, for rows that are too long, and if
    the decoder's ids are missing.
    """
    if "decoder_input_ids" not in arrays:
        raise UserError("decoder_input_ids are missing; give what the decoder reads, from the start token on, or use .generate")
    tables = {
        "input_ids": Table("vocabulary", settings.vocab_size),
        "decoder_input_ids": Table("vocabulary", settings.target_vocab_size or settings.vocab_size),
    }
    for name in tables:
        check_length(arrays[name].shape[1], settings.positions)
    return checked_ids(arrays, tables)
