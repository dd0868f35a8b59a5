"""Mistral in Hugging Face, `MistralConfig` and `MistralModel`."""

from __future__ import annotations

from typing import Any

from fmjax.contracts import Config
from fmjax.hub.families import gpt, llama
from fmjax.hub.reference import Reference

WINDOW = "sliding_window"


def prepare(config: Config) -> Config:
    """Returns the config in Llama's form: with 8 key heads by default, and without a null
    window."""
    given = {key: value for key, value in config.items() if value is not None or key != WINDOW}
    return llama.prepare({"num_key_value_heads": 8} | given)


def complete(config: Config, settings: Config) -> Config:
    """Returns all settings: a missing window has the default value; null means no window."""
    none = {"window": 0} if config.get(WINDOW, 0) is None else {}
    return gpt.complete(config, settings) | none


def express(settings: Any, pad_id: int | None) -> Config:
    """Returns the remaining settings of Mistral."""
    return llama.express(settings, pad_id) | {WINDOW: settings.window or None}


REFERENCE = Reference(
    model_types=("mistral",),
    architectures=llama.architectures("Mistral"),
    inputs=llama.REFERENCE.inputs,
    settings={
        **llama.SHARED,
        "intermediate_size": ("mlp_width", 14336),
        "max_position_embeddings": ("context", 4096 * 32),
        WINDOW: ("window", 4096),
    },
    fixed=llama.FIXED,
    unread=llama.UNREAD,
    constants={"positions": 0, "qkv_bias": False, "out_bias": False, "mlp_bias": False},
    prepare=prepare,
    complete=complete,
    express=express,
    prefix="model.",
    weights=llama.weights(qkv_bias=False, out_bias=False, mlp_bias=False),
    tied=llama.REFERENCE.tied,
)
