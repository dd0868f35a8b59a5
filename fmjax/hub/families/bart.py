"""BART in Hugging Face, `BartConfig` and `BartModel`."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmjax.contracts import Config, HostBatch
from fmjax.hub.families import fairseq
from fmjax.hub.reference import Reference
from fmjax.hub.rules import AS_IS, Rule, Rules, embedding, norm
from fmjax.models.transformer import INPUTS

FIXED: Config = {
    **fairseq.FIXED,
    "static_position_embeddings": False,
    "normalize_before": False,
    "normalize_embedding": True,
    "add_final_layer_norm": False,
    "tie_word_embeddings": True,
}
CONSTANTS: Config = {"target_vocab_size": 0, "tied": True}
WEIGHTS: Rules = (
    Rule("embed/word/embedding", fairseq.SHARED, AS_IS),
    *embedding("encoder/position", "model.encoder.embed_positions"),
    *embedding("decoder/position", "model.decoder.embed_positions"),
    *norm("encoder/norm", "model.encoder.layernorm_embedding"),
    *norm("decoder/norm", "model.decoder.layernorm_embedding"),
    *fairseq.layers("encoder"),
    *fairseq.layers("decoder"),
    fairseq.LOGITS_BIAS,
)


def complete(config: Config, settings: Config) -> Config:
    """Returns all settings."""
    return settings | fairseq.tokens(config, start=2, end=2)


def express(settings: Any, pad_id: int | None) -> Config:
    """Returns the remaining settings of the config."""
    return fairseq.express(settings) | {"pad_token_id": 1 if pad_id is None else pad_id}


def batch(arrays: HostBatch, settings: Any) -> dict[str, np.ndarray]:
    """Returns the inputs including the decoder's, which are by default the encoder's shifted to the
    right, as in the reference."""
    if "decoder_input_ids" in arrays:
        return dict(arrays)
    ids = arrays["input_ids"]
    shifted = np.concatenate([np.full_like(ids[:, :1], settings.start_id), ids[:, :-1]], axis=1)
    return {**arrays, "decoder_input_ids": shifted}


REFERENCE = Reference(
    model_types=("bart",),
    architectures={"BartModel": {}, "BartForConditionalGeneration": {"lm": "logits"}},
    inputs=INPUTS,
    settings=fairseq.SETTINGS,
    fixed=FIXED,
    unread=fairseq.UNREAD,
    constants=CONSTANTS,
    complete=complete,
    express=express,
    batch=batch,
    prefix="model.",
    weights=WEIGHTS,
    tied=fairseq.TIED,
)
