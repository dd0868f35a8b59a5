"""Llama in Hugging Face, `LlamaConfig` and `LlamaModel`; code shared with Mistral and Qwen2."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fmjax.contracts import Config, Value
from fmjax.errors import UserError
from fmjax.hub.families import gpt
from fmjax.hub.reference import Outputs, Reference, Table, fits, require
from fmjax.hub.rules import Rules, attention, embedding, linear, norm, under
from fmjax.models.llama import INPUTS

# The reference's rotary settings -> ours, and the reference's default.
ROTARY: Table = {
    "rope_theta": ("rotary_base", 10000.0),
    "rope_type": ("rotary_scaling", "default"),
    "factor": ("rotary_factor", 1.0),
    "low_freq_factor": ("rotary_low", 1.0),
    "high_freq_factor": ("rotary_high", 4.0),
    "original_max_position_embeddings": ("rotary_context", 8192),
}
# The scaling -> the settings that it reads.
READ: Mapping[str, tuple[str, ...]] = {
    "default": ("rope_theta", "rope_type"),
    "linear": ("rope_theta", "rope_type", "factor"),
    "llama3": tuple(ROTARY),
}
SECTION = "rope_parameters"
# Shared by Llama and related models.
SHARED: Table = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("width", 4096),
    "num_hidden_layers": ("layers", 32),
    "num_attention_heads": ("attention_heads", 32),
    "num_key_value_heads": ("kv_heads", 32),
    "head_dim": ("head_width", 128),
    "intermediate_size": ("mlp_width", 11008),
    "max_position_embeddings": ("context", 2048),
    "hidden_act": ("activation", "silu"),
    "rms_norm_eps": ("epsilon", 1e-6),
    "initializer_range": ("initializer_range", 0.02),
    "attention_dropout": ("attention_dropout", 0.0),
    "tie_word_embeddings": ("tied", False),
    **{f"{SECTION}.{key}": row for key, row in ROTARY.items()},
}
FIXED: Config = {"is_encoder_decoder": False, "add_cross_attention": False}
# A former way to split products in the reference, with the same results.
UNREAD = ("pretraining_tp", "is_decoder")


def architectures(stem: str) -> dict[str, Outputs]:
    """Returns the classes whose names begin with `stem`."""
    return {
        f"{stem}Model": {},
        f"{stem}ForCausalLM": {"lm": "logits"},
        f"{stem}ForSequenceClassification": {"classify": "logits"},
    }


def weights(*, qkv_bias: bool, out_bias: bool, mlp_bias: bool) -> Rules:
    """Returns the rules of a decoder whose layers have these biases."""
    own = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    layer = (
        *norm("attention_norm", "input_layernorm", bias=False),
        *attention("attention", own, bias=qkv_bias, out_bias=out_bias),
        *norm("mlp_norm", "post_attention_layernorm", bias=False),
        *linear("mlp/gate", "mlp.gate_proj", bias=mlp_bias),
        *linear("mlp/up", "mlp.up_proj", bias=mlp_bias),
        *linear("mlp/down", "mlp.down_proj", bias=mlp_bias),
    )
    return (
        *embedding("embed/word", "model.embed_tokens"),
        *under("decoder/layers", "model.layers.{layer}", layer),
        *norm("decoder/norm", "model.norm", bias=False),
        *linear("head/lm", "lm_head", bias=False),
        *linear("head/classify", "score", bias=False),
    )


def rotary(config: Config) -> Config:
    """Returns the config with all settings of rotary positions in `rope_parameters`.

    Before transformers 5, they were in `rope_theta` and `rope_scaling`. Raises UserError, naming
    what is not supported.
    """
    others = dict(config)
    base, old = others.pop("rope_theta", None), others.pop("rope_scaling", None) or {}
    new = others.pop(SECTION, None) or {}
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise UserError(
            f"config.json: {SECTION} and rope_scaling must be objects; correct the config"
        )
    given = {"rope_theta": base, **old, **new}
    given["rope_type"] = given.get("rope_type") or given.pop("type", None) or "default"
    given = {key: value for key, value in given.items() if value is not None and key != "type"}
    kind = given["rope_type"]
    if kind not in READ:
        known = ", ".join(READ)
        raise UserError(
            f"config.json: rope_type={json.dumps(kind)} is not supported; supported: {known}"
        )
    if unknown := [key for key in given if key not in READ[kind]]:
        values = ", ".join(f"{key}={json.dumps(given[key])}" for key in unknown)
        raise UserError(
            f'config.json: not supported with rope_type="{kind}": {values}; use another model'
        )
    if missing := [key for key in READ[kind][2:] if key not in given]:
        raise UserError(f'config.json: rope_type="{kind}" needs {", ".join(missing)}; add them')
    for key, value in given.items():
        if key != "rope_type" and fits(value, ROTARY[key][1]) and not value > 0:
            raise UserError(f"config.json: {key}={json.dumps(value)} must be above 0; correct it")
    return others | {SECTION: given}


def prepare(config: Config) -> Config:
    """Returns the config with rotary positions in one place.

    By default there are as many key heads as query heads, as wide as fits the model's width.
    """
    config = rotary(config)
    width: Value = config.get("hidden_size", SHARED["hidden_size"][1])
    heads: Value = config.get("num_attention_heads", SHARED["num_attention_heads"][1])
    filled = {"num_key_value_heads": heads}
    if fits(width, 1) and fits(heads, 1):
        filled["head_dim"] = width // heads
    return filled | {
        key: value for key, value in config.items() if value is not None or key not in filled
    }


def complete(config: Config, settings: Config) -> Config:
    """Returns all settings: the output has a bias if queries do."""
    return gpt.complete(config, settings) | {"out_bias": settings["qkv_bias"]}


def express(settings: Any, pad_id: int | None) -> Config:
    """Returns the remaining settings of Llama and related models: heads, padding and the scaling of
    positions, under the names of transformers 5 and the old names, which transformers 4 reads."""
    read = READ[settings.rotary_scaling]
    positions = {key: getattr(settings, name) for key, (name, _) in ROTARY.items() if key in read}
    scaling = {key: value for key, value in positions.items() if key != "rope_theta"}
    return gpt.express(settings, pad_id) | {
        "num_key_value_heads": settings.kv_heads or settings.attention_heads,
        "head_dim": settings.head_width or settings.width // settings.attention_heads,
        SECTION: positions,
        "rope_theta": positions["rope_theta"],
        "rope_scaling": scaling if len(scaling) > 1 else None,
    }


def express_llama(settings: Any, pad_id: int | None) -> Config:
    """Returns the remaining settings of Llama.

    Raises UserError if its output and its queries do not agree about biases.
    """
    require(settings, {"out_bias": settings.qkv_bias})
    return express(settings, pad_id)


REFERENCE = Reference(
    model_types=("llama",),
    architectures=architectures("Llama"),
    inputs=INPUTS,
    settings={
        **SHARED,
        "attention_bias": ("qkv_bias", False),
        "mlp_bias": ("mlp_bias", False),
    },
    fixed=FIXED,
    unread=UNREAD,
    constants={"positions": 0, "window": 0},
    prepare=prepare,
    complete=complete,
    express=express_llama,
    prefix="model.",
    weights=weights(qkv_bias=True, out_bias=True, mlp_bias=True),
    tied={"lm_head.weight": "embed/word/embedding"},
)
