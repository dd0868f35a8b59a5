"""GPT-2 in Hugging Face, `GPT2Config` and `GPT2Model`."""

from __future__ import annotations

from typing import Any

from fmjax.contracts import Config
from fmjax.errors import UserError
from fmjax.hub.reference import Reference, anything, fits
from fmjax.hub.rules import VECTOR, Fused, Linear, Rule, Rules, embedding, linear, norm, under
from fmjax.models.gpt import INPUTS

# Its Conv1D stores a matrix [in, out].
CONV1D = Linear(transposed=False)
MERGE_HEADS = Linear(inputs=2, transposed=False)


def fused(leaf: str) -> tuple[str, ...]:
    """Returns the parameters that are concatenated in `c_attn`."""
    return tuple(f"attention/{kind}/{leaf}" for kind in ("query", "key", "value"))


LAYER: Rules = (
    *norm("attention_norm", "ln_1"),
    Rule(fused("kernel"), "attn.c_attn.weight", Fused(CONV1D, axis=1)),
    Rule(fused("bias"), "attn.c_attn.bias", Fused(VECTOR)),
    *linear("attention/out", "attn.c_proj", kernel=MERGE_HEADS),
    *norm("mlp_norm", "ln_2"),
    *linear("mlp/up", "mlp.c_fc", kernel=CONV1D),
    *linear("mlp/down", "mlp.c_proj", kernel=CONV1D),
)


def prepare(config: Config) -> Config:
    """Returns the config with the width of the feed-forward layers, by default four times the model
    width."""
    if config.get("n_inner") is None and fits(width := config.get("n_embd", 768), 1):
        return {**config, "n_inner": 4 * width}
    return config


def padding(config: Config, vocab_size: int) -> int:
    """Returns a config's padding id, -1 if it has none.

    Raises UserError if that is not in the vocabulary.
    """
    pad_id = config.get("pad_token_id")
    if pad_id is None:
        return -1
    if type(pad_id) is not int or not -1 <= pad_id < vocab_size:
        raise UserError(
            f"config.json: pad_token_id={pad_id} is not one of the {vocab_size} tokens; correct "
            "it, or leave it out"
        )
    return pad_id


def complete(config: Config, settings: Config) -> Config:
    """Returns all settings, including the padding id, which determines the token that a classifier
    reads."""
    return settings | {"pad_id": padding(config, settings["vocab_size"])}


def express(settings: Any, pad_id: int | None) -> Config:
    """Returns the padding id of the model, or else of the tokenizer."""
    return {"pad_token_id": pad_id if settings.pad_id < 0 else settings.pad_id}


REFERENCE = Reference(
    model_types=("gpt2",),
    architectures={
        "GPT2Model": {},
        "GPT2LMHeadModel": {"lm": "logits"},
        "GPT2ForSequenceClassification": {"classify": "logits"},
    },
    inputs=INPUTS,
    settings={
        "vocab_size": ("vocab_size", 50257),
        "n_embd": ("width", 768),
        "n_layer": ("layers", 12),
        "n_head": ("attention_heads", 12),
        "n_inner": ("mlp_width", 3072),
        "n_positions": ("positions", 1024),
        "activation_function": ("activation", "gelu_new"),
        "layer_norm_epsilon": ("epsilon", 1e-5),
        "initializer_range": ("initializer_range", 0.02),
        "resid_pdrop": ("dropout", 0.1),
        "embd_pdrop": ("embedding_dropout", 0.1),
        "attn_pdrop": ("attention_dropout", 0.1),
        "tie_word_embeddings": ("tied", True),
    },
    fixed={
        "add_cross_attention": False,
        "is_encoder_decoder": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    },
    # The reference never reads n_ctx and is_decoder; only multiple choice uses its sequence
    # summary.
    unread=(
        "n_ctx",
        "is_decoder",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
    ),
    prepare=prepare,
    complete=complete,
    express=express,
    prefix="transformer.",
    weights=(
        *embedding("embed/word", "transformer.wte"),
        *embedding("embed/position", "transformer.wpe"),
        *under("decoder/layers", "transformer.h.{layer}", LAYER),
        *norm("decoder/norm", "transformer.ln_f"),
        *linear("head/lm", "lm_head", bias=False),
        *linear("head/classify", "score", bias=False),
    ),
    tied={"lm_head.weight": "embed/word/embedding"},
    buffers=dict.fromkeys(
        (".attn.bias", ".attn.masked_bias"), anything
    ),  # the causal mask, in old files
)
