"""BART (Lewis et al. 2020, arXiv:1910.13461), following Hugging Face's `modeling_bart.py`.

The Transformer with learned positions, of whose table the first two rows are never read, and normalised embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.layers.linear import embedding, normal
from fmjax.models import transformer
from fmjax.models.sizes import resolve

OFFSET = 2  # rows of a position table before that of the first position

# bart-base and bart-large.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "layers": 2, "attention_heads": 2, "mlp_width": 512},
    "base": {"width": 768, "layers": 6, "attention_heads": 12, "mlp_width": 3072},
    "large": {"width": 1024, "layers": 12, "attention_heads": 16, "mlp_width": 4096},
}


@dataclasses.dataclass(frozen=True)
class Settings(transformer.Settings):
    """The Transformer's settings with BART's values."""

    positions: int = 1024
    start_id: int = 2
    end_id: int = 2
    scale_embedding: bool = False
    activation: str = "gelu"


class Side(transformer.Side):
    """An encoder or decoder with learned positions and a norm behind them."""

    def enter(self, x_BLD: jax.Array, positions_BL: jax.Array, places: int) -> jax.Array:
        """Returns what the first layer reads, before dropout."""
        s, init = self.settings, normal(self.settings.initializer_range)
        table = embedding(s.positions + OFFSET, s.width, axis=None, init=init, dtype=jnp.dtype(s.dtype), name="position")
        return self.norm(name="norm")(x_BLD + table(positions_BL + OFFSET))


class Bart(transformer.Transformer):
    """The Transformer with BART's sides."""

    side: ClassVar[type[transformer.Side]] = Side


def build(*, heads: Mapping[str, Mapping[str, Any]], size: str = "base", **settings: Any) -> Bart:
    """Returns a BART of a named size (SIZES) with the given heads; see `transformer.build`."""
    return transformer.made(Bart(heads, resolve(Settings, SIZES, size, settings)))


def settings_from_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the settings of a fresh model that follow from its tokenizer: the decoder starts from the end token."""
    return dict.fromkeys(("start_id", "end_id"), transformer.ending(tokenizer))


INPUTS, checked_batch = transformer.INPUTS, transformer.checked_batch
