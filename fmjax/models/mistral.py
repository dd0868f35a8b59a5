"""Mistral (Jiang et al. 2023, arXiv:2310.06825), following Hugging Face's `modeling_mistral.py`.

A Llama whose positions see the last `window` ones alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fmjax.models import gpt, llama
from fmjax.models.sizes import checked, resolve

SIZES: dict[str, dict[str, int]] = {
    "base": llama.SIZES["base"],
    "7b": llama.SIZES["8b"],
}


@dataclasses.dataclass(frozen=True)
class Settings(llama.Settings):
    """Llama's settings with Mistral's values."""

    context: int = 4096 * 32
    window: int = 4096


def build(*, heads: Mapping[str, Mapping[str, Any]], size: str = "base", **settings: Any) -> llama.Llama:
    """Returns a Mistral of a named size (SIZES) with the given heads; see `llama.build`."""
    return llama.checked_parts(checked(llama.Llama(heads, resolve(Settings, SIZES, size, settings))))


INPUTS, checked_batch = gpt.INPUTS, gpt.checked_batch
settings_from_tokenizer = gpt.settings_from_tokenizer
