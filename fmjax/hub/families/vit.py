"""ViT in Hugging Face, `ViTConfig` and `ViTModel`, and its masked autoencoder, `ViTMAEConfig` and
`ViTMAEModel`."""

from __future__ import annotations

import dataclasses

import numpy as np

from fmjax.contracts import Config, HostBatch, Value
from fmjax.errors import UserError
from fmjax.hub.reference import Reference, Table
from fmjax.hub.rules import AS_IS, Rule, Rules, attention, linear, norm, under

INPUTS = ("pixel_values", "interpolate_pos_encoding", "patch_keep")
SETTINGS: Table = {
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("attention_heads", 12),
    "intermediate_size": ("mlp_width", 3072),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "num_channels": ("channels", 3),
    "qkv_bias": ("qkv_bias", True),
    "hidden_act": ("activation", "gelu"),
    "layer_norm_eps": ("epsilon", 1e-12),
    "initializer_range": ("initializer_range", 0.02),
    "hidden_dropout_prob": ("dropout", 0.0),
    "attention_probs_dropout_prob": ("attention_dropout", 0.0),
}
POOLER: Table = {
    "pooler_output_size": ("pooler_width", None),  # None: hidden_size
    "pooler_act": ("pooler_activation", "tanh"),
}
DECODER: Table = {
    "decoder_hidden_size": ("decoder_width", 512),
    "decoder_num_hidden_layers": ("decoder_layers", 8),
    "decoder_num_attention_heads": ("decoder_heads", 16),
    "decoder_intermediate_size": ("decoder_mlp_width", 2048),
}

LAYER: Rules = (
    *attention(
        "attention",
        (
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
            "attention.output.dense",
        ),
    ),
    *norm("attention_norm", "layernorm_before"),
    *linear("mlp/up", "intermediate.dense"),
    *linear("mlp/down", "output.dense"),
    *norm("mlp_norm", "layernorm_after"),
)
EMBED: Rules = (
    Rule("class_token", "cls_token", AS_IS),
    Rule("position", "position_embeddings", AS_IS),
    Rule("filters", "patch_embeddings.projection.weight", AS_IS),
    Rule("bias", "patch_embeddings.projection.bias", AS_IS),
)
BODY: Rules = (
    *under("embed", "embeddings", EMBED),
    *under("encoder/layers", "encoder.layer.{layer}", LAYER),
    *norm("encoder/norm", "layernorm"),
    *linear("encoder/pooler", "pooler.dense"),
)
PIXELS: Rules = (
    Rule("mask_token", "mask_token", AS_IS),
    Rule("position", "decoder_pos_embed", AS_IS),
    *linear("embed", "decoder_embed"),
    *under("layers", "decoder_encoder.layer.{layer}", LAYER),
    *norm("norm", "decoder_norm"),
    *linear("out", "decoder_pred"),
)


def square(key: str, value: Value) -> Value:
    """Returns the side of a size that may be given as [height, width].

    Raises UserError if it is not square.
    """
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise UserError(
            f"config.json: {key}={value} is not supported, only squares are; use another model"
        )
    return value[0]


def prepare(config: Config) -> Config:
    """Returns the config with a single number for each size."""
    sizes = config.keys() & {"image_size", "patch_size"}
    return config | {key: square(key, config[key]) for key in sizes}


def complete(config: Config, settings: Config) -> Config:
    """Returns all settings; a pooler width of 0 means that of the layers."""
    same = settings["pooler_width"] in (None, settings["width"])
    return settings | ({"pooler_width": 0} if same else {})


def complete_mae(config: Config, settings: Config) -> Config:
    """Returns all settings of a masked autoencoder."""
    return settings | {"position_init": "sinusoids"}


def express(settings: Value, pad_id: int | None) -> Config:
    """Returns the width of the pooler."""
    return {"pooler_output_size": settings.pooler_width or settings.width}


def nothing(settings: Value, pad_id: int | None) -> Config:
    """Returns no further settings."""
    return {}


def batch(arrays: HostBatch, settings: Value) -> dict[str, np.ndarray]:
    """Returns `pixel_values [B,C,H,W]` as `images [B,H,W,C]` in fp32, and the other inputs.

    Raises UserError, naming both sides, for another number of channels, images smaller than a
    patch, and a different image size if `interpolate_pos_encoding` is false.
    """
    others = {name: array for name, array in arrays.items() if name not in INPUTS[:2]}
    if "pixel_values" not in arrays:
        return others
    pixels = arrays["pixel_values"]
    numbers = pixels.dtype.kind in "fiu"
    if pixels.ndim != 4 or not numbers or pixels.shape[1] != settings.channels or not len(pixels):
        wanted = f"[rows, {settings.channels} channels, height, width]"
        raise UserError(
            f"pixel_values: has shape {pixels.shape} and type {pixels.dtype}; pass numbers {wanted}"
        )
    height, width = pixels.shape[2:]
    if min(height, width) < settings.patch_size:
        patch = f"a patch of {settings.patch_size}"
        raise UserError(
            f"pixel_values: {height} x {width} pixels are fewer than {patch}; use larger images"
        )
    size = settings.image_size
    if not np.all(arrays.get("interpolate_pos_encoding", True)) and (height, width) != (size, size):
        raise UserError(
            f"pixel_values: {height} x {width} pixels are not the {size} x {size} of the model; "
            "resize the images, or leave interpolate_pos_encoding out"
        )
    images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1), np.float32)
    return {"images": images} | others


MAE = Reference(
    model_types=("vit_mae",),
    architectures={"ViTMAEModel": {}, "ViTMAEForPreTraining": {"pixels": "logits"}},
    inputs=INPUTS,
    settings={**SETTINGS, **DECODER},
    # For MAE's task, which here draws `patch_keep` and computes the targets.
    unread=("encoder_stride", "mask_ratio", "norm_pix_loss"),
    constants={"class_tokens": 1},
    prepare=prepare,
    complete=complete_mae,
    express=nothing,
    batch=batch,
    prefix="vit.",
    weights=(
        *under("", "vit", BODY),
        *linear("head/classify", "classifier"),
        *under("head/pixels", "decoder", PIXELS),
    ),
)
REFERENCE = dataclasses.replace(
    MAE,
    model_types=("vit",),
    architectures={
        "ViTModel": {"pooled": "pooler_output"},
        "ViTForImageClassification": {"classify": "logits"},
    },
    settings={**SETTINGS, **POOLER},
    constants={"class_tokens": 1, "pool": "first", "classifier_dropout": 0.0},
    complete=complete,
    express=express,
    variants=(MAE,),
)
