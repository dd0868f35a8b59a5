"""DistilBERT in Hugging Face, `DistilBertConfig` and `DistilBertModel`."""

from __future__ import annotations

from fmjax.hub.families import bert
from fmjax.hub.reference import Reference
from fmjax.hub.rules import Rules, attention, linear, norm, under
from fmjax.models.distilbert import INPUTS

LAYER: Rules = (
    *attention(
        "attention",
        (
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
        ),
    ),
    *norm("attention_norm", "sa_layer_norm"),
    *linear("mlp/up", "ffn.lin1"),
    *linear("mlp/down", "ffn.lin2"),
    *norm("mlp_norm", "output_layer_norm"),
)

REFERENCE = Reference(
    model_types=("distilbert",),
    architectures={
        "DistilBertModel": {},
        "DistilBertForMaskedLM": {"mlm": "logits"},
        "DistilBertForSequenceClassification": {"classify": "logits"},
        "DistilBertForTokenClassification": {"tag": "logits"},
        "DistilBertForQuestionAnswering": {"span": bert.SPAN},
        "DistilBertForMultipleChoice": {"choice": ("logits",)},
    },
    inputs=INPUTS,
    settings={
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
    },
    fixed={**bert.FIXED, "tie_weights_": True},
    unread=("sinusoidal_pos_embds",),  # how the position table was initialized
    constants={"position_offset": 0, "embedding_width": 0, "token_types": 0, "epsilon": 1e-12},
    complete=bert.complete,
    prefix="distilbert.",
    weights=(
        *under("embed", "distilbert.embeddings", bert.EMBED),
        *under("encoder/layers", "distilbert.transformer.layer.{layer}", LAYER),
        *bert.SHARED,
        *bert.masked_lm(
            dense="vocab_transform", norms="vocab_layer_norm", bias="vocab_projector.bias"
        ),
        *linear("head/classify/dense", "pre_classifier"),
        *linear("head/classify", "classifier"),
        *linear("head/choice/dense", "pre_classifier"),
        *linear("head/choice", "classifier"),
    ),
    tied={"vocab_projector.weight": "embed/word/embedding"},
)
