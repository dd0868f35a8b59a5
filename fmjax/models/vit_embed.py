"""The image embedding of a ViT: patches, their projection, positions, and masks. Dimensions as in
`vit.py`."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.contracts import Batch, Value
from fmjax.distributed.sharding import constrain
from fmjax.errors import UserError
from fmjax.layers.dropout import Dropout
from fmjax.layers.grid import resized, resized_each, sinusoids_2d
from fmjax.layers.linear import Initializer, normal, parameter
from fmjax.layers.mask import Mask
from fmjax.layers.taps import add_delta


def patches(images_BHWC: jax.Array, size: int) -> jax.Array:
    """Returns the square patches of images, row by row: [B,N,P,P,C]. Rows and columns that do not
    fill a patch are left out."""
    rows, height, width, channels = images_BHWC.shape
    down, across = height // size, width // size
    whole = images_BHWC[:, : down * size, : across * size]
    split = whole.reshape(rows, down, size, across, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return split.reshape(rows, down * across, size, size, channels)


def patch_mask(pixel_mask_BHW: jax.Array, size: int) -> jax.Array:
    """Returns bool [B,N]: which patches consist entirely of real pixels."""
    return patches(pixel_mask_BHW[..., None].astype(bool), size).all(axis=(2, 3, 4))


def encoder_mask(batch: Batch, tokens: int) -> Mask:
    """Returns which of the encoder's tokens and patches may be attended to."""
    if "patch_mask" not in batch:
        return Mask()
    real = batch["patch_mask"]
    real = jnp.take_along_axis(real, batch["patch_keep"], axis=1) if "patch_keep" in batch else real
    return Mask(with_tokens(real, tokens))


def with_tokens(real_BN: jax.Array, tokens: int) -> jax.Array:
    """Returns bool [B,T+N] with the tokens, all real, before the patches."""
    return jnp.pad(real_BN, ((0, 0), (tokens, 0)), constant_values=True)


def positions(width: int, before: int) -> Initializer:
    """Returns the initializer of a position table [1, before + side * side, D] of sinusoids, 0 for
    positions without a patch.

    Raises UserError if the width is not a multiple of 4.
    """
    if width % 4:
        raise UserError(
            f"sinusoids in two dimensions need a width divisible by 4, not {width}; change it"
        )

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Value = jnp.float32) -> jax.Array:
        table = jnp.asarray(sinusoids_2d(round((shape[1] - before) ** 0.5), width), dtype)
        return jnp.pad(table, ((before, 0), (0, 0)))[None]

    return init


class Embed(nn.Module):
    """Learned tokens and projected patches, plus positions; only for patches that the encoder
    reads."""

    settings: Value  # vit.Settings
    tokens: tuple[str, ...]  # names of the learned tokens before the patches

    @nn.compact
    def __call__(self, batch: Batch) -> jax.Array:
        """Returns [B,T+N,D], or [B,T+K,D]. Reads `patch_mask [B,N]` if present. Raises UserError
        for images that do not fit the patches."""
        s = self.settings
        dtype, init = jnp.dtype(s.dtype), normal(s.initializer_range)
        images = batch["images"]
        rows, height, width, channels = images.shape
        if channels != s.channels or min(height, width) < s.patch_size:
            raise UserError(
                f"the images have {height} x {width} pixels and {channels} channels, which do not "
                f"fit model.patch_size={s.patch_size} and model.channels={s.channels}; change one "
                "or the other"
            )
        before = len(self.tokens)
        shape = (s.width, channels, s.patch_size, s.patch_size)  # as the reference stores it
        # As large as the positions, which would dominate smaller patches.
        scaled = normal((channels * s.patch_size**2) ** -0.5)
        filters = parameter(self, "filters", scaled, ("embed", None, None, None), shape)
        bias = parameter(self, "bias", nn.initializers.zeros_init(), ("embed",), (s.width,))
        pixels = patches(images, s.patch_size)
        drawn = positions(s.width, before) if s.position_init == "sinusoids" else init
        table = parameter(
            self, "position", drawn, (None, None, "embed"), (1, before + s.side**2, s.width)
        )
        grid = (height // s.patch_size, width // s.patch_size)
        original, table = table, resized(table, before, grid).astype(dtype)
        learned = [
            parameter(self, name, init, (None, None, "embed"), (1, 1, s.width)).astype(dtype)
            for name in self.tokens
        ]
        place = table[:, before:]
        own = "patch_mask" in batch  # each image has its own positions
        if own:
            mask_BHW = batch["patch_mask"].reshape(rows, *grid)
            place = resized_each(original, before, mask_BHW).astype(dtype)
        if "patch_keep" in batch:
            keep = batch["patch_keep"]
            pixels = jnp.take_along_axis(pixels, keep[:, :, None, None, None], axis=1)
            place = (
                jnp.take_along_axis(place, keep[:, :, None], axis=1)
                if own
                else jnp.take(place[0], keep, axis=0)
            )
        flat = pixels.astype(dtype).reshape(-1, s.patch_size**2 * channels)
        kernel = filters.astype(dtype).transpose(2, 3, 1, 0).reshape(flat.shape[1], s.width)
        x = flat @ kernel + bias.astype(dtype)[None]
        x = constrain(x.reshape(rows, -1, s.width), "act_batch", "act_length", "act_embed") + place
        if learned:
            first = jnp.concatenate(learned, axis=1) + table[:, :before]
            x = jnp.concatenate([jnp.broadcast_to(first, (rows, *first.shape[1:])), x], axis=1)
        x = Dropout(s.dropout)(x)
        return add_delta(constrain(x, "act_batch", "act_length", "act_embed"), batch)
