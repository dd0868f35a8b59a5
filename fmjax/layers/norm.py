"""Normalization layers, computed in fp32 for every compute type."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax.layers.linear import parameter
from fmjax.layers.recompute import recomputed


class LayerNorm(nn.Module):
    """Layer normalization over the last axis (Ba et al. 2016).

    The variance is the mean squared deviation: E[x^2] - E[x]^2, Flax's default, loses precision if
    the mean is large.
    """

    epsilon: float = 1e-12
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D] in `dtype`."""
        shape = (x.shape[-1],)
        scale = parameter(self, "scale", nn.initializers.ones_init(), ("embed",), shape)
        bias = parameter(self, "bias", nn.initializers.zeros_init(), ("embed",), shape)
        broadcast = (1,) * (x.ndim - 1) + shape

        def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32)
            centered = x - x.mean(axis=-1, keepdims=True)
            variance = jnp.square(centered).mean(axis=-1, keepdims=True)
            y = centered * (
                jax.lax.rsqrt(variance + self.epsilon) * scale.reshape(broadcast)
            ) + bias.reshape(broadcast)
            return y.astype(self.dtype)

        return recomputed(norm)(x, scale, bias)


class RmsNorm(nn.Module):
    """Division by the root of the mean square of the last axis, and a scale (Zhang and Sennrich
    2019, arXiv:1910.07467)."""

    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D] in `dtype`."""
        shape = (x.shape[-1],)
        scale = parameter(self, "scale", nn.initializers.ones_init(), ("embed",), shape)

        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32)
            x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
            return (x * scale.reshape((1,) * (x.ndim - 1) + shape)).astype(self.dtype)

        return recomputed(norm)(x, scale)
