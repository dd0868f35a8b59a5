"""ELECTRA in Hugging Face, `ElectraConfig` and `ElectraModel`."""

from __future__ import annotations

from typing import Any

from fmjax.contracts import Config
from fmjax.hub.families import bert
from fmjax.hub.reference import Reference
from fmjax.hub.rules import linear, under


def express(settings: Any, pad_id: int | None) -> Config:
    """Returns the padding id and the width of the embeddings."""
    width = settings.embedding_width or settings.width
    return {"pad_token_id": pad_id or 0, "embedding_size": width}


REFERENCE = Reference(
    model_types=("electra",),
    architectures={
        "ElectraModel": {},
        "ElectraForMaskedLM": {"mlm": "logits"},
        "ElectraForPreTraining": {"rtd": "logits"},
        "ElectraForSequenceClassification": {"classify": "logits"},
        "ElectraForTokenClassification": {"tag": "logits"},
        "ElectraForQuestionAnswering": {"span": bert.SPAN},
        "ElectraForMultipleChoice": {"choice": ("logits",)},
    },
    inputs=bert.REFERENCE.inputs,
    settings={
        **bert.SETTINGS,
        "embedding_size": ("embedding_width", 128),
        "hidden_size": ("width", 256),
        "num_attention_heads": ("attention_heads", 4),
        "intermediate_size": ("mlp_width", 1024),
        "summary_last_dropout": ("choice_dropout", 0.1),
    },
    # Multiple choice reads the reference's sequence summary.
    fixed={
        **bert.FIXED,
        "summary_type": "first",
        "summary_use_proj": True,
        "summary_activation": "gelu",
    },
    constants={"position_offset": 0},
    complete=bert.complete,
    express=express,
    prefix="electra.",
    weights=(
        *under("", "electra", (*bert.BODY, *bert.TOKEN_TYPES)),
        *bert.SHARED,
        *linear("embed/projection", "electra.embeddings_project"),
        *bert.masked_lm(
            dense="generator_predictions.dense",
            norms="generator_predictions.LayerNorm",
            bias="generator_lm_head.bias",
        ),
        *linear("head/rtd/dense", "discriminator_predictions.dense"),
        *linear("head/rtd", "discriminator_predictions.dense_prediction"),
        *linear("head/classify/dense", "classifier.dense"),
        *linear("head/classify", "classifier.out_proj"),
        *linear("head/choice/dense", "sequence_summary.summary"),
        *linear("head/choice", "classifier"),
    ),
    tied={"generator_lm_head.weight": "embed/word/embedding"},
)
