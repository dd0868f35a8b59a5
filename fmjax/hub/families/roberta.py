"""RoBERTa in Hugging Face, `RobertaConfig` and `RobertaModel`; also XLM-R and CamemBERT."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fmjax.contracts import Config, HostBatch
from fmjax.errors import UserError
from fmjax.hub.families import bert
from fmjax.hub.reference import Outputs, Reference
from fmjax.hub.rules import linear, under
from fmjax.models.inputs import check_length, check_range

CLASSES: dict[str, Outputs] = {
    "Model": {"pooled": "pooler_output"},
    "ForMaskedLM": {"mlm": "logits"},
    "ForSequenceClassification": {"classify": "logits"},
    "ForTokenClassification": {"tag": "logits"},
    "ForQuestionAnswering": {"span": bert.SPAN},
    "ForMultipleChoice": {"choice": ("logits",)},
}
# The `model_type` in config.json -> the prefix of its class names.
STEMS = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}


def architectures(first: str) -> dict[str, Outputs]:
    """Returns the classes of all kinds, beginning with those of one kind."""
    stems = sorted(STEMS.values(), key=lambda stem: stem != first)
    return {stem + kind: outputs for stem in stems for kind, outputs in CLASSES.items()}


def complete(config: Config, settings: Config) -> Config:
    """Returns all settings: positions are counted from after the padding id, in a table that begins
    at 0."""
    padding, rows = config.get("pad_token_id", 1), settings["positions"]
    if type(padding) is not int or not 0 <= padding < rows - 1:
        raise UserError(
            f"config.json: pad_token_id={padding} leaves no positions of {rows}; correct the config"
        )
    own = {"position_offset": padding + 1, "positions": rows - padding - 1}
    return bert.complete(config, settings) | own


def express(settings: Any, pad_id: int | None) -> Config:
    """Returns the padding id and the size of the position table.

    Raises UserError if they contradict each other.
    """
    offset = settings.position_offset
    if pad_id is not None and pad_id != offset - 1:
        raise UserError(
            f"the tokenizer's padding id is {pad_id} but model.position_offset={offset}, which is "
            f"the padding id + 1 in the reference; train with model.position_offset={pad_id + 1}"
        )
    return {"pad_token_id": offset - 1, "max_position_embeddings": settings.positions + offset}


def batch(arrays: HostBatch, settings: Any) -> dict[str, np.ndarray]:
    """Returns the inputs with positions from 0; the reference counts from after the padding id.

    Without given positions, only tokens are counted, not padding, wherever it is, as in the
    reference.
    """
    offset = settings.position_offset
    if "position_ids" in arrays:
        check_range(
            "position_ids", arrays["position_ids"], "position table", settings.positions + offset
        )
        positions = arrays["position_ids"] - offset
    else:
        real = arrays["input_ids"] != offset - 1
        check_length(int(real.sum(axis=-1).max()), settings.positions)
        positions = real.cumsum(axis=-1) * real - 1
    return {**arrays, "position_ids": positions}


REFERENCE = Reference(
    model_types=("roberta",),
    architectures=architectures("Roberta"),
    inputs=bert.REFERENCE.inputs,
    settings={**bert.SETTINGS, "vocab_size": ("vocab_size", 50265)},
    fixed=bert.FIXED,
    unread=bert.UNREAD,
    constants={"embedding_width": 0},
    complete=complete,
    express=express,
    batch=batch,
    prefix="roberta.",
    weights=(
        *under("", "roberta", (*bert.BODY, *bert.TOKEN_TYPES, *bert.POOLER)),
        *bert.SHARED,
        *bert.masked_lm(dense="lm_head.dense", norms="lm_head.layer_norm", bias="lm_head.bias"),
        *linear("head/classify/dense", "classifier.dense"),
        *linear("head/classify", "classifier.out_proj"),
        *linear("head/choice", "classifier"),
    ),
    tied={
        "lm_head.decoder.weight": "embed/word/embedding",
        "lm_head.decoder.bias": "head/mlm/bias",
    },
)
REFERENCE = dataclasses.replace(
    REFERENCE,
    variants=tuple(
        dataclasses.replace(REFERENCE, model_types=(kind,), architectures=architectures(stem))
        for kind, stem in STEMS.items()
        if kind not in REFERENCE.model_types
    ),
)
