"""ViT (Dosovitskiy et al. 2021, arXiv:2010.11929) and the masked autoencoder on it (MAE, He et al. 2022, arXiv:2111.06377),
following Hugging Face's `modeling_vit.py` and `modeling_vit_mae.py`. DeiT is this encoder with one more token: `deit.py`.

Dimensions: B batch, H and W height and width, C channels, P patch size, N patches, T tokens before the patches, K patches that
the encoder reads, L tokens in all, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmjax import contracts
from fmjax.contracts import Arrays, Batch, PyTree
from fmjax.distributed.sharding import shard_embedded
from fmjax.errors import UserError, nearest
from fmjax.hub import folders
from fmjax.layers.attention import ALL, Attention, Context
from fmjax.layers.blocks import ModuleFactory, PreNorm
from fmjax.layers.grid import resized
from fmjax.layers.heads import Heads, HeadTable, Pooled, chosen, pooled_is_read
from fmjax.layers.linear import Dense, normal
from fmjax.layers.mlp import Mlp, activation
from fmjax.layers.norm import LayerNorm
from fmjax.layers.stack import stack
from fmjax.models.sizes import Compute, check_divides, checked, resolve
from fmjax.models.vit_embed import Embed, encoder_mask, patch_mask
from fmjax.models.vit_heads import POOLS, ClassifyToken, Pixels

Config = Mapping[str, Any]
Table = Mapping[str, tuple[str, Any]]

# tiny and small are those of DeiT (Touvron et al. 2021, arXiv:2012.12877).
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 192, "layers": 12, "attention_heads": 3, "mlp_width": 768},
    "small": {"width": 384, "layers": 12, "attention_heads": 6, "mlp_width": 1536},
    "base": {"width": 768, "layers": 12, "attention_heads": 12, "mlp_width": 3072},
    "large": {"width": 1024, "layers": 24, "attention_heads": 16, "mlp_width": 4096},
}
POSITION_INITS = ("normal", "sinusoids")


@dataclasses.dataclass(frozen=True)
class Settings(Compute):
    """The numbers and choices that make one ViT; `model` in a config."""

    width: int
    layers: int
    attention_heads: int
    mlp_width: int
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    qkv_bias: bool = True
    class_tokens: int = 1  # 0: none, for pool="mean"
    pool: str = "first"  # what is classified: the class token, or the "mean" of the patches
    position_init: str = "normal"  # or "sinusoids", to be frozen, as MAE has them
    activation: str = "gelu"
    epsilon: float = 1e-12
    initializer_range: float = 0.02
    dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.0
    pooler_width: int = 0  # 0: as wide as the layers
    pooler_activation: str = "tanh"
    decoder_width: int = 512  # of MAE's decoder, as the three below
    decoder_layers: int = 8
    decoder_heads: int = 16
    decoder_mlp_width: int = 2048

    @property
    def side(self) -> int:
        """The number of patches along a side of an image."""
        return self.image_size // self.patch_size


def layer(settings: Settings, width: int, heads: int, mlp_width: int, stochastic_depth: float = 0.0) -> ModuleFactory:
    """Returns the builder of a layer of the given sizes; the rest is as in the settings."""
    s = settings
    shared: dict[str, Any] = {"kernel_init": normal(s.initializer_range), "dtype": jnp.dtype(s.dtype)}
    biased = ALL if s.qkv_bias else ("out",)
    return partial(
        PreNorm,
        attention=partial(Attention, heads, width // heads, s.attention_dropout, biased=biased, **shared),
        mlp=partial(Mlp, mlp_width, activation(s.activation), **shared),
        norm=partial(LayerNorm, s.epsilon, jnp.dtype(s.dtype)),
        dropout=s.dropout,
        stochastic_depth=stochastic_depth,
    )


class Encoder(nn.Module):
    """The stack of layers, a norm, and the pooler if a head reads it."""

    settings: Settings
    pool: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask: jax.Array | None = None) -> Arrays:
        """Returns the features `hidden [B,L,D]` and, if pooled, `pooled [B,D]`."""
        s = self.settings
        dtype = jnp.dtype(s.dtype)
        block = layer(s, s.width, s.attention_heads, s.mlp_width, s.stochastic_depth)
        hidden, _ = stack(self, block, s.stacked(s.layers), x_BLD, Context(mask=mask))
        hidden = LayerNorm(s.epsilon, dtype, name="norm")(hidden)
        if not self.pool:
            return {"hidden": hidden}
        pooled_width = (s.pooler_width or s.width,)
        pooler = Dense(pooled_width, ("embed", None), normal(s.initializer_range), dtype=dtype, name="pooler")
        pooled = pooler(shard_embedded(hidden[:, 0]))
        return {"hidden": hidden, "pooled": activation(s.pooler_activation)(pooled)}


def heads_of(settings: Settings, tokens: int) -> HeadTable:
    """Returns the builder of each kind of head of an encoder with so many tokens before the patches."""
    s = settings
    init, dtype = normal(s.initializer_range), jnp.dtype(s.dtype)
    block = layer(s, s.decoder_width, s.decoder_heads, s.decoder_mlp_width)
    sizes = (s.decoder_width, s.stacked(s.decoder_layers), block, tokens, s.side, s.patch_size, s.epsilon)
    return {
        "pooled": Pooled,
        "classify": partial(ClassifyToken, tokens, s.pool, dropout=s.classifier_dropout, kernel_init=init),
        "pixels": partial(Pixels, *sizes, kernel_init=init, dtype=dtype),
    }


class Vit(nn.Module):
    """Maps a batch to features: `hidden [B,L,D]`, `pooled [B,D]` if a head reads it, and each head's output by kind.

    Inputs: `images [B,H,W,C]`, of any size: if the grid of patches is not that of `image_size`, positions are interpolated.
    With `patch_keep [B,K]` the encoder reads only those patches, numbered row by row. With `pixel_mask [B,H,W]` (1 is real)
    each image is the top left part of its canvas: patches that are not entirely real are masked, and positions are
    interpolated for the image's own grid, so the result is that of the image alone. `embedded_delta [B,L,D]` is optional.
    """

    heads: contracts.Heads
    settings: Settings
    tokens: tuple[str, ...] = ("class_token",)  # names of the learned tokens before the patches
    table: Callable[[Settings, int], HeadTable] = heads_of

    def head_makers(self) -> HeadTable:
        """Returns the builder of each kind of head that the family has."""
        return self.table(self.settings, len(self.tokens))

    @nn.compact
    def __call__(self, batch: Batch) -> Arrays:
        kinds = chosen(self.head_makers(), self.heads)
        if "pixel_mask" in batch:
            batch = {**batch, "patch_mask": patch_mask(batch["pixel_mask"], self.settings.patch_size)}
        x = Embed(self.settings, self.tokens, name="embed")(batch)
        mask = encoder_mask(batch, len(self.tokens))
        features = Encoder(self.settings, pooled_is_read(kinds), name="encoder")(x, mask)
        return features | Heads(kinds, name="head")(features, batch)

    def one_row_batch(self) -> Batch:
        """Returns a batch of one image, of one patch."""
        s = self.settings
        return {"images": jnp.zeros((1, s.patch_size, s.patch_size, s.channels))}

    def forward_flops(self, batch: Mapping[str, Any]) -> float:
        """Returns the floating-point operations of one forward pass over a batch: its matrix products, by formula."""
        s = self.settings
        rows, height, width, channels = batch["images"].shape
        count = (height // s.patch_size) * (width // s.patch_size)
        kept = batch["patch_keep"].shape[1] if "patch_keep" in batch else count
        pixels = s.patch_size**2 * channels

        def layers(number: int, wide: int, mlp: int, length: int) -> int:
            return number * length * (4 * wide * wide + 2 * wide * mlp + 2 * wide * length)

        total = count * pixels * s.width + layers(s.layers, s.width, s.mlp_width, kept + len(self.tokens))
        if "pixels" in self.heads:
            total += layers(s.decoder_layers, s.decoder_width, s.decoder_mlp_width, count + len(self.tokens))
            total += s.decoder_width * (kept * s.width + count * pixels)
        return float(2 * rows * total)


def build(*, heads: contracts.Heads, size: str = "base", **settings: Any) -> Vit:
    """Returns a ViT of a named size (SIZES) with the given heads; other settings are the fields of Settings.

    Raises UserError for an unknown size, setting or head, and for sizes that do not fit together.
    """
    resolved = resolve(Settings, SIZES, size, settings)
    return checked_model(Vit(heads, resolved, ("class_token",) * resolved.class_tokens))


def checked_model(model: Vit) -> Vit:
    """Returns the model, checked. Raises UserError if an image holds no patch, a choice is not known, or sizes clash, and as
    `sizes.checked` does."""
    s = model.settings
    check_divides("width", s.width, "attention_heads", s.attention_heads)
    checked(model)
    if not 1 <= s.patch_size <= s.image_size:
        raise UserError(f"model.image_size={s.image_size} holds no patch of model.patch_size={s.patch_size}; change one of them")
    for name, value, choices in (("pool", s.pool, POOLS), ("position_init", s.position_init, POSITION_INITS)):
        if value not in choices:
            raise UserError(f'model.{name}="{value}"{nearest(value, choices)}: choose one of {", ".join(choices)}')
    if s.class_tokens not in (0, 1) or (not s.class_tokens and (s.pool == "first" or "pooled" in model.heads)):
        raise UserError(
            f"model.class_tokens={s.class_tokens}: must be 1, or 0 where model.pool=mean reads none; change one of them"
        )
    if "pixels" in model.heads:
        check_divides("decoder_width", s.decoder_width, "decoder_heads", s.decoder_heads)
    return model


def fit_params(params: PyTree, settings: Settings) -> PyTree:
    """Returns parameters of another image size, with positions interpolated for that of the settings."""
    table = params["embed"]["position"]
    before = settings.class_tokens + ("distillation_token" in params["embed"])
    return params | {"embed": params["embed"] | {"position": resized(jnp.asarray(table), before, (settings.side,) * 2)}}


# The reference (transformers' ViTConfig, ViTMAEConfig and their models): what folders.py and pretrained.py read from a family.
MODEL_TYPES = ("vit", "vit_mae")
PREFIX = "vit."  # before the names of the body, except in a bare model

# Class -> kind of head -> name of its output.
ARCHITECTURES: dict[str, dict[str, str]] = {
    "ViTModel": {"pooled": "pooler_output"},
    "ViTForImageClassification": {"classify": "logits"},
    "ViTMAEForPreTraining": {"pixels": "logits"},
    "ViTMAEModel": {},
}
INPUTS = ("pixel_values", "interpolate_pos_encoding", "patch_keep")

# The reference's setting -> ours, and the reference's default.
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
# Settings of another head (SimMIM's), and of MAE's task, which draws `patch_keep` and makes the targets here.
UNREAD = ("encoder_stride", "mask_ratio", "norm_pix_loss")
# Our settings that the reference has with this value alone.
CONSTANTS: Config = {"class_tokens": 1, "pool": "first", "classifier_dropout": 0.0}

# Ours -> the reference's, whose body stands under PREFIX; `{layer}` runs over the stacked axis, kernels are transposed.
LAYER: dict[str, str] = {
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "layernorm_before",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "layernorm_after",
}


def weights_of(modules: Mapping[str, str]) -> dict[str, str]:
    """Returns the names of the weight and the bias of each module: norms have a scale, the others a kernel."""
    table = {}
    for ours, theirs in modules.items():
        table[f"{ours}/{'scale' if ours.endswith('norm') else 'kernel'}"] = f"{theirs}.weight"
        table[f"{ours}/bias"] = f"{theirs}.bias"
    return table


def stacked_layers(ours: str, theirs: str) -> dict[str, str]:
    """Returns the table of a stack of layers under the given names."""
    return weights_of({f"{ours}/layers/{part}": f"{theirs}.layer.{{layer}}.{their}" for part, their in LAYER.items()})


BODY: dict[str, str] = {
    "embed/class_token": "embeddings.cls_token",
    "embed/position": "embeddings.position_embeddings",
    "embed/filters": "embeddings.patch_embeddings.projection.weight",
    "embed/bias": "embeddings.patch_embeddings.projection.bias",
    **stacked_layers("encoder", "encoder"),
    **weights_of({"encoder/norm": "layernorm", "encoder/pooler": "pooler.dense"}),
}
WEIGHTS: dict[str, str] = {ours: PREFIX + theirs for ours, theirs in BODY.items()} | {
    "head/classify/kernel": "classifier.weight",
    "head/classify/bias": "classifier.bias",
    "head/pixels/mask_token": "decoder.mask_token",
    "head/pixels/position": "decoder.decoder_pos_embed",
    **weights_of(
        {
            "head/pixels/embed": "decoder.decoder_embed",
            "head/pixels/norm": "decoder.decoder_norm",
            "head/pixels/out": "decoder.decoder_pred",
        }
    ),
    **stacked_layers("head/pixels", "decoder.decoder_encoder"),
}
TIED: dict[str, str] = {}


def from_reference(config: Config) -> dict[str, Any]:
    """Returns the settings for `build` of a reference config. Raises UserError naming each setting not handled."""
    mae = config.get("model_type") == "vit_mae"
    settings = read_settings(config, {**SETTINGS, **(DECODER if mae else POOLER)})
    return settings | ({"position_init": "sinusoids"} if mae else {})


def read_settings(config: Config, table: Table) -> dict[str, Any]:
    """Returns the settings of a reference config by a table. Raises UserError naming each setting that is not handled."""
    sides = {key: square(key, config[key]) for key in ("image_size", "patch_size") if key in config}
    settings = folders.read_settings({**config, **sides}, table, {}, UNREAD)
    if "pooler_width" in settings and settings["pooler_width"] in (None, settings["width"]):
        settings["pooler_width"] = 0
    return settings | dict(CONSTANTS)


def square(key: str, value: Any) -> Any:
    """Returns the side of a size that may be given as [height, width]. Raises UserError if it is not square."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise UserError(f"config.json: {key}={value} is not handled: only squares are; use another model")
    return value[0]


def to_reference(settings: Settings, pad_id: int | None = None) -> dict[str, Any]:
    """Returns the reference config of settings. Raises UserError naming each that the reference cannot express."""
    config = folders.write_settings(settings, {**SETTINGS, **POOLER}, CONSTANTS)
    return config | {"pooler_output_size": settings.pooler_width or settings.width, "model_type": "vit"}


def to_mae(settings: Settings, pad_id: int | None = None) -> dict[str, Any]:
    """Returns the reference config of a masked autoencoder."""
    return folders.write_settings(settings, {**SETTINGS, **DECODER}, {"class_tokens": 1}) | {"model_type": "vit_mae"}


# Classes whose config is another.
CONFIGS = {"ViTMAEForPreTraining": to_mae, "ViTMAEModel": to_mae}


def reference_inputs(arrays: Mapping[str, np.ndarray], settings: Settings) -> dict[str, np.ndarray]:
    """Returns the batch of the reference's inputs: `pixel_values [B,C,H,W]` as `images [B,H,W,C]` in fp32.

    Raises UserError, naming both sides, for another number of channels, images smaller than a patch, a patch that is not
    there, and another image size where `interpolate_pos_encoding` is given as false.
    """
    if "pixel_values" not in arrays:
        return {name: array for name, array in arrays.items() if name == "patch_keep"}
    pixels = arrays["pixel_values"]
    if pixels.ndim != 4 or pixels.dtype.kind not in "fiu" or pixels.shape[1] != settings.channels or not len(pixels):
        wanted = f"[rows, {settings.channels} channels, height, width]"
        raise UserError(f"pixel_values: has shape {pixels.shape} and type {pixels.dtype}; give numbers {wanted}")
    height, width = pixels.shape[2:]
    if min(height, width) < settings.patch_size:
        raise UserError(f"pixel_values: {height} x {width} pixels are less than a patch of {settings.patch_size}; give more")
    if not np.all(arrays.get("interpolate_pos_encoding", True)) and (height, width) != (settings.image_size,) * 2:
        raise UserError(
            f"pixel_values: {height} x {width} pixels are not the {settings.image_size} x {settings.image_size} of the model; "
            "resize the images, or leave interpolate_pos_encoding out"
        )
    batch = {"images": np.ascontiguousarray(pixels.transpose(0, 2, 3, 1), np.float32)}
    if "patch_keep" in arrays:
        keep, count = arrays["patch_keep"], (height // settings.patch_size) * (width // settings.patch_size)
        if keep.ndim != 2 or len(keep) != len(pixels) or keep.min() < 0 or keep.max() >= count:
            raise UserError(f"patch_keep: give [rows, kept] numbers of patches from 0 to {count - 1}, for {len(pixels)} rows")
        batch["patch_keep"] = keep.astype(np.int32)
    return batch
