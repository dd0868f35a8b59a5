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
from fmjax.models import bart, fairseq, transformer
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


follow = bart.follow

MODEL_TYPES = ("mbart",)
PREFIX = bart.PREFIX
ARCHITECTURES: dict[str, dict[str, str]] = {"MBartModel": {}, "MBartForConditionalGeneration": {"lm": "logits"}}
INPUTS = bart.INPUTS
SETTINGS = bart.SETTINGS
FIXED = {**bart.FIXED, "normalize_before": True, "add_final_layer_norm": True}
WEIGHTS: dict[str, str] = {
    **bart.WEIGHTS,
    **{
        f"{side}/final_norm/{ours}": f"{PREFIX}{side}.layer_norm.{theirs}"
        for side in ("encoder", "decoder")
        for ours, theirs in (("scale", "weight"), ("bias", "bias"))
    },
}
TIED = bart.TIED
unpack, pack, reference_inputs = bart.unpack, bart.pack, transformer.reference_inputs


def from_reference(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings for `build` of a reference config; where that names no start token (in mBART, the language
    that is asked for), decoding starts from the end token. Raises UserError naming each setting not handled."""
    return fairseq.read_settings(config, SETTINGS, FIXED, (), start=None, end=2)


def to_reference(settings: Settings, pad_id: int | None = None) -> dict[str, Any]:
    """Returns the reference config of settings. Raises UserError naming each that the reference cannot express."""
    return bart.to_reference(settings, pad_id) | {"model_type": MODEL_TYPES[0]}
