"""The position-wise feed-forward layer (Vaswani et al. 2017, section 3.3), and its activations by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.errors import UserError, nearest
from fmjax.layers.linear import Dense, Initializer, normal
from fmjax.sharding import constrain


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU (Hendrycks and Gimpel 2016), x times the normal distribution function, as torch computes it.

    jax.nn.gelu(approximate=False) goes through erfc instead, which is the slower function on a CPU.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


# Hugging Face's names. Its "gelu" is the exact one; jax.nn.gelu alone would be the tanh approximation.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the activation of that name. Raises UserError listing those there are."""
    if name not in ACTIVATIONS:
        raise UserError(
            f'activation "{name}" is not known{nearest(name, ACTIVATIONS)}; choose one of {", ".join(ACTIVATIONS)}'
        )
    return ACTIVATIONS[name]


class Mlp(nn.Module):
    """down(activation(up(x)))."""

    width: int
    activation: Callable[[jax.Array], jax.Array]
    kernel_init: Initializer = normal(0.02)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Maps [B,L,D] to [B,L,D] through width F."""
        up = Dense((self.width,), ("embed", "mlp"), self.kernel_init, dtype=self.dtype, name="up")
        down = Dense((x_BLD.shape[-1],), ("mlp", "embed"), self.kernel_init, dtype=self.dtype, name="down")
        return down(constrain(self.activation(up(x_BLD)), "act_batch", "act_length", "act_mlp"))
