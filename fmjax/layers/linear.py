"""A linear projection between axes of any number, with a named kernel.

Letters here and in the files beside it: B batch, L length, S length attended to, D width, H heads, K head width,
F mlp width, V vocabulary, N layers.
"""

from __future__ import annotations

import math
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.distributed.sharding import constrain

Initializer = nn.initializers.Initializer


def normal(stddev: float) -> Initializer:
    """Returns an initializer drawing from a normal distribution, as BERT and its descendants do."""
    return nn.initializers.normal(stddev)


def parameter(
    module: nn.Module, name: str, init: Initializer, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> jax.Array:
    """Returns a parameter of a module, made by `init` in fp32; `axes` are the logical names of its axes."""
    value: Any
    if module.has_variable("params", name):
        # Flax would trace `init` again for its shape, for every parameter of every call.
        value = nn.meta.unbox(module.get_variable("params", name))
        if value.shape != shape:
            raise flax.errors.ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    else:
        value = module.param(name, nn.with_logical_partitioning(init, axes), shape)
    # Vectors are used whole: else the sum that is their gradient would have all activations sharded as they are.
    return constrain(value, *[None] * len(shape)) if {*axes[:-1]} <= {None} and axes[-1] == "embed" else value


CACHE = 2**20  # bytes that a core has to itself, about


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x [rows, D] @ kernel [D, F], the gradient of whose kernel takes less time on a CPU than the usual one's."""
    return x @ kernel


def product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def product_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    # A CPU's product reads the columns of an x that is greater than the cache a number at a time: to turn x first, which a
    # barrier keeps XLA from undoing, costs less. Other devices' products turn it as they read.
    by_columns = x.size * x.dtype.itemsize > CACHE
    turn = {"cpu": lambda x: jax.lax.optimization_barrier(x.T)} if by_columns else {}
    return dy @ kernel.T, jax.lax.platform_dependent(x, default=jnp.transpose, **turn) @ dy


product.defvjp(product_forward, product_backward)


class Dense(nn.Module):
    """y = x @ kernel + bias, contracting the last `len(axes) - len(features)` axes of x.

    `axes` are the logical names of the kernel's axes: those contracted, then those made. The kernel keeps its full rank
    (`[D, H, K]`, so that heads can be sharded), but the product is taken in two dimensions: XLA's CPU backward pass
    of a matmul with 3-D activations is 2.4 times slower. (`nn.DenseGeneral` cannot name its axes under `jax.set_mesh`.)
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_init: Initializer = normal(0.02)
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., *contracted] to [..., *features], in `dtype`; parameters are fp32."""
        contracted = len(self.axes) - len(self.features)
        inputs = x.shape[x.ndim - contracted :]
        kernel = parameter(self, "kernel", self.kernel_init, self.axes, inputs + self.features)
        rows = x.reshape(-1, math.prod(inputs)).astype(self.dtype)
        y = product(rows, kernel.astype(self.dtype).reshape(math.prod(inputs), -1))
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros_init(), self.axes[contracted:], self.features)
            y = y + bias.astype(self.dtype).reshape(1, -1)
        return y.reshape(x.shape[: x.ndim - contracted] + self.features)


class Table(nn.Embed):
    """An embedding table that is looked up with its rows whole: else all that is looked up would first be sharded as they are."""

    axis: str | None = None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ids [...] to [..., width] in `dtype`."""
        table = constrain(self.embedding.astype(self.dtype or jnp.float32), self.axis, None)
        return jnp.take(table, inputs, axis=0)


def embedding(
    rows: int, width: int, *, axis: str | None, init: Initializer, dtype: Any, name: str | None = None
) -> nn.Embed:
    """Returns an embedding table [rows, width] whose first axis has the logical name `axis`."""
    named = nn.with_logical_partitioning(init, (axis, "embed"))
    return Table(rows, width, embedding_init=named, dtype=dtype, name=name, axis=axis)
