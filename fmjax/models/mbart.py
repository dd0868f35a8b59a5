"""mBART (Liu et al. 2020, arXiv:2001.08210), following Hugging Face's `modeling_mbart.py`.

BART that normalizes the input of each part, and the output of the encoder and the decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fmjax import contracts
from fmjax.layers.blocks import PreNorm
from fmjax.models import bart, fairseq, transformer
from fmjax.models.sizes import resolve
from fmjax.models.transformer import Form

SIZES = bart.SIZES


@dataclasses.dataclass(frozen=True)
class Settings(transformer.Settings):
    """The Transformer's settings with mBART's values."""

    positions: int = 1024
    start_id: int = 2
    end_id: int = 2
    activation: str = "gelu"


FORM = Form(block=PreNorm, learned_positions=True, final_norm=True)


def build(*, heads: contracts.Heads, size: str = "base", **settings: Any) -> transformer.Transformer:
    """Returns an mBART of a named size (SIZES) with the given heads; see `transformer.build`."""
    return transformer.checked_model(transformer.Transformer(heads, resolve(Settings, SIZES, size, settings), FORM))


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
