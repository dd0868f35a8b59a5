"""BART (Lewis et al. 2020, arXiv:1910.13461), following Hugging Face's `modeling_bart.py`.

The Transformer with learned positions, whose table begins with two unused rows, and normalized
embeddings.
"""

from __future__ import annotations

import dataclasses

from fmjax import contracts
from fmjax.contracts import Config, Value
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.models import transformer
from fmjax.models.sizes import resolve
from fmjax.models.transformer import Form

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


FORM = Form(learned_positions=True)


def build(
    *, heads: contracts.Heads, size: str = "base", **settings: Value
) -> transformer.Transformer:
    """Returns a BART of a named size (SIZES) with the given heads; see `transformer.build`."""
    return transformer.checked_model(
        transformer.Transformer(heads, resolve(Settings, SIZES, size, settings), FORM)
    )


def settings_from_tokenizer(tokenizer: Tokenizer) -> Config:
    """Returns the settings of a new model that its tokenizer determines: the decoder starts from
    the end token."""
    return dict.fromkeys(("start_id", "end_id"), transformer.ending(tokenizer))


INPUTS, checked_batch = transformer.INPUTS, transformer.checked_batch
