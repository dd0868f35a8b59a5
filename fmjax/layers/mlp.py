"""The position-wise feed-forward layer (Vaswani et al. 2017, section 3.3), and activations by
name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax.distributed.sharding import constrain
from fmjax.errors import UserError, nearest
from fmjax.layers.dropout import Dropout
from fmjax.layers.linear import Dense, Initializer, normal
from fmjax.layers.recompute import recomputed


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU (Hendrycks and Gimpel 2016), x times the normal distribution function,
    computed as in torch.

    jax.nn.gelu(approximate=False) uses erfc instead, which is slower on a CPU.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


# Hugging Face's names. Its "gelu" is the exact one; the default of jax.nn.gelu is the tanh
# approximation.
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
    """Returns the activation of that name. Raises UserError, listing the known names."""
    if name not in ACTIVATIONS:
        hint, known = nearest(name, ACTIVATIONS), ", ".join(ACTIVATIONS)
        raise UserError(f'activation "{name}" is not known{hint}; choose one of {known}')
    return ACTIVATIONS[name]


class Mlp(nn.Module):
    """down(dropout(activation(up(x))))."""

    width: int
    activation: Callable[[jax.Array], jax.Array]
    kernel_init: Initializer = normal(0.02)
    dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    down_init: Initializer | None = None  # None: kernel_init
    dropout: float = 0.0  # dropout of the activation's output

    def part(self, features: int, name: str) -> Dense:
        """Returns the projection named `name`."""
        axes = ("mlp", "embed") if name == "down" else ("embed", "mlp")
        init = self.down_init if name == "down" and self.down_init else self.kernel_init
        return Dense((features,), axes, init, self.use_bias, self.dtype, name=name)

    def hidden(self, x_BLD: jax.Array) -> jax.Array:
        """Returns [B,L,F]."""
        return recomputed(self.activation)(self.part(self.width, "up")(x_BLD))

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Maps [B,L,D] to [B,L,D] through width F."""
        hidden = constrain(self.hidden(x_BLD), "act_batch", "act_length", "act_mlp")
        hidden = Dropout(self.dropout)(hidden)
        return self.part(x_BLD.shape[-1], "down")(hidden)


class GatedMlp(Mlp):
    """down(dropout(activation(gate(x)) * up(x))) (Shazeer 2020, arXiv:2002.05202): SwiGLU with
    silu, GEGLU with gelu."""

    def gated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Returns the product of the activated gate and the other projection."""
        return self.activation(gate) * up

    def hidden(self, x_BLD: jax.Array) -> jax.Array:
        """Returns [B,L,F]."""
        gate, up = (self.part(self.width, name)(x_BLD) for name in ("gate", "up"))
        return recomputed(self.gated)(gate, up)
