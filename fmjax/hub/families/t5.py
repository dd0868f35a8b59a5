"""T5 in Hugging Face, `T5Config` and `T5Model`; also T5 v1.1, FLAN and mT5.

umT5, which has a table of distances in every layer, is a different model.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from fmjax.contracts import Config, HostBatch
from fmjax.errors import UserError
from fmjax.hub.reference import Outputs, Reference, Table, anything, other_values
from fmjax.hub.rules import AS_IS, LINEAR, Rule, Rules, attention, embedding, linear, norm, under
from fmjax.layers.mlp import GatedMlp
from fmjax.models.t5 import FEED_FORWARD, INPUTS

ENCODERS = ("T5EncoderModel", "MT5EncoderModel")
T5: dict[str, Outputs] = {"T5Model": {}, "T5ForConditionalGeneration": {"lm": "logits"}}
MT5: dict[str, Outputs] = {"MT5Model": {}, "MT5ForConditionalGeneration": {"lm": "logits"}}
ALONE: dict[str, Outputs] = {name: {} for name in ENCODERS}

SETTINGS: Table = {
    "vocab_size": ("vocab_size", 32128),
    "d_model": ("width", 512),
    "d_kv": ("head_width", 64),
    "d_ff": ("mlp_width", 2048),
    "num_layers": ("layers", 6),
    "num_decoder_layers": ("decoder_layers", None),  # None: num_layers
    "num_heads": ("attention_heads", 8),
    "relative_attention_num_buckets": ("buckets", 32),
    "relative_attention_max_distance": ("max_distance", 128),
    "feed_forward_proj": ("feed_forward", "relu"),
    "layer_norm_epsilon": ("epsilon", 1e-6),
    "initializer_factor": ("initializer_factor", 1.0),
    "dropout_rate": ("dropout", 0.1),
}
# mT5's defaults that differ.
MT5_SETTINGS: Table = {
    **SETTINGS,
    "vocab_size": ("vocab_size", 250112),
    "d_ff": ("mlp_width", 1024),
    "num_layers": ("layers", 8),
    "num_heads": ("attention_heads", 6),
    "feed_forward_proj": ("feed_forward", "gated-gelu"),
}
DISTANCES = "relative_attention_bias.weight"


def attend(ours: str, theirs: str) -> Rules:
    """Returns the rules of an attention layer."""
    names = (f"{theirs}.q", f"{theirs}.k", f"{theirs}.v", f"{theirs}.o")
    return attention(ours, names, bias=False)


def mlp(place: int) -> Rules:
    """Returns the rules of the feed-forward layer, which is part number `place` of a block.

    The projection is the same with and without a gate here, but has two names in the reference.
    """
    names = (
        Rule("mlp/gate/kernel", "wi_0.weight", LINEAR),
        Rule("mlp/up/kernel", "wi_1.weight", LINEAR, given="mlp/gate/kernel"),
        Rule("mlp/up/kernel", "wi.weight", LINEAR),
        *linear("mlp/down", "wo", bias=False),
    )
    parts = (*under("", "DenseReluDense", names), *norm("mlp_norm", "layer_norm", bias=False))
    return under("", f"layer.{place}", parts)


def stack(part: str) -> Rules:
    """Returns the rules of the "encoder" or the "decoder"."""
    cross = (
        *attend("cross", "layer.1.EncDecAttention"),
        *norm("cross_norm", "layer.1.layer_norm", bias=False),
    )
    block = (
        *attend("attention", "layer.0.SelfAttention"),
        *norm("attention_norm", "layer.0.layer_norm", bias=False),
        *(cross + mlp(2) if part == "decoder" else mlp(1)),
    )
    return (
        *under(f"{part}/layers", f"{part}.block.{{layer}}", block),
        Rule(f"{part}/relative", f"{part}.block.0.layer.0.SelfAttention.{DISTANCES}", AS_IS),
        *norm(f"{part}/norm", f"{part}.final_layer_norm", bias=False),
    )


def prepare(config: Config) -> Config:
    """Returns the config without the settings that its feed-forward layer determines.

    Raises UserError if the layer is not supported.
    """
    default = (MT5_SETTINGS if config.get("model_type") == "mt5" else SETTINGS)[
        "feed_forward_proj"
    ][1]
    name = config.get("feed_forward_proj", default)
    if name not in list(FEED_FORWARD):
        known = ", ".join(FEED_FORWARD)
        raise UserError(
            f"config.json: feed_forward_proj={json.dumps(name)} is not supported; supported: "
            f"{known}"
        )
    layer, activation = FEED_FORWARD[name]
    follows = {"dense_act_fn": activation, "is_gated_act": layer is GatedMlp}
    if refused := other_values(config, follows):
        raise UserError(f"config.json: not supported: {', '.join(refused)}; use another model")
    return {key: value for key, value in config.items() if key not in follows}


def complete(config: Config, settings: Config) -> Config:
    """Returns all settings: the decoder's depth and start, and whether its head is tied.

    In T5, a tied head and scaled hidden states go together. The reference has the second in
    `scale_decoder_outputs`; in old files, `tie_word_embeddings` means both.
    """
    start = config.get("decoder_start_token_id") or 0
    if type(start) is not int or not 0 <= start < settings["vocab_size"]:
        raise UserError(
            f"config.json: decoder_start_token_id={json.dumps(start)} is not an id of the "
            "vocabulary; correct the config"
        )
    depth = settings["decoder_layers"] or settings["layers"]
    alone = (config.get("architectures") or ["T5Model"])[0] in ENCODERS
    tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return settings | {
        "decoder_layers": 0 if alone else depth,
        "tied": bool(tied),
        "start_id": start,
    }


def complete_mt5(config: Config, settings: Config) -> Config:
    """Returns all settings of an mT5, whose head is never tied."""
    return complete(config, settings) | {"tied": False}


def express(settings: Any, pad_id: int | None) -> Config:
    """Returns the remaining settings of the config."""
    return {
        "pad_token_id": pad_id or 0,
        "decoder_start_token_id": settings.start_id,
        "num_decoder_layers": settings.decoder_layers or settings.layers,
        "tie_word_embeddings": settings.tied,
        "is_encoder_decoder": settings.decoder_layers > 0,
    }


def batch(arrays: HostBatch, settings: Any) -> dict[str, np.ndarray]:
    """Returns the inputs, with labels of -100, which the reference ignores, replaced by padding."""
    if "labels" not in arrays:
        return dict(arrays)
    labels = arrays["labels"]
    return {**arrays, "labels": np.where(labels == -100, settings.start_id, labels)}


REFERENCE = Reference(
    model_types=("t5",),
    architectures={**T5, **MT5, **ALONE},
    inputs=INPUTS,
    settings=SETTINGS,
    fixed={"is_decoder": False},
    # Read above; or determined by the architecture, another class's dropout, and the lengths of
    # T5's pretraining.
    unread=(
        *("decoder_start_token_id", "scale_decoder_outputs", "tie_word_embeddings"),
        *("is_encoder_decoder", "classifier_dropout", "n_positions"),
    ),
    prepare=prepare,
    complete=complete,
    express=express,
    batch=batch,
    weights=(
        *embedding("embed/word", "shared"),
        *stack("encoder"),
        *stack("decoder"),
        # If an untied head is not stored, it equals the word table, since the reference has not
        # separated them.
        Rule("head/lm/kernel", ("lm_head.weight", "shared.weight"), LINEAR),
    ),
    tied=dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        "embed/word/embedding",
    ),
    buffers={f".EncDecAttention.{DISTANCES}": anything},  # in old files
)
REFERENCE = dataclasses.replace(
    REFERENCE,
    variants=(
        dataclasses.replace(
            REFERENCE,
            model_types=("mt5",),
            architectures={**MT5, **T5, **ALONE},
            settings=MT5_SETTINGS,
            complete=complete_mt5,
        ),
    ),
)
