"""Mistral (Jiang et al. 2023, arXiv:2310.06825), following Hugging Face's `modeling_mistral.py`.

A Llama whose positions attend only to the last `window` positions.
"""

from __future__ import annotations

import dataclasses

from fmjax import contracts
from fmjax.contracts import Value
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


def build(*, heads: contracts.Heads, size: str = "base", **settings: Value) -> llama.Llama:
    """Returns a Mistral of a named size (SIZES) with the given heads; see `llama.build`."""
    return llama.checked_model(llama.Llama(heads, resolve(Settings, SIZES, size, settings)))


INPUTS, checked_batch = gpt.INPUTS, gpt.checked_batch
settings_from_tokenizer = gpt.settings_from_tokenizer
