"""A linear projection between any number of axes, with a named kernel.

Letters in this folder: B batch, L length, S length attended to, D width, H heads, K head width, F
mlp width, V vocabulary, N layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax.distributed.sharding import constrain

Initializer = nn.initializers.Initializer


def normal(stddev: float) -> Initializer:
    """Returns an initializer that draws from a normal distribution, as BERT and its descendants
    do."""
    return nn.initializers.normal(stddev)


def parameter(
    module: nn.Module,
    name: str,
    init: Initializer,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
) -> jax.Array:
    """Returns a parameter of a module, initialized by `init` in fp32; `axes` are the logical names
    of its axes."""
    value: Any
    if module.has_variable("params", name):
        # Flax would trace `init` again for its shape, for every parameter in every call.
        value = nn.meta.unbox(module.get_variable("params", name))
        if value.shape != shape:
            raise flax.errors.ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    else:
        value = module.param(name, nn.with_logical_partitioning(init, axes), shape)
    # Vectors are used unsharded; otherwise their gradient, a sum, would impose their sharding on
    # all activations.
    whole = {*axes[:-1]} <= {None} and axes[-1] == "embed"
    return constrain(value, *[None] * len(shape)) if whole else value


barrier: Callable[[jax.Array], jax.Array] = jax.lax.optimization_barrier  # which JAX does not type
CACHE = 2**20  # approximate cache per core, in bytes


def flat(x: jax.Array, kernel: jax.Array, axes: int) -> tuple[jax.Array, jax.Array]:
    """Returns x as [rows, D] and the kernel as [D, F] in the dtype of x; D has `axes` axes."""
    size = math.prod(kernel.shape[:axes])
    return x.reshape(-1, size), kernel.astype(x.dtype).reshape(size, -1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
    """Returns x [..., *inputs] @ kernel [*inputs, *features], [rows, F] in the dtype of x; `axes`
    is the number of inputs.

    The arguments are stored for the backward pass as they are, so that layers share what they read
    and parameters are not stored again. On a CPU, the kernel's gradient is faster than the usual
    one.
    """
    rows, matrix = flat(x, kernel, axes)
    return rows @ matrix


def product_forward(
    x: jax.Array, kernel: jax.Array, axes: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rows, matrix = flat(x, kernel, axes)  # a product that a policy of rematerialization can see
    return rows @ matrix, (x, kernel)


def product_backward(
    axes: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rows, matrix = flat(x, kernel, axes)
    # A CPU reads the columns of an x larger than its cache one number at a time. Transposing x
    # first is faster; a barrier keeps XLA from undoing that. Other devices transpose while reading.
    by_columns = x.size * x.dtype.itemsize > CACHE
    transpose = {"cpu": lambda x: barrier(x.T)} if by_columns else {}
    d_matrix = jax.lax.platform_dependent(rows, default=jnp.transpose, **transpose) @ dy
    dx, d_kernel = (dy @ matrix.T).reshape(x.shape), d_matrix.reshape(kernel.shape)
    return dx, d_kernel.astype(kernel.dtype)


product.defvjp(product_forward, product_backward)


@flax.struct.dataclass
class Quantized:
    """A kernel as integers: `kernel[i, o] = values[i, o] * scale[group of i, o]`.

    The flattened inputs are divided into groups of equal size; a single group means one scale per
    output.
    """

    values: jax.Array  # int8 or int4, of the kernel's shape [*inputs, *features]
    scale: jax.Array  # fp32 [groups, *features]

    def kernel(self) -> jax.Array:
        """Returns the kernel in fp32 [*inputs, *features]."""
        groups, *features = self.scale.shape
        values = self.values.reshape(groups, -1, math.prod(features)).astype(jnp.float32)
        return (values * self.scale.reshape(groups, 1, -1)).reshape(self.values.shape)


class Dense(nn.Module):
    """y = x @ kernel + bias, contracting the last `len(axes) - len(features)` axes of x.

    `axes` are the logical names of the kernel's axes: first the contracted ones, then the new ones.
    The kernel keeps its full rank (`[D, H, K]`, so that heads can be sharded), but the product is
    two-dimensional: XLA's CPU backward pass of a matmul with 3-D activations is 2.4 times slower.
    (`nn.DenseGeneral` cannot name its axes under `jax.set_mesh`.)

    Parameters may have more than the module creates: a `Quantized` value in place of the kernel,
    and beside it the factors `lora_a [*inputs, r]` and `lora_b [r, *features]` of a low-rank update
    (Hu et al. 2021, arXiv:2106.09685). Then y = x @ kernel + (x @ lora_a) @ lora_b + bias; the code
    that adds the factors must multiply lora_b by alpha / r.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_init: Initializer = normal(0.02)
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., *contracted] to [..., *features], in `dtype`; parameters are fp32."""
        contracted = len(self.axes) - len(self.features)
        inputs = x.shape[x.ndim - contracted :]
        stored: Any = self.get_variable("params", "kernel")
        if isinstance(stored, Quantized):
            kernel = stored.kernel()
        else:
            kernel = parameter(self, "kernel", self.kernel_init, self.axes, inputs + self.features)
        x = x.astype(self.dtype)
        y = product(x, kernel, contracted)
        if self.has_variable("params", "lora_a"):
            a, b = (
                jnp.asarray(self.get_variable("params", name), self.dtype)
                for name in ("lora_a", "lora_b")
            )
            y = y + product(product(x, a, contracted), b)
        if self.use_bias:
            bias = parameter(
                self, "bias", nn.initializers.zeros_init(), self.axes[contracted:], self.features
            )
            y = y + bias.astype(self.dtype).reshape(1, -1)
        return y.reshape(x.shape[: x.ndim - contracted] + self.features)


class Table(nn.Embed):
    """An embedding table that is gathered before the lookup; otherwise the result would inherit its
    sharding. For the one id per row of a decoding step, the few vectors found are gathered instead.
    """

    axis: str | None = None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ids [...] to [..., width] in `dtype`."""
        table = self.embedding.astype(self.dtype or jnp.float32)
        if inputs.shape[-1] != 1:
            table = constrain(table, self.axis, None)
        return jnp.take(table, inputs, axis=0)


def embedding(
    rows: int,
    width: int,
    *,
    axis: str | None,
    init: Initializer,
    dtype: DTypeLike,
    name: str | None = None,
) -> nn.Embed:
    """Returns an embedding table [rows, width] whose first axis has the logical name `axis`."""
    named = nn.with_logical_partitioning(init, (axis, "embed"))
    return Table(rows, width, embedding_init=named, dtype=dtype, name=name, axis=axis)
