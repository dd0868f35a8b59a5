"""ViT (Dosovitskiy et al. 2021, arXiv:2010.11929) and its masked autoencoder (MAE, He et al. 2022,
arXiv:2111.06377), following Hugging Face's `modeling_vit.py` and `modeling_vit_mae.py`. DeiT is
this encoder with one more token: `deit.py`.

Dimensions: B batch, H and W height and width, C channels, P patch size, N patches, T tokens before
the patches, K patches that the encoder reads, L all tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmjax import contracts
from fmjax.contracts import Arrays, Batch, Config, HostBatch, PyTree, Value
from fmjax.distributed.sharding import shard_embedded
from fmjax.errors import UserError, nearest
from fmjax.layers.attention import ALL, Attention, Context
from fmjax.layers.blocks import ModuleFactory, PreNorm
from fmjax.layers.grid import resized
from fmjax.layers.heads import Heads, HeadTable, Pooled, chosen, pooled_is_read
from fmjax.layers.linear import Dense, normal
from fmjax.layers.mask import Mask
from fmjax.layers.mlp import Mlp, activation
from fmjax.layers.norm import LayerNorm
from fmjax.layers.stack import stack
from fmjax.models.sizes import Compute, check_divides, checked, resolve
from fmjax.models.vit_embed import Embed, encoder_mask, patch_mask
from fmjax.models.vit_heads import POOLS, ClassifyToken, Pixels

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
    """The settings of a ViT; `model` in a config."""

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
    position_init: str = "normal"  # or "sinusoids", to be frozen, as in MAE
    activation: str = "gelu"
    epsilon: float = 1e-12
    initializer_range: float = 0.02
    dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.0
    pooler_width: int = 0  # 0: same as the layers
    pooler_activation: str = "tanh"
    decoder_width: int = 512  # of MAE's decoder, like the three below
    decoder_layers: int = 8
    decoder_heads: int = 16
    decoder_mlp_width: int = 2048

    @property
    def side(self) -> int:
        """The number of patches along a side of an image."""
        return self.image_size // self.patch_size


def layer(
    settings: Settings, width: int, heads: int, mlp_width: int, stochastic_depth: float = 0.0
) -> ModuleFactory:
    """Returns a factory for a layer with the given sizes; the rest follows the settings."""
    s = settings
    shared: Config = {
        "kernel_init": normal(s.initializer_range),
        "dtype": jnp.dtype(s.dtype),
    }
    biased = ALL if s.qkv_bias else ("out",)
    return partial(
        PreNorm,
        attention=partial(
            Attention, heads, width // heads, s.attention_dropout, biased=biased, **shared
        ),
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
    def __call__(self, x_BLD: jax.Array, mask: Mask) -> Arrays:
        """Returns the features `hidden [B,L,D]` and, if pooled, `pooled [B,D]`."""
        s = self.settings
        dtype = jnp.dtype(s.dtype)
        block = layer(s, s.width, s.attention_heads, s.mlp_width, s.stochastic_depth)
        hidden, _ = stack(self, block, s.stacked(s.layers), x_BLD, Context(mask=mask))
        hidden = LayerNorm(s.epsilon, dtype, name="norm")(hidden)
        if not self.pool:
            return {"hidden": hidden}
        pooled_width = (s.pooler_width or s.width,)
        pooler = Dense(
            pooled_width, ("embed", None), normal(s.initializer_range), dtype=dtype, name="pooler"
        )
        pooled = pooler(shard_embedded(hidden[:, 0]))
        return {"hidden": hidden, "pooled": activation(s.pooler_activation)(pooled)}


def heads_of(settings: Settings, tokens: int) -> HeadTable:
    """Returns a factory for each kind of head of an encoder with `tokens` tokens before the
    patches."""
    s = settings
    init, dtype = normal(s.initializer_range), jnp.dtype(s.dtype)
    block = layer(s, s.decoder_width, s.decoder_heads, s.decoder_mlp_width)
    sizes = (
        s.decoder_width,
        s.stacked(s.decoder_layers),
        block,
        tokens,
        s.side,
        s.patch_size,
        s.epsilon,
    )
    return {
        "pooled": Pooled,
        "classify": partial(
            ClassifyToken, tokens, s.pool, dropout=s.classifier_dropout, kernel_init=init
        ),
        "pixels": partial(Pixels, *sizes, kernel_init=init, dtype=dtype),
    }


class Vit(nn.Module):
    """Maps a batch to features: `hidden [B,L,D]`, `pooled [B,D]` if a head reads it, and each
    head's output by kind.

    Inputs: `images [B,H,W,C]`, of any size: if the grid of patches is not that of `image_size`,
    positions are interpolated. With `patch_keep [B,K]` the encoder reads only those patches,
    numbered row by row. With `pixel_mask [B,H,W]` (1 is real) each image is the top left part of
    its canvas: patches that are not entirely real are masked, and positions are interpolated for
    the image's own grid, so the result is that of the image alone. `embedded_delta [B,L,D]` is
    optional.
    """

    heads: contracts.Heads
    settings: Settings
    tokens: tuple[str, ...] = ("class_token",)  # names of the learned tokens before the patches
    table: Callable[[Settings, int], HeadTable] = heads_of

    def head_makers(self) -> HeadTable:
        """Returns a factory for each kind of head that the family has."""
        return self.table(self.settings, len(self.tokens))

    @nn.compact
    def __call__(self, batch: Batch) -> Arrays:
        kinds = chosen(self.head_makers(), self.heads)
        if "pixel_mask" in batch:
            batch = {
                **batch,
                "patch_mask": patch_mask(batch["pixel_mask"], self.settings.patch_size),
            }
        x = Embed(self.settings, self.tokens, name="embed")(batch)
        mask = encoder_mask(batch, len(self.tokens))
        features = Encoder(self.settings, pooled_is_read(kinds), name="encoder")(x, mask)
        return features | Heads(kinds, name="head")(features, batch)

    def one_row_batch(self) -> Batch:
        """Returns a batch of one image, of one patch."""
        s = self.settings
        return {"images": jnp.zeros((1, s.patch_size, s.patch_size, s.channels))}

    def forward_flops(self, batch: Mapping[str, Value]) -> float:
        """Returns the floating-point operations of one forward pass over a batch: those of its
        matrix products, by formula."""
        s = self.settings
        rows, height, width, channels = batch["images"].shape
        count = (height // s.patch_size) * (width // s.patch_size)
        kept = batch["patch_keep"].shape[1] if "patch_keep" in batch else count
        pixels = s.patch_size**2 * channels

        def layers(number: int, wide: int, mlp: int, length: int) -> int:
            return number * length * (4 * wide * wide + 2 * wide * mlp + 2 * wide * length)

        total = count * pixels * s.width + layers(
            s.layers, s.width, s.mlp_width, kept + len(self.tokens)
        )
        if "pixels" in self.heads:
            total += layers(
                s.decoder_layers, s.decoder_width, s.decoder_mlp_width, count + len(self.tokens)
            )
            total += s.decoder_width * (kept * s.width + count * pixels)
        return float(2 * rows * total)


def build(*, heads: contracts.Heads, size: str = "base", **settings: Value) -> Vit:
    """Returns a ViT of a named size (SIZES) with the given heads; other settings are the fields of
    Settings.

    Raises UserError for an unknown size, setting or head, and for sizes that do not fit together.
    """
    resolved = resolve(Settings, SIZES, size, settings)
    return checked_model(Vit(heads, resolved, ("class_token",) * resolved.class_tokens))


def checked_model(model: Vit) -> Vit:
    """Returns the model, checked. Raises UserError if an image is smaller than a patch, a choice is
    unknown, or sizes conflict, and like `sizes.checked`."""
    s = model.settings
    check_divides("width", s.width, "attention_heads", s.attention_heads)
    checked(model)
    if not 1 <= s.patch_size <= s.image_size:
        raise UserError(
            f"model.image_size={s.image_size} holds no patch of model.patch_size={s.patch_size}; "
            "change one of them"
        )
    for name, value, choices in (
        ("pool", s.pool, POOLS),
        ("position_init", s.position_init, POSITION_INITS),
    ):
        if value not in choices:
            raise UserError(
                f'model.{name}="{value}"{nearest(value, choices)}: '
                f"choose one of {', '.join(choices)}"
            )
    if s.class_tokens not in (0, 1) or (
        not s.class_tokens and (s.pool == "first" or "pooled" in model.heads)
    ):
        raise UserError(
            f"model.class_tokens={s.class_tokens}: must be 1, or 0 with model.pool=mean, which "
            "reads none; change one of them"
        )
    if "pixels" in model.heads:
        check_divides("decoder_width", s.decoder_width, "decoder_heads", s.decoder_heads)
    return model


def fit_params(params: PyTree, settings: Settings) -> PyTree:
    """Returns parameters with positions interpolated to the image size of the settings."""
    table = params["embed"]["position"]
    before = settings.class_tokens + ("distillation_token" in params["embed"])
    return params | {
        "embed": params["embed"]
        | {"position": resized(jnp.asarray(table), before, (settings.side,) * 2)}
    }


INPUTS = ("images", "patch_keep")


def checked_batch(arrays: HostBatch, settings: Settings) -> dict[str, np.ndarray]:
    """Returns the batch of the inputs: `images [B,H,W,C]` in fp32, `patch_keep [B,K]` in int32.

    Raises UserError for images with another number of channels or smaller than a patch, and for
    patch indices out of range.
    """
    if "images" not in arrays:
        return dict(arrays)
    images = arrays["images"]
    shape, size, channels = images.shape, settings.patch_size, settings.channels
    if len(shape) != 4 or not len(images) or shape[3] != channels or min(shape[1:3]) < size:
        wanted = f"[rows, height, width, {channels} channels], of at least {size} x {size} pixels"
        raise UserError(f"images: has shape {shape}; pass {wanted}")
    batch = {"images": np.asarray(images, np.float32)}
    if "patch_keep" in arrays:
        keep, count = arrays["patch_keep"], (shape[1] // size) * (shape[2] // size)
        if keep.ndim != 2 or len(keep) != len(images) or keep.min() < 0 or keep.max() >= count:
            raise UserError(
                f"patch_keep: pass patch indices [rows, kept] from 0 to {count - 1}, "
                f"for {len(images)} rows"
            )
        batch["patch_keep"] = keep.astype(np.int32)
    return batch
