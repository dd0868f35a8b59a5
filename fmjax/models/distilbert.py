"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108), following Hugging Face's `modeling_distilbert.py`.

BERT with half the layers, without token types and pooler. In training, the reference has no dropout on the output of
attention; here `dropout` acts there too, as in BERT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from fmjax import contracts
from fmjax.hub import folders
from fmjax.layers.heads import HeadTable, Tag
from fmjax.layers.linear import normal
from fmjax.models import bert
from fmjax.models.sizes import resolve

SIZES = {"base": bert.SIZES["base"] | {"layers": 6}}


@dataclasses.dataclass(frozen=True)
class Settings(bert.Settings):
    """BERT's settings with DistilBERT's values."""

    token_types: int = 0
    classifier_dropout: float = 0.2
    span_dropout: float = 0.1


def heads_of(settings: Settings) -> HeadTable:
    """Returns the builder of each kind of head."""
    init = normal(settings.initializer_range)
    return {
        **bert.common_heads(settings),
        "mlm": bert.masked_lm(settings, settings.activation),
        "classify": bert.classify_first(settings, "relu", input_dropout=0.0),
        "choice": bert.classify_first(settings, "relu", input_dropout=0.0, classes=1),
        "tag": partial(Tag, dropout=settings.dropout, kernel_init=init),
        "span": partial(Tag, classes=2, dropout=settings.span_dropout, kernel_init=init),
    }


def build(*, heads: contracts.Heads, size: str = "base", **settings: Any) -> bert.Bert:
    """Returns a DistilBERT of a named size (SIZES) with the given heads; see `bert.build`."""
    return bert.checked_model(bert.Bert(heads, resolve(Settings, SIZES, size, settings), heads_of))


MODEL_TYPES = ("distilbert",)
PREFIX = "distilbert."
ARCHITECTURES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "DistilBertModel": {},
    "DistilBertForMaskedLM": {"mlm": "logits"},
    "DistilBertForSequenceClassification": {"classify": "logits"},
    "DistilBertForTokenClassification": {"tag": "logits"},
    "DistilBertForQuestionAnswering": {"span": bert.SPAN},
    "DistilBertForMultipleChoice": {"choice": ("logits",)},
}
INPUTS = ("input_ids", "attention_mask", "position_ids")
SETTINGS: bert.Table = {
    "vocab_size": ("vocab_size", 30522),
    "dim": ("width", 768),
    "n_layers": ("layers", 6),
    "n_heads": ("attention_heads", 12),
    "hidden_dim": ("mlp_width", 3072),
    "max_position_embeddings": ("positions", 512),
    "activation": ("activation", "gelu"),
    "initializer_range": ("initializer_range", 0.02),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "seq_classif_dropout": ("classifier_dropout", 0.2),
    "qa_dropout": ("span_dropout", 0.1),
}
FIXED = {**bert.FIXED, "tie_weights_": True}
CONSTANTS = {**bert.CONSTANTS, "token_types": 0, "epsilon": 1e-12}
UNREAD = ("sinusoidal_pos_embds",)  # how the position table was initialised
# BERT's name -> DistilBERT's, in this order.
RENAMED = {
    "encoder.": "transformer.",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
WEIGHTS: dict[str, str] = bert.renamed(RENAMED, PREFIX, without=("embed/token_type", "encoder/pooler")) | {
    **bert.SHARED,
    "head/mlm/dense/kernel": "vocab_transform.weight",
    "head/mlm/dense/bias": "vocab_transform.bias",
    "head/mlm/norm/scale": "vocab_layer_norm.weight",
    "head/mlm/norm/bias": "vocab_layer_norm.bias",
    "head/mlm/bias": "vocab_projector.bias",
    "head/classify/dense/kernel": "pre_classifier.weight",
    "head/classify/dense/bias": "pre_classifier.bias",
    "head/classify/kernel": "classifier.weight",
    "head/classify/bias": "classifier.bias",
    "head/choice/dense/kernel": "pre_classifier.weight",
    "head/choice/dense/bias": "pre_classifier.bias",
    "head/choice/kernel": "classifier.weight",
    "head/choice/bias": "classifier.bias",
}
TIED = {"vocab_projector.weight": "embed/word/embedding"}


def from_reference(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings for `build` of a reference config. Raises UserError naming each setting not handled."""
    return bert.read_settings(config, SETTINGS, FIXED, CONSTANTS, UNREAD)


def to_reference(settings: Settings, pad_id: int | None = None) -> dict[str, Any]:
    """Returns the reference config of settings. Raises UserError naming each that the reference cannot express."""
    config = folders.write_settings(settings, SETTINGS, CONSTANTS)
    return config | {"model_type": MODEL_TYPES[0], "pad_token_id": pad_id or 0}


reference_inputs = bert.reference_inputs
