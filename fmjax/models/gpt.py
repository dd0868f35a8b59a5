"""GPT-2 (Radford et al. 2019), following Hugging Face's `modeling_gpt2.py`: a decoder with learned
positions.

Dimensions: B batch, L length, D width, V vocabulary. Llama and related models are this decoder with
other layers; see `llama.py`."""

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
from fmjax.layers.attention import Attention, Context
from fmjax.layers.blocks import Caches, ModuleFactory, PreNorm
from fmjax.layers.cache import Cache, decoder_context, empty_cache
from fmjax.layers.dropout import Dropout
from fmjax.layers.heads import (
    ClassifyMean,
    Features,
    Heads,
    HeadTable,
    Lm,
    chosen,
    gather_positions,
)
from fmjax.layers.linear import Initializer, embedding, normal, parameter
from fmjax.layers.mlp import Mlp, activation
from fmjax.layers.norm import LayerNorm
from fmjax.layers.stack import Layers, stack
from fmjax.layers.taps import add_delta
from fmjax.models.inputs import Table, check_length, checked_ids
from fmjax.models.sizes import Compute, check_divides, checked, resolve

# tiny is nanoGPT's setting for a CPU; base is the GPT-2 of 124 million parameters.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "layers": 4, "attention_heads": 4, "mlp_width": 512},
    "base": {"width": 768, "layers": 12, "attention_heads": 12, "mlp_width": 3072},
    "medium": {"width": 1024, "layers": 24, "attention_heads": 16, "mlp_width": 4096},
    "large": {"width": 1280, "layers": 36, "attention_heads": 20, "mlp_width": 5120},
    "xl": {"width": 1600, "layers": 48, "attention_heads": 25, "mlp_width": 6400},
}


@dataclasses.dataclass(frozen=True)
class Settings(Compute):
    """The settings of a GPT-2 model; `model` in a config."""

    width: int
    layers: int
    attention_heads: int
    mlp_width: int
    vocab_size: int
    positions: int = 1024
    activation: str = "gelu_new"
    epsilon: float = 1e-5
    initializer_range: float = 0.02
    dropout: float = 0.1
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    tied: bool = True  # whether the language-model head is the word table
    pad_id: int = -1  # a classifier reads the last token that is not this one; -1: none is padding


class Embed(nn.Module):
    """Word embeddings, plus those of learned positions, if any."""

    settings: Settings

    @nn.compact
    def __call__(self, batch: Batch, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the embedded input [B,L,D] and the word table [V,D]."""
        s = self.settings
        table = partial(
            embedding, width=s.width, init=normal(s.initializer_range), dtype=jnp.dtype(s.dtype)
        )
        word = table(s.vocab_size, axis="vocab", name="word")
        x = shard_embedded(word(batch["input_ids"]))
        if s.positions:
            x = x + shard_embedded(table(s.positions, axis=None, name="position")(positions_BL))
        x = Dropout(s.embedding_dropout)(x)
        x = add_delta(constrain(x, "act_batch", "act_length", "act_embed"), batch)
        return x, word.embedding


class Decoder(nn.Module):
    """The stack of layers, and the norm of its output."""

    block: ModuleFactory
    norm: ModuleFactory
    layers: Layers

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: Context, caches: Sequence[Caches] | None
    ) -> tuple[jax.Array, tuple[Caches, ...] | None]:
        """Returns the hidden states [B,L,D] and the layers' caches."""
        x_BLD, after = stack(self, self.block, self.layers, x_BLD, context, caches)
        return self.norm(name="norm")(x_BLD), after


class ClassifyLast(nn.Module):
    """A linear layer without bias over the last token that is not padding."""

    pad_id: int
    reads_pooled: ClassVar[bool] = False
    classes: int = 2
    kernel_init: Initializer = normal(0.02)

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,C] in fp32."""
        real = batch["input_ids"] != self.pad_id
        if "attention_mask" in batch:
            real = real & batch["attention_mask"].astype(bool)
        last = jnp.where(real, jnp.arange(real.shape[1])[None], 0).max(axis=1)
        x = gather_positions(features["hidden"], last[:, None])[:, 0].astype(jnp.float32)
        return x @ parameter(
            self, "kernel", self.kernel_init, ("embed", None), (x.shape[-1], self.classes)
        )


class Gpt(nn.Module):
    """Maps a batch to features: `hidden [B,L,D]`, and each head's output by kind.

    Inputs: `input_ids [B,L]`; optionally `position_ids [B,L]`, `attention_mask [B,L]` (masks keys,
    as the reference does) or `segment_ids [B,L]` (packed rows; 0 is padding), and `embedded_delta
    [B,L,D]`. Every position attends to itself and to earlier ones.
    """

    heads: contracts.Heads
    settings: Settings

    def head_makers(self) -> HeadTable:
        """Returns a factory for each kind of head that the family has."""
        s = self.settings
        init = normal(s.initializer_range)
        return {
            "lm": partial(Lm, s.tied, kernel_init=init, dtype=jnp.dtype(s.dtype)),
            "classify": partial(ClassifyLast, s.pad_id, kernel_init=init),
            "classify_mean": partial(ClassifyMean, dropout=s.dropout, kernel_init=init),
        }

    def setup(self) -> None:
        s = self.settings
        self.embed = Embed(s)
        self.decoder = Decoder(self.block(), self.norm(), s.stacked(s.layers))
        self.head = Heads(chosen(self.head_makers(), self.heads))

    @property
    def key_heads(self) -> tuple[int, int]:
        """The number of key heads, and the width of every head."""
        s = self.settings
        return s.attention_heads, s.width // s.attention_heads

    def norm(self) -> ModuleFactory:
        """Returns a factory for the norm layer."""
        return partial(LayerNorm, self.settings.epsilon, jnp.dtype(self.settings.dtype))

    def block(self) -> ModuleFactory:
        """Returns a factory for a layer."""
        s = self.settings
        shared: Config = {
            "kernel_init": normal(s.initializer_range),
            "dtype": jnp.dtype(s.dtype),
        }
        # The two projections of a layer that are added to the residual stream are initialized
        # smaller (Radford et al. 2019, section 2.3).
        last = normal(s.initializer_range / (2 * s.layers) ** 0.5)
        _, head_width = self.key_heads
        attention = partial(
            Attention,
            s.attention_heads,
            head_width,
            s.attention_dropout,
            inits={"out": last},
            **shared,
        )
        mlp = partial(Mlp, s.mlp_width, activation(s.activation), down_init=last, **shared)
        kept: Config = {"dropout": s.dropout, "stochastic_depth": s.stochastic_depth}
        return partial(PreNorm, attention=attention, mlp=mlp, norm=self.norm(), **kept)

    def context(self, batch: Batch, cache: Cache | None) -> tuple[Context, jax.Array, Cache | None]:
        """Returns the layers' context, the positions, and the cache without its keys; see
        `decoder_context`."""
        return decoder_context(batch, cache)

    def __call__(self, batch: Batch) -> Arrays:
        return self.decode(batch, None, None)[0]

    def decode(
        self, batch: Batch, memory: None, cache: Cache | None
    ) -> tuple[Arrays, Cache | None]:
        """Returns the features of a batch, which continues the cache, if any, and the new cache."""
        context, positions, after = self.context(batch, cache)
        x, word_table = self.embed(batch, positions)
        hidden, layers = self.decoder(x, context, None if cache is None else cache["layers"])
        features = {"hidden": hidden}
        outputs = features | self.head(features | {"word_table": word_table}, batch)
        return outputs, None if after is None else {**after, "layers": layers}

    def empty_cache(self, rows: int, length: int) -> Cache:
        """Returns a cache with room for `length` tokens in each row."""
        return empty_cache(
            self.settings.layers, rows, length, *self.key_heads, jnp.dtype(self.settings.dtype)
        )

    def one_row_batch(self) -> Batch:
        """Returns a batch of one token, with everything that a head may read."""
        return {"input_ids": jnp.zeros((1, 1), jnp.int32), "pool_weights": jnp.zeros((1, 1))}

    def layer_products(self, length: int) -> int:
        """Returns the multiplications of one token in one layer."""
        s = self.settings
        return 4 * s.width**2 + 2 * s.width * s.mlp_width + 2 * s.width * length

    def forward_flops(self, batch: Mapping[str, Value]) -> float:
        """Returns the floating-point operations of one forward pass over a batch: those of its
        matrix products, by formula."""
        s = self.settings
        rows, length = batch["input_ids"].shape
        predicted = (
            batch["predicted_positions"].shape[1] if "predicted_positions" in batch else length
        )
        head = predicted * s.width * s.vocab_size if "lm" in self.heads else 0
        return float(2 * rows * (length * s.layers * self.layer_products(length) + head))


def build(*, heads: contracts.Heads, size: str = "base", **settings: Value) -> Gpt:
    """Returns a GPT-2 of a named size (SIZES) with the given heads; other settings are the fields
    of Settings.

    Raises UserError for an unknown size, setting or head, and for sizes that do not fit together.
    """
    chosen_settings = resolve(Settings, SIZES, size, settings)
    check_divides(
        "width", chosen_settings.width, "attention_heads", chosen_settings.attention_heads
    )
    return checked(Gpt(heads, chosen_settings))


def settings_from_tokenizer(tokenizer: Tokenizer) -> Config:
    """Returns the settings of a new model that its tokenizer determines."""
    return {"pad_id": tokenizer.pad_id} if "pad" in tokenizer.roles else {}


INPUTS = ("input_ids", "attention_mask", "position_ids")


def checked_batch(arrays: HostBatch, settings: Settings) -> dict[str, np.ndarray]:
    """Returns the batch of the inputs [B,L]: ids as int32, the mask as bool.

    Raises UserError, naming the value and the table, for an id without an embedding, and for rows
    that are too long.
    """
    # Positions that are not learned may be any number.
    tables = {
        "input_ids": Table("vocabulary", settings.vocab_size),
        "position_ids": Table("position table", settings.positions or 2**31),
    }
    if settings.positions and "position_ids" not in arrays:
        check_length(arrays["input_ids"].shape[1], settings.positions)
    return checked_ids(arrays, tables)
