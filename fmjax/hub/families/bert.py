"""BERT in Hugging Face, `BertConfig` and `BertModel`; code shared with its descendants."""

from __future__ import annotations

from fmjax.contracts import Config
from fmjax.hub.reference import Outputs, Reference, Table
from fmjax.hub.rules import AS_IS, Rule, Rules, attention, embedding, linear, norm, under
from fmjax.models.bert import INPUTS

SPAN = ("start_logits", "end_logits")
ARCHITECTURES: dict[str, Outputs] = {
    "BertModel": {"pooled": "pooler_output"},
    "BertForMaskedLM": {"mlm": "logits"},
    "BertForPreTraining": {"mlm": "prediction_logits", "nsp": "seq_relationship_logits"},
    "BertForNextSentencePrediction": {"nsp": "logits"},
    "BertForSequenceClassification": {"classify": "logits"},
    "BertForTokenClassification": {"tag": "logits"},
    "BertForQuestionAnswering": {"span": SPAN},
    "BertForMultipleChoice": {"choice": ("logits",)},
}
SETTINGS: Table = {
    "vocab_size": ("vocab_size", 30522),
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("attention_heads", 12),
    "intermediate_size": ("mlp_width", 3072),
    "max_position_embeddings": ("positions", 512),
    "type_vocab_size": ("token_types", 2),
    "hidden_act": ("activation", "gelu"),
    "layer_norm_eps": ("epsilon", 1e-12),
    "initializer_range": ("initializer_range", 0.02),
    "hidden_dropout_prob": ("dropout", 0.1),
    "attention_probs_dropout_prob": ("attention_dropout", 0.1),
    "classifier_dropout": ("classifier_dropout", None),  # None: hidden_dropout_prob
}
FIXED: Config = {
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "pooler_type": "first_token_transform",
}
# Left over from the original BERT code.
UNREAD = (
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
)

LAYER: Rules = (
    *attention(
        "attention",
        (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ),
    ),
    *norm("attention_norm", "attention.output.LayerNorm"),
    *linear("mlp/up", "intermediate.dense"),
    *linear("mlp/down", "output.dense"),
    *norm("mlp_norm", "output.LayerNorm"),
)
EMBED: Rules = (
    *embedding("word", "word_embeddings"),
    *embedding("position", "position_embeddings"),
    *norm("norm", "LayerNorm"),
)
TOKEN_TYPES: Rules = embedding("embed/token_type", "embeddings.token_type_embeddings")
POOLER: Rules = linear("encoder/pooler", "pooler.dense")
BODY: Rules = (
    *under("embed", "embeddings", EMBED),
    *under("encoder/layers", "encoder.layer.{layer}", LAYER),
)
# Heads with the same names in all descendants.
SHARED: Rules = (*linear("head/tag", "classifier"), *linear("head/span", "qa_outputs"))


def masked_lm(dense: str, norms: str, bias: str) -> Rules:
    """Returns the rules of a masked-language-model head, by the reference's names of its parts."""
    return (
        *linear("head/mlm/dense", dense),
        *norm("head/mlm/norm", norms),
        Rule("head/mlm/bias", bias, AS_IS),
    )


def complete(config: Config, settings: Config) -> Config:
    """Returns all settings: the embeddings have the dropout rate of the layers, and so does the
    classifier by default."""
    same = {"embedding_dropout": settings["dropout"]}
    if settings["classifier_dropout"] is None:
        same["classifier_dropout"] = settings["dropout"]
    return settings | same


REFERENCE = Reference(
    model_types=("bert",),
    architectures=ARCHITECTURES,
    inputs=INPUTS,
    settings=SETTINGS,
    fixed=FIXED,
    unread=UNREAD,
    constants={"position_offset": 0, "embedding_width": 0},
    complete=complete,
    prefix="bert.",
    weights=(
        *under("", "bert", (*BODY, *TOKEN_TYPES, *POOLER)),
        *SHARED,
        *masked_lm(
            dense="cls.predictions.transform.dense",
            norms="cls.predictions.transform.LayerNorm",
            bias="cls.predictions.bias",
        ),
        *linear("head/nsp", "cls.seq_relationship"),
        *linear("head/classify", "classifier"),
        *linear("head/choice", "classifier"),
    ),
    tied={
        "cls.predictions.decoder.weight": "embed/word/embedding",
        "cls.predictions.decoder.bias": "head/mlm/bias",
    },
)
