"""Mistral (Jiang et al. 2023, arXiv:2310.06825), following Hugging Face's `modeling_mistral.py`.

A Llama whose positions attend to the last `window` ones only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fmjax import contracts
from fmjax.models import gpt, llama
from fmjax.models.sizes import resolve

SIZES: dict[str, dict[str, int]] = {
    "base": llama.SIZES["base"],
    "7b": llama.SIZES["8b"],
}


@dataclasses.dataclass(frozen=True)
class Settings(llama.Settings):
    """Llama's settings with Mistral's values."""

    context: int = 4096 * 32
    window: int = 4096


def build(*, heads: contracts.Heads, size: str = "base", **settings: Any) -> llama.Llama:
    """Returns a Mistral of a named size (SIZES) with the given heads; see `llama.build`."""
    return llama.checked_model(llama.Llama(heads, resolve(Settings, SIZES, size, settings)))


follow = gpt.follow

MODEL_TYPES = ("mistral",)
PREFIX = llama.PREFIX
ARCHITECTURES = llama.architectures("Mistral")
INPUTS = llama.INPUTS
SETTINGS: gpt.Table = {
    **llama.SHARED,
    "intermediate_size": ("mlp_width", 14336),
    "max_position_embeddings": ("context", 4096 * 32),
    "sliding_window": ("window", 4096),
}
CONSTANTS: gpt.Config = {"positions": 0, "qkv_bias": False, "out_bias": False, "mlp_bias": False}
WEIGHTS = {ours: theirs for ours, theirs in llama.WEIGHTS.items() if not ours.endswith("/bias")}
TIED = llama.TIED


def from_reference(config: gpt.Config) -> dict[str, Any]:
    """Returns the settings for `build` of a reference config. Raises UserError naming each setting not handled."""
    # An absent setting has the default, one that is null means that there is no window.
    windowed = config.get("sliding_window", 0) is not None
    given = {"num_key_value_heads": 8} | {key: value for key, value in config.items() if windowed or key != "sliding_window"}
    settings = llama.read_settings(given, SETTINGS, llama.FIXED, CONSTANTS, llama.UNREAD)
    return settings if windowed else settings | {"window": 0}


def to_reference(settings: Settings, pad_id: int | None = None) -> dict[str, Any]:
    """Returns the reference config of settings. Raises UserError naming each that the reference cannot express."""
    config = llama.write_settings(settings, SETTINGS, CONSTANTS, pad_id)
    return config | {"model_type": MODEL_TYPES[0], "sliding_window": settings.window or None}


reference_inputs = gpt.reference_inputs
