"""Qwen2 (Yang et al. 2024, arXiv:2407.10671), following Hugging Face's `modeling_qwen2.py`.

A Llama whose queries, keys and values have biases.
"""

from __future__ import annotations

import dataclasses

from fmjax import contracts
from fmjax.contracts import Value
from fmjax.models import gpt, llama
from fmjax.models.sizes import resolve

SIZES: dict[str, dict[str, int]] = {
    "base": {
        "width": 896,
        "layers": 24,
        "attention_heads": 14,
        "kv_heads": 2,
        "mlp_width": 4864,
    },  # 0.5b
    "1.5b": {"width": 1536, "layers": 28, "attention_heads": 12, "kv_heads": 2, "mlp_width": 8960},
    "7b": {"width": 3584, "layers": 28, "attention_heads": 28, "kv_heads": 4, "mlp_width": 18944},
}


@dataclasses.dataclass(frozen=True)
class Settings(llama.Settings):
    """Llama's settings with Qwen2's values."""

    context: int = 32768
    qkv_bias: bool = True


def build(*, heads: contracts.Heads, size: str = "base", **settings: Value) -> llama.Llama:
    """Returns a Qwen2 of a named size (SIZES) with the given heads; see `llama.build`."""
    return llama.checked_model(llama.Llama(heads, resolve(Settings, SIZES, size, settings)))


INPUTS, checked_batch = gpt.INPUTS, gpt.checked_batch
settings_from_tokenizer = gpt.settings_from_tokenizer
