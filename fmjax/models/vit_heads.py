"""The heads of a ViT: a classifier of a token or of the patches' mean, and MAE's pixel decoder.
Dimensions as in `vit.py`."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax.distributed.sharding import shard_embedded
from fmjax.layers.attention import Context
from fmjax.layers.blocks import ModuleFactory
from fmjax.layers.dropout import Dropout
from fmjax.layers.grid import bicubic
from fmjax.layers.heads import Features, linear_head
from fmjax.layers.linear import Dense, Initializer, normal, parameter
from fmjax.layers.mask import Mask
from fmjax.layers.norm import LayerNorm
from fmjax.layers.stack import Layers, stack
from fmjax.models.vit_embed import positions, with_tokens

POOLS = ("first", "mean")


class ClassifyToken(nn.Module):
    """Dropout and a linear layer over a token's hidden state, `pool="first"`, or over the mean over
    the patches, "mean"."""

    tokens: int  # before the patches
    pool: str = "first"
    reads_pooled: ClassVar[bool] = False
    classes: int = 2
    dropout: float = 0.0
    kernel_init: Initializer = normal(0.02)

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,C] in fp32."""
        hidden = features["hidden"].astype(jnp.float32)
        if self.pool == "first":
            x = hidden[:, 0]
        elif "patch_mask" in batch:
            weights = batch["patch_mask"].astype(jnp.float32)
            total = jnp.einsum("BN,BND->BD", weights, hidden[:, self.tokens :])
            x = total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1)
        else:
            x = hidden[:, self.tokens :].mean(axis=1)
        return linear_head(self, Dropout(self.dropout)(x))


class ClassifyDistilled(nn.Module):
    """The mean of two linear layers, over the class token and over the distillation token (Touvron
    et al. 2021, section 4)."""

    reads_pooled: ClassVar[bool] = False
    classes: int = 2
    dropout: float = 0.0
    kernel_init: Initializer = normal(0.02)

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,C] in fp32."""
        hidden = features["hidden"].astype(jnp.float32)
        drop = Dropout(self.dropout)
        linear = partial(Dense, (self.classes,), ("embed", None), self.kernel_init)
        first, second = shard_embedded(drop(hidden[:, 0])), shard_embedded(drop(hidden[:, 1]))
        return (linear(name="class_token")(first) + linear(name="distillation_token")(second)) / 2


class Pixels(nn.Module):
    """MAE's decoder (He et al. 2022, section 3): the encoder's patches at their positions, a
    learned vector at the others, fixed positions, a light stack, and a projection to each patch's
    pixels."""

    width: int
    layers: Layers
    block: ModuleFactory
    tokens: int  # before the patches
    side: int  # of the square grid of the position table
    patch_size: int
    epsilon: float
    reads_pooled: ClassVar[bool] = False
    kernel_init: Initializer = normal(0.02)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns the pixels of every patch, [B,N,P*P*C] in fp32, with the channels of a pixel next
        to each other."""
        images, own = batch["images"], self.side**2
        count = (images.shape[1] // self.patch_size) * (images.shape[2] // self.patch_size)
        x = Dense((self.width,), (None, "embed"), self.kernel_init, dtype=self.dtype, name="embed")(
            features["hidden"]
        )
        first, seen = x[:, : self.tokens], x[:, self.tokens :]
        mask = parameter(
            self, "mask_token", self.kernel_init, (None, None, "embed"), (1, 1, self.width)
        )
        table = parameter(
            self,
            "position",
            positions(self.width, self.tokens),
            (None, None, "embed"),
            (1, self.tokens + own, self.width),
        )
        if "patch_keep" in batch:
            # A product, not a scatter, whose gradient is slow.
            places_BKN = jax.nn.one_hot(batch["patch_keep"], count, dtype=x.dtype)
            missing_BN1 = 1 - places_BKN.sum(axis=1)[:, :, None]
            seen = jnp.einsum("BKN,BKD->BND", places_BKN, seen) + missing_BN1 * mask.astype(x.dtype)
        if count != own:
            # Along the flattened grid, as the reference does.
            moved = jnp.matmul(
                jnp.asarray(bicubic(own, count)), table[0, self.tokens :], precision="highest"
            )
            table = jnp.concatenate([table[:, : self.tokens], moved[None]], axis=1)
        x = jnp.concatenate([first, seen], axis=1) + table.astype(x.dtype)
        real = with_tokens(batch["patch_mask"], self.tokens) if "patch_mask" in batch else None
        x, _ = stack(self, self.block, self.layers, x, Context(mask=Mask(real)))
        x = LayerNorm(self.epsilon, self.dtype, name="norm")(x)[:, self.tokens :]
        pixels = self.patch_size**2 * images.shape[-1]
        return Dense((pixels,), ("embed", None), self.kernel_init, dtype=self.dtype, name="out")(
            x
        ).astype(jnp.float32)
