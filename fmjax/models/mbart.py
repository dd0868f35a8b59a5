"""mBART (Liu et al. 2020, arXiv:2001.08210), following Hugging Face's `modeling_mbart.py`.

BART that normalizes the input of each part, and the output of the encoder and the decoder.
"""

from __future__ import annotations

import dataclasses

from fmjax import contracts
from fmjax.contracts import Value
from fmjax.layers.blocks import PreNorm
from fmjax.models import bart, transformer
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


def build(
    *, heads: contracts.Heads, size: str = "base", **settings: Value
) -> transformer.Transformer:
    """Returns an mBART of a named size (SIZES) with the given heads; see `transformer.build`."""
    return transformer.checked_model(
        transformer.Transformer(heads, resolve(Settings, SIZES, size, settings), FORM)
    )


INPUTS, checked_batch = bart.INPUTS, bart.checked_batch
settings_from_tokenizer = bart.settings_from_tokenizer
