"""RoBERTa (Liu et al. 2019, arXiv:1907.11692), following Hugging Face's `modeling_roberta.py`; XLM-R and CamemBERT too.

BERT with positions that start after the padding id, another classifier, and no next-sentence head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from fmjax import contracts
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError
from fmjax.hub import folders
from fmjax.layers.heads import Classify, HeadTable, Pooled
from fmjax.layers.linear import normal
from fmjax.models import bert
from fmjax.models.inputs import check_length
from fmjax.models.sizes import resolve

SIZES = bert.SIZES


@dataclasses.dataclass(frozen=True)
class Settings(bert.Settings):
    """BERT's settings with RoBERTa's values. `position_offset` is the padding id + 1: the reference's first position."""

    position_offset: int = 2
    token_types: int = 1
    epsilon: float = 1e-5


def heads_of(settings: Settings) -> HeadTable:
    """Returns the builder of each kind of head."""
    init, dropout = normal(settings.initializer_range), settings.classifier_dropout
    return {
        "pooled": Pooled,
        "mlm": bert.masked_lm(settings, "gelu"),
        "classify": bert.classify_first(settings, "tanh", input_dropout=dropout),
        "choice": partial(Classify, classes=1, dropout=dropout, kernel_init=init),
        **bert.common_heads(settings),
    }


def build(*, heads: contracts.Heads, size: str = "base", **settings: Any) -> bert.Bert:
    """Returns a RoBERTa of a named size (SIZES) with the given heads; see `bert.build`."""
    return bert.checked_model(bert.Bert(heads, resolve(Settings, SIZES, size, settings), heads_of))


def follow(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the settings of a fresh model that follow from its tokenizer: with another offset it could not be exported."""
    return {"position_offset": tokenizer.pad_id + 1}


MODEL_TYPES = ("roberta", "xlm-roberta", "camembert")
PREFIX = "roberta."
CLASSES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "Model": {"pooled": "pooler_output"},
    "ForMaskedLM": {"mlm": "logits"},
    "ForSequenceClassification": {"classify": "logits"},
    "ForTokenClassification": {"tag": "logits"},
    "ForQuestionAnswering": {"span": bert.SPAN},
    "ForMultipleChoice": {"choice": ("logits",)},
}
ARCHITECTURES = {
    name + kind: outputs for name in ("Roberta", "XLMRoberta", "Camembert") for kind, outputs in CLASSES.items()
}
INPUTS = bert.INPUTS
SETTINGS: bert.Table = {**bert.SETTINGS, "vocab_size": ("vocab_size", 50265)}
CONSTANTS = {"embedding_width": 0}
WEIGHTS: dict[str, str] = bert.renamed({}, PREFIX, without=()) | {
    **bert.SHARED,
    "head/mlm/dense/kernel": "lm_head.dense.weight",
    "head/mlm/dense/bias": "lm_head.dense.bias",
    "head/mlm/norm/scale": "lm_head.layer_norm.weight",
    "head/mlm/norm/bias": "lm_head.layer_norm.bias",
    "head/mlm/bias": "lm_head.bias",
    "head/classify/dense/kernel": "classifier.dense.weight",
    "head/classify/dense/bias": "classifier.dense.bias",
    "head/classify/kernel": "classifier.out_proj.weight",
    "head/classify/bias": "classifier.out_proj.bias",
    "head/choice/kernel": "classifier.weight",
    "head/choice/bias": "classifier.bias",
}
TIED = {"lm_head.decoder.weight": "embed/word/embedding", "lm_head.decoder.bias": "head/mlm/bias"}


def from_reference(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings for `build` of a reference config. Raises UserError naming each setting not handled."""
    settings = bert.read_settings(config, SETTINGS, bert.FIXED, CONSTANTS, bert.UNREAD)
    padding, rows = config.get("pad_token_id", 1), settings["positions"]
    if type(padding) is not int or not 0 <= padding < rows - 1:
        raise UserError(f"config.json: pad_token_id={padding} leaves no positions of {rows}; correct the config")
    return settings | {"position_offset": padding + 1, "positions": rows - padding - 1}


def to_reference(settings: Settings, pad_id: int | None = None) -> dict[str, Any]:
    """Returns the reference config of settings. Raises UserError naming each that the reference cannot express."""
    config = folders.write_settings(settings, SETTINGS, CONSTANTS)
    offset = settings.position_offset
    if pad_id not in (None, offset - 1):
        raise UserError(
            f"the tokenizer's padding id is {pad_id} but model.position_offset={offset}, where the reference has the "
            f"padding id + 1; train with model.position_offset={pad_id + 1}"
        )
    own = {"model_type": MODEL_TYPES[0], "pad_token_id": offset - 1}
    return config | own | {"max_position_embeddings": settings.positions + offset}


def reference_inputs(arrays: Mapping[str, np.ndarray], settings: Settings) -> dict[str, np.ndarray]:
    """Returns the batch of the reference's inputs; see `bert.reference_inputs`.

    Where no positions are given, tokens are counted and padding is not, wherever it stands, as in the reference.
    """
    if "position_ids" not in arrays:
        real = arrays["input_ids"] != settings.position_offset - 1
        check_length(int(real.sum(axis=-1).max()), settings.positions)
        arrays = {**arrays, "position_ids": real.cumsum(axis=-1) * real + settings.position_offset - 1}
    return bert.reference_inputs(arrays, settings)
