"""Llama (Touvron et al. 2023, arXiv:2302.13971; 3: arXiv:2407.21783), following Hugging Face's
`modeling_llama.py`.

GPT-2's decoder with rotary positions, RMS norms, gated feed-forward layers, and key heads shared by
query heads. Dimensions as in `gpt.py`; K head width. Mistral and Qwen2 are this decoder with other
settings; see `mistral.py` and `qwen2.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import contracts
from fmjax.contracts import Config, Value
from fmjax.errors import UserError, nearest
from fmjax.layers.attention import Attention, Context
from fmjax.layers.blocks import ModuleFactory, PreNorm
from fmjax.layers.cache import Cache, decoder_context
from fmjax.layers.linear import normal
from fmjax.layers.mlp import GatedMlp, activation
from fmjax.layers.norm import RmsNorm
from fmjax.layers.position import rotary
from fmjax.models import gpt
from fmjax.models.sizes import Compute, check_divides, checked, resolve

# 7b to 70b are the Llama 2 models of those names, 8b is Llama 3; the small ones have the shapes of
# llama2.c.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 64, "layers": 5, "attention_heads": 8, "kv_heads": 4, "mlp_width": 172},
    "small": {"width": 288, "layers": 6, "attention_heads": 6, "mlp_width": 768},
    "base": {"width": 768, "layers": 12, "attention_heads": 12, "mlp_width": 2048},
    "7b": {"width": 4096, "layers": 32, "attention_heads": 32, "mlp_width": 11008},
    "8b": {"width": 4096, "layers": 32, "attention_heads": 32, "kv_heads": 8, "mlp_width": 14336},
    "70b": {"width": 8192, "layers": 80, "attention_heads": 64, "kv_heads": 8, "mlp_width": 28672},
}


@dataclasses.dataclass(frozen=True)
class Settings(Compute):
    """The settings of a Llama model; `model` in a config."""

    width: int
    layers: int
    attention_heads: int
    mlp_width: int
    vocab_size: int
    kv_heads: int = 0  # 0: as many as query heads
    head_width: int = 0  # 0: width / attention_heads
    positions: int = 0  # no limit
    # context length that the model is meant for: the reference's max_position_embeddings
    context: int = 2048
    window: int = 0  # positions that each position attends to, including itself; 0: all
    activation: str = "silu"
    epsilon: float = 1e-6
    initializer_range: float = 0.02
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    tied: bool = False  # whether the language model's head is the word table
    pad_id: int = -1  # a classifier reads the last token that is not this one; -1: none is padding
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rotary_base: float = 10000.0
    rotary_scaling: str = "default"  # a name in SCALINGS
    rotary_factor: float = 1.0  # how many times longer than in training texts may be
    rotary_low: float = 1.0  # frequencies of fewer turns than this in rotary_context are divided
    rotary_high: float = 4.0  # those of more turns are kept
    rotary_context: int = 8192  # the first training's context


def slower(settings: Settings, frequencies: np.ndarray) -> np.ndarray:
    """Returns all frequencies divided by the factor (Chen et al. 2023, arXiv:2306.15595)."""
    return frequencies / settings.rotary_factor


def slower_if_slow(settings: Settings, frequencies: np.ndarray) -> np.ndarray:
    """Returns low frequencies divided by the factor, high ones unchanged, and mixtures in between
    (Llama 3.1)."""
    s = settings
    turns = s.rotary_context * frequencies / (2 * math.pi)
    kept = np.clip((turns - s.rotary_low) / (s.rotary_high - s.rotary_low), 0, 1)
    return frequencies * (kept + (1 - kept) / s.rotary_factor)


# The reference's name -> the change of frequencies.
SCALINGS: dict[str, Callable[[Settings, np.ndarray], np.ndarray]] = {
    "default": lambda settings, frequencies: frequencies,
    "linear": slower,
    "llama3": slower_if_slow,
}


class Llama(gpt.Gpt):
    """A GPT-2 with Llama's layers."""

    settings: Settings  # type: ignore[assignment]  # of the same names as GPT-2's, and more

    @property
    def key_heads(self) -> tuple[int, int]:
        """The number of key heads, and the width of every head."""
        s = self.settings
        return s.kv_heads or s.attention_heads, s.head_width or s.width // s.attention_heads

    def norm(self) -> ModuleFactory:
        """Returns a factory for the norm layer."""
        return partial(RmsNorm, self.settings.epsilon, jnp.dtype(self.settings.dtype))

    def block(self) -> ModuleFactory:
        """Returns a factory for a layer."""
        s = self.settings
        shared: Config = {
            "kernel_init": normal(s.initializer_range),
            "dtype": jnp.dtype(s.dtype),
        }
        last = normal(s.initializer_range / (2 * s.layers) ** 0.5)
        kv_heads, head_width = self.key_heads
        biased = ("query", "key", "value") * s.qkv_bias + ("out",) * s.out_bias
        own: Config = {"kv_heads": kv_heads, "biased": biased, "inits": {"out": last}}
        attention = partial(
            Attention, s.attention_heads, head_width, s.attention_dropout, **own, **shared
        )
        mlp = partial(
            GatedMlp,
            s.mlp_width,
            activation(s.activation),
            use_bias=s.mlp_bias,
            down_init=last,
            **shared,
        )
        kept: Config = {"dropout": s.dropout, "stochastic_depth": s.stochastic_depth}
        return partial(PreNorm, attention=attention, mlp=mlp, norm=self.norm(), **kept)

    def context(
        self, batch: contracts.Batch, cache: Cache | None
    ) -> tuple[Context, jax.Array, Cache | None]:
        """Returns the layers' context, the positions, and the cache without its keys; see
        `decoder_context`."""
        s = self.settings
        context, positions, cache = decoder_context(batch, cache, window=s.window)
        turned = rotary(
            positions, self.key_heads[1], s.rotary_base, partial(SCALINGS[s.rotary_scaling], s)
        )
        return dataclasses.replace(context, rotary=turned), positions, cache

    def layer_products(self, length: int) -> int:
        """Returns the multiplications of one token in one layer."""
        s = self.settings
        kv_heads, head_width = self.key_heads
        attention = (
            2 * head_width * (s.width * (s.attention_heads + kv_heads) + s.attention_heads * length)
        )
        return attention + 3 * s.width * s.mlp_width


def build(*, heads: contracts.Heads, size: str = "base", **settings: Value) -> Llama:
    """Returns a Llama of a named size (SIZES) with the given heads; other settings are the fields
    of Settings.

    Raises UserError for an unknown size, setting or head, and for sizes that do not fit together.
    """
    return checked_model(Llama(heads, resolve(Settings, SIZES, size, settings)))


def checked_model(model: Llama) -> Llama:
    """Returns the model, checked. Raises UserError if its heads cannot be shared or rotated, or its
    positions are learned or scaled in an unknown way, and like `sizes.checked`."""
    s = model.settings
    if not s.head_width:
        check_divides("width", s.width, "attention_heads", s.attention_heads)
    checked(model)
    kv_heads, head_width = model.key_heads
    if s.attention_heads % kv_heads:
        raise UserError(
            f"model.attention_heads={s.attention_heads} is not a multiple of "
            f"model.kv_heads={kv_heads}; change one"
        )
    if head_width % 2:
        raise UserError(
            f"heads have an odd width, {head_width}, which cannot be rotated in pairs; set "
            "model.head_width"
        )
    if s.positions:
        raise UserError(
            f"model.positions={s.positions}: rotary positions are not learned and have no limit; "
            "leave it out"
        )
    if s.rotary_scaling not in SCALINGS:
        hint = nearest(s.rotary_scaling, SCALINGS)
        raise UserError(
            f'model.rotary_scaling="{s.rotary_scaling}" is not known{hint}; '
            f"choose one of {', '.join(SCALINGS)}"
        )
    if s.rotary_scaling == "llama3" and s.rotary_low >= s.rotary_high:
        raise UserError(
            f"model.rotary_low={s.rotary_low}, model.rotary_high={s.rotary_high}: the first must "
            "be "
            "less than the second; change one"
        )
    return model


INPUTS, checked_batch = gpt.INPUTS, gpt.checked_batch
settings_from_tokenizer = gpt.settings_from_tokenizer
