"""BART (Lewis et al. 2020, arXiv:1910.13461), following Hugging Face's `modeling_bart.py`.

The Transformer with learned positions, whose table has two unused rows in front, and normalized embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmjax import contracts
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.hub.tensors import Tensor
from fmjax.models import fairseq, transformer
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


def build(*, heads: contracts.Heads, size: str = "base", **settings: Any) -> transformer.Transformer:
    """Returns a BART of a named size (SIZES) with the given heads; see `transformer.build`."""
    return transformer.checked_model(transformer.Transformer(heads, resolve(Settings, SIZES, size, settings), FORM))


def follow(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the settings of a fresh model that follow from its tokenizer: the decoder starts from the end token."""
    return dict.fromkeys(("start_id", "end_id"), transformer.ending(tokenizer))


MODEL_TYPES = ("bart",)
PREFIX = transformer.PREFIX
ARCHITECTURES: dict[str, dict[str, str]] = {"BartModel": {}, "BartForConditionalGeneration": {"lm": "logits"}}
INPUTS = transformer.INPUTS
SETTINGS: fairseq.Table = fairseq.SETTINGS
FIXED = {
    **fairseq.FIXED,
    "static_position_embeddings": False,
    "normalize_before": False,
    "normalize_embedding": True,
    "add_final_layer_norm": False,
    "tie_word_embeddings": True,
}
WEIGHTS: dict[str, str] = {
    "embed/word/embedding": transformer.SHARED,
    **{
        f"{side}/{ours}": f"{PREFIX}{side}.{theirs}"
        for side in ("encoder", "decoder")
        for ours, theirs in {
            "position/embedding": "embed_positions.weight",
            "norm/scale": "layernorm_embedding.weight",
            "norm/bias": "layernorm_embedding.bias",
        }.items()
    },
    **fairseq.layers("encoder", PREFIX),
    **fairseq.layers("decoder", PREFIX),
    "head/lm/bias": fairseq.BIAS,
}
TIED = transformer.TIED


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a file's tensors as the table names them; see `fairseq.unpack`."""
    return fairseq.unpack(tensors, next((name for name in (transformer.SHARED, *TIED) if name in tensors), ""))


pack = fairseq.pack


def from_reference(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings for `build` of a reference config. Raises UserError naming each setting not handled."""
    return fairseq.read_settings(config, SETTINGS, FIXED, (), start=2, end=2)


def to_reference(settings: Settings, pad_id: int | None = None) -> dict[str, Any]:
    """Returns the reference config of settings. Raises UserError naming each that the reference cannot express."""
    own = {"model_type": MODEL_TYPES[0], "pad_token_id": 1 if pad_id is None else pad_id}
    return fairseq.write_settings(settings, SETTINGS, {"target_vocab_size": 0, "tied": True}) | own


def reference_inputs(arrays: Mapping[str, np.ndarray], settings: Settings) -> dict[str, np.ndarray]:
    """Returns the batch of the reference's inputs; see `transformer.reference_inputs`.

    Where the decoder's ids are missing, they are the encoder's, shifted to the right, as in the reference.
    """
    if "decoder_input_ids" not in arrays:
        ids = np.asarray(arrays["input_ids"])
        shifted = np.concatenate([np.full_like(ids[:, :1], settings.start_id), ids[:, :-1]], axis=1)
        arrays = {**arrays, "decoder_input_ids": shifted}
    return transformer.reference_inputs(arrays, settings)
