"""The Transformer in Hugging Face: Marian's translation models (opus-mt), `MarianConfig` and
`MarianModel`."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmjax.contracts import Config
from fmjax.errors import UserError
from fmjax.hub.families import fairseq
from fmjax.hub.families.fairseq import DECODER_TABLE, ENCODER_TABLE, OUTPUT, SHARED
from fmjax.hub.reference import Reference
from fmjax.hub.rules import AS_IS, Rule, linear
from fmjax.hub.tensors import Tensor
from fmjax.layers.position import sinusoids
from fmjax.models.transformer import INPUTS

# If source and target have separate tables, the model also has this one.
TARGET = "embed/target/embedding"
TABLE = "embed/word/embedding"


def sinusoidal(name: str, tensor: Tensor) -> None:
    """Raises UserError if a stored position table is not sinusoidal."""
    if not np.allclose(tensor.read(), sinusoids(*tensor.shape), atol=1e-3):
        raise UserError(
            f"{name}: is not a sinusoidal table, and no other is supported; download the weights "
            "again"
        )


def complete(config: Config, settings: Config) -> Config:
    """Returns all settings, including tokens and which tables are shared.

    Raises UserError if the config contradicts itself.
    """
    vocabulary = settings["vocab_size"]
    shared = config.get("share_encoder_decoder_embeddings") is not False
    target = config.get("decoder_vocab_size") or vocabulary
    tied = config.get("tie_word_embeddings") is not False
    if shared and target != vocabulary:
        raise UserError(
            f"config.json: decoder_vocab_size={target} but the shared vocab_size={vocabulary}; "
            "correct one of them"
        )
    if shared and not tied:
        raise UserError(
            "config.json: tie_word_embeddings=false is only supported with "
            "share_encoder_decoder_embeddings=false; use another model"
        )
    tables = {"target_vocab_size": 0 if shared else target, "tied": tied}
    return settings | fairseq.tokens(config, start=58100, end=0) | tables


def express(settings: Any, pad_id: int | None) -> Config:
    """Returns the remaining settings of Marian.

    Raises UserError if the logits do not come from a shared table.
    """
    target = settings.target_vocab_size
    if not target and not settings.tied:
        raise UserError(
            "model.tied=false has no counterpart in Marian, where the logits come from a shared "
            "table; train with model.tied=true"
        )
    return fairseq.express(settings) | {
        "pad_token_id": settings.start_id if pad_id is None else pad_id,
        "share_encoder_decoder_embeddings": not target,
        "decoder_vocab_size": target or settings.vocab_size,
        "tie_word_embeddings": settings.tied,
    }


REFERENCE = Reference(
    model_types=("marian",),
    architectures={"MarianModel": {}, "MarianMTModel": {"lm": "logits"}},
    inputs=INPUTS,
    settings={**fairseq.SETTINGS, "vocab_size": ("vocab_size", 58101)},
    fixed={
        **fairseq.FIXED,
        "static_position_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
        "add_final_layer_norm": False,
    },
    # The last two are read above.
    unread=(*fairseq.UNREAD, "decoder_vocab_size", "share_encoder_decoder_embeddings"),
    complete=complete,
    express=express,
    prefix="model.",
    weights=(
        Rule(TABLE, (ENCODER_TABLE, SHARED), AS_IS, given=TARGET),
        Rule(TABLE, SHARED, AS_IS),
        Rule(TARGET, DECODER_TABLE, AS_IS),
        *fairseq.layers("encoder"),
        *fairseq.layers("decoder"),
        *linear("head/lm", "lm_head", bias=False),
        fairseq.LOGITS_BIAS,
    ),
    tied={
        SHARED: TABLE,
        ENCODER_TABLE: TABLE,
        DECODER_TABLE: (TARGET, TABLE),
        OUTPUT: (TARGET, TABLE),
    },
    buffers={".embed_positions.weight": sinusoidal},
)
