"""How a ViT takes in images: patches, their projection, and positions. Letters as in `vit.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.distributed.sharding import constrain
from fmjax.errors import UserError
from fmjax.layers.grid import resized, sinusoids_2d
from fmjax.layers.linear import Initializer, normal, parameter


def patches(images_BHWC: jax.Array, size: int) -> jax.Array:
    """Returns the square patches of images, row by row: [B,N,P,P,C]. Rows and columns that fill no patch are left out."""
    rows, height, width, channels = images_BHWC.shape
    down, across = height // size, width // size
    whole = images_BHWC[:, : down * size, : across * size]
    split = whole.reshape(rows, down, size, across, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return split.reshape(rows, down * across, size, size, channels)


def positions(width: int, before: int) -> Initializer:
    """Returns the initializer of a position table [1, before + side * side, D] of sinusoids, 0 where there is no patch.

    Raises UserError if the width is not a multiple of 4.
    """
    if width % 4:
        raise UserError(f"sinusoids in two dimensions need a width that is a multiple of 4, not {width}; change it")

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        table = jnp.asarray(sinusoids_2d(round((shape[1] - before) ** 0.5), width), dtype)
        return jnp.pad(table, ((before, 0), (0, 0)))[None]

    return init


class Embed(nn.Module):
    """Patches projected to the width, behind learnt tokens, plus positions; of the patches, those that are seen."""

    settings: Any  # vit.Settings
    tokens: tuple[str, ...]  # names of the learnt tokens before the patches

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns [B,T+N,D], or [B,T+K,D]. Raises UserError for images that the patches do not fit."""
        s = self.settings
        dtype, init = jnp.dtype(s.dtype), normal(s.initializer_range)
        images = batch["images"]
        rows, height, width, channels = images.shape
        if channels != s.channels or min(height, width) < s.patch_size:
            raise UserError(
                f"the images are of {height} x {width} pixels and {channels} channels, which model.patch_size={s.patch_size} and "
                f"model.channels={s.channels} do not fit; change the one or the other"
            )
        before = len(self.tokens)
        shape = (s.width, channels, s.patch_size, s.patch_size)  # as the reference stores it
        # Of the size of the positions, which would drown a smaller patch.
        scaled = normal((channels * s.patch_size**2) ** -0.5)
        filters = parameter(self, "filters", scaled, ("embed", None, None, None), shape)
        bias = parameter(self, "bias", nn.initializers.zeros_init(), ("embed",), (s.width,))
        pixels = patches(images, s.patch_size)
        drawn = positions(s.width, before) if s.position_init == "sinusoids" else init
        table = parameter(self, "position", drawn, (None, None, "embed"), (1, before + s.side**2, s.width))
        table = resized(table, before, (height // s.patch_size, width // s.patch_size)).astype(dtype)
        learnt = [parameter(self, name, init, (None, None, "embed"), (1, 1, s.width)).astype(dtype) for name in self.tokens]
        place = table[:, before:]
        if "patch_keep" in batch:
            keep = batch["patch_keep"]
            pixels = jnp.take_along_axis(pixels, keep[:, :, None, None, None], axis=1)
            place = jnp.take(place[0], keep, axis=0)
        flat = pixels.astype(dtype).reshape(-1, s.patch_size**2 * channels)
        x = flat @ filters.astype(dtype).transpose(2, 3, 1, 0).reshape(flat.shape[1], s.width) + bias.astype(dtype)[None]
        x = constrain(x.reshape(rows, -1, s.width), "act_batch", "act_length", "act_embed") + place
        if learnt:
            first = jnp.concatenate(learnt, axis=1) + table[:, :before]
            x = jnp.concatenate([jnp.broadcast_to(first, (rows, *first.shape[1:])), x], axis=1)
        x = nn.Dropout(s.dropout, deterministic=not self.has_rng("dropout"))(x)
        return constrain(x, "act_batch", "act_length", "act_embed")
