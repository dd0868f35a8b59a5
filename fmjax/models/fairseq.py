"""How Hugging Face stores the encoder-decoders that come from fairseq's code (Ott et al. 2019): Marian, BART and mBART.

Their settings and the weights of their layers have the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmjax.errors import UserError, nearest
from fmjax.hub import folders
from fmjax.hub.tensors import Tensor
from fmjax.layers.mlp import ACTIVATIONS

Config = Mapping[str, Any]
Table = dict[str, tuple[str, Any]]

# The reference's setting -> ours, and the reference's default.
SETTINGS: Table = {
    "vocab_size": ("vocab_size", 50265),
    "d_model": ("width", 1024),
    "encoder_layers": ("layers", 12),
    "encoder_attention_heads": ("attention_heads", 16),
    "encoder_ffn_dim": ("mlp_width", 4096),
    "decoder_layers": ("decoder_layers", 12),
    "decoder_attention_heads": ("decoder_attention_heads", 16),
    "decoder_ffn_dim": ("decoder_mlp_width", 4096),
    "max_position_embeddings": ("positions", 1024),
    "scale_embedding": ("scale_embedding", False),
    "activation_function": ("activation", "gelu"),
    "init_std": ("initializer_range", 0.02),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.0),
    "activation_dropout": ("activation_dropout", 0.0),
}
# Settings of the reference that are handled with this value alone.
FIXED: Config = {
    "is_encoder_decoder": True,
    "is_decoder": False,
    "add_bias_logits": False,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
# Read elsewhere: by hand in the families, and by generation.
OWN = ("decoder_start_token_id", "tie_word_embeddings")
GENERATION = (
    *("bad_words_ids", "force_bos_token_to_be_generated", "forced_bos_token_id", "forced_eos_token_id"),
    *("num_beam_groups", "diversity_penalty"),
)
# Settings that the reference itself never reads: the encoder's layers again, a classifier's that is not built, old code's.
UNREAD = ("num_hidden_layers", "extra_pos_embeddings", "classif_dropout", "classifier_dropout", "prefix", "replacing_rate")

BIAS = "final_logits_bias"


def layers(side: str, prefix: str) -> dict[str, str]:
    """Returns the table of the encoder's or the decoder's layers: ours -> the reference's."""
    parts = {"attention": "self_attn"} | ({"cross": "encoder_attn"} if side == "decoder" else {})
    table = {"mlp/up": "fc1", "mlp/down": "fc2", "mlp_norm": "final_layer_norm"}
    for ours, theirs in parts.items():
        table |= {f"{ours}/{kind}": f"{theirs}.{kind[0]}_proj" for kind in ("query", "key", "value")}
        table |= {f"{ours}/out": f"{theirs}.out_proj", f"{ours}_norm": f"{theirs}_layer_norm"}
    return {
        f"{side}/layers/{ours}/{leaf}": f"{prefix}{side}.layers.{{layer}}.{theirs}.{kind}"
        for ours, theirs in table.items()
        for leaf, kind in (("scale" if ours.endswith("norm") else "kernel", "weight"), ("bias", "bias"))
    }


def unpack(tensors: Mapping[str, Tensor], table: str) -> dict[str, Tensor]:
    """Returns tensors with the logits' bias, a buffer [1,V] in the reference, as a vector; of zeros where it is not stored.

    `table` is the name of the embedding that gives the logits.
    """
    named = dict(tensors)
    if BIAS in named:
        bias = named[BIAS]
        named[BIAS] = Tensor(bias.shape[-1:], lambda: bias.read().reshape(-1))
    elif table in named:
        vocabulary = named[table].shape[:1]
        named[BIAS] = Tensor(vocabulary, lambda: np.zeros(vocabulary, np.float32))
    return named


def pack(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors with the logits' bias as the reference stores it."""
    return {name: array[None] if name == BIAS else array for name, array in tensors.items()}


def read_settings(
    config: Config, table: Table, fixed: Config, own: tuple[str, ...], start: int | None, end: int
) -> dict[str, Any]:
    """Returns the settings of a reference config, of which the family itself reads the keys `own`.

    `start` and `end` are the reference's defaults for what the decoder reads first, None being the end, and for what ends a
    text. Raises UserError naming each setting that is not handled.
    """
    settings = folders.read_settings(config, table, fixed, (*UNREAD, *OWN, *GENERATION, *own))
    if (name := settings["activation"]) not in ACTIVATIONS:
        known = f"{nearest(name, ACTIVATIONS)}; those that are: {', '.join(ACTIVATIONS)}"
        raise UserError(f'config.json: activation_function="{name}" is not handled{known}')
    last = config.get("eos_token_id", end)
    first = config.get("decoder_start_token_id", start)
    first = last if first is None else first
    for name, token in (("eos_token_id", last), ("decoder_start_token_id", first)):
        if type(token) is not int or token < 0:
            raise UserError(f"config.json: {name}={token!r} is not the id of a token; correct it")
    return settings | {"start_id": first, "end_id": last}


def write_settings(settings: Any, table: Table, constants: Config) -> dict[str, Any]:
    """Returns what every reference config here has; a number of the decoder that is 0 here is the encoder's.

    Raises UserError for a setting that the reference has with the value in `constants` alone.
    """
    same = ("layers", "attention_heads", "mlp_width")
    decoder = {f"decoder_{name}": getattr(settings, f"decoder_{name}") or getattr(settings, name) for name in same}
    config = folders.write_settings(dataclasses.replace(settings, **decoder), table, constants)
    tokens = {"decoder_start_token_id": settings.start_id, "eos_token_id": settings.end_id}
    return config | tokens | {"is_encoder_decoder": True, "forced_eos_token_id": settings.end_id}
