"""mBART (Liu et al. 2020, arXiv:2001.08210), following Hugging Face's `modeling_mbart.py`.

BART that normalises before each part, and what the encoder and the decoder give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from fmjax.layers.blocks import PreNorm
from fmjax.models import bart, transformer
from fmjax.models.sizes import resolve

SIZES = bart.SIZES


@dataclasses.dataclass(frozen=True)
class Settings(bart.Settings):
    """BART's settings with mBART's values."""

    scale_embedding: bool = True


class Side(bart.Side):
    """An encoder or decoder that normalises before each part, and what its last layer gives."""

    block: ClassVar[type[nn.Module]] = PreNorm

    def leave(self, x_BLD: jax.Array) -> jax.Array:
        """Returns the last layer's output, normalised."""
        return self.norm(name="final_norm")(x_BLD)


class MBart(transformer.Transformer):
    """The Transformer with mBART's sides."""

    side: ClassVar[type[transformer.Side]] = Side


def build(*, heads: Mapping[str, Mapping[str, Any]], size: str = "base", **settings: Any) -> MBart:
    """Returns an mBART of a named size (SIZES) with the given heads; see `transformer.build`."""
    return transformer.made(MBart(heads, resolve(Settings, SIZES, size, settings)))


INPUTS, checked_batch = bart.INPUTS, bart.checked_batch
settings_from_tokenizer = bart.settings_from_tokenizer
