"""Qwen2 in Hugging Face, `Qwen2Config` and `Qwen2Model`."""

from __future__ import annotations

from fmjax.contracts import Config
from fmjax.errors import UserError
from fmjax.hub.families import gpt, llama
from fmjax.hub.reference import Reference


def prepare(config: Config) -> Config:
    """Returns the config in Llama's form. Raises UserError if a layer has a window."""
    kinds = config.get("layer_types") or ()
    if other := [kind for kind in kinds if kind != "full_attention"]:
        raise UserError(
            f'config.json: layer_types has "{other[0]}"; only "full_attention" is supported; '
            "use another model"
        )
    return llama.prepare({key: value for key, value in config.items() if key != "layer_types"})


REFERENCE = Reference(
    model_types=("qwen2",),
    architectures=llama.architectures("Qwen2"),
    inputs=llama.REFERENCE.inputs,
    settings={
        **llama.SHARED,
        "vocab_size": ("vocab_size", 151936),
        "intermediate_size": ("mlp_width", 22016),
        "max_position_embeddings": ("context", 32768),
    },
    fixed={**llama.FIXED, "use_sliding_window": False},
    # The window's settings have no effect if it is not used.
    unread=(*llama.UNREAD, "sliding_window", "max_window_layers"),
    constants={"positions": 0, "window": 0, "qkv_bias": True, "out_bias": False, "mlp_bias": False},
    prepare=prepare,
    complete=gpt.complete,
    express=llama.express,
    prefix="model.",
    weights=llama.weights(qkv_bias=True, out_bias=False, mlp_bias=False),
    tied=llama.REFERENCE.tied,
)
