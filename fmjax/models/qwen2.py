"""Qwen2 (Yang et al. 2024, arXiv:2407.10671), following Hugging Face's `modeling_qwen2.py`.

A Llama whose queries, keys and values have biases.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fmjax import contracts
from fmjax.errors import UserError
from fmjax.models import gpt, llama
from fmjax.models.sizes import resolve

SIZES: dict[str, dict[str, int]] = {
    "base": {"width": 896, "layers": 24, "attention_heads": 14, "kv_heads": 2, "mlp_width": 4864},  # 0.5b
    "1.5b": {"width": 1536, "layers": 28, "attention_heads": 12, "kv_heads": 2, "mlp_width": 8960},
    "7b": {"width": 3584, "layers": 28, "attention_heads": 28, "kv_heads": 4, "mlp_width": 18944},
}


@dataclasses.dataclass(frozen=True)
class Settings(llama.Settings):
    """Llama's settings with Qwen2's values."""

    context: int = 32768
    qkv_bias: bool = True


def build(*, heads: contracts.Heads, size: str = "base", **settings: Any) -> llama.Llama:
    """Returns a Qwen2 of a named size (SIZES) with the given heads; see `llama.build`."""
    return llama.checked_model(llama.Llama(heads, resolve(Settings, SIZES, size, settings)))


follow = gpt.follow

MODEL_TYPES = ("qwen2",)
PREFIX = llama.PREFIX
ARCHITECTURES = llama.architectures("Qwen2")
INPUTS = llama.INPUTS
SETTINGS: gpt.Table = {
    **llama.SHARED,
    "vocab_size": ("vocab_size", 151936),
    "intermediate_size": ("mlp_width", 22016),
    "max_position_embeddings": ("context", 32768),
}
FIXED: gpt.Config = {**llama.FIXED, "use_sliding_window": False}
# The window's settings say nothing where it is not used.
UNREAD = (*llama.UNREAD, "sliding_window", "max_window_layers")
CONSTANTS: gpt.Config = {**llama.CONSTANTS, "qkv_bias": True, "out_bias": False, "mlp_bias": False}
WITHOUT = ("/out/bias", "/gate/bias", "/up/bias", "/down/bias")
WEIGHTS = {ours: theirs for ours, theirs in llama.WEIGHTS.items() if not ours.endswith(WITHOUT)}
TIED = llama.TIED


def from_reference(config: gpt.Config) -> dict[str, Any]:
    """Returns the settings for `build` of a reference config. Raises UserError naming each setting not handled."""
    others = {key: value for key, value in config.items() if key != "layer_types"}
    kinds = config.get("layer_types") or ()
    if other := [kind for kind in kinds if kind != "full_attention"]:
        raise UserError(f'config.json: layer_types has "{other[0]}"; only "full_attention" is handled; use another model')
    return llama.read_settings(others, SETTINGS, FIXED, CONSTANTS, UNREAD)


def to_reference(settings: Settings, pad_id: int | None = None) -> dict[str, Any]:
    """Returns the reference config of settings. Raises UserError naming each that the reference cannot express."""
    return llama.write_settings(settings, SETTINGS, CONSTANTS, pad_id) | {"model_type": MODEL_TYPES[0]}


reference_inputs = gpt.reference_inputs
