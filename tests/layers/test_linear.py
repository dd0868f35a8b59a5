"""What a projection multiplies: its kernel, a quantized one, and low-rank factors beside either."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import pytree
from fmjax.layers.attention import Context
from fmjax.layers.linear import Dense, Quantized, parameter, product
from fmjax.layers.stack import Layers, stack

KEY = jax.random.key(0)
# Input shape, features, axes.
SHAPES = [
    ((2, 3, 8), (5,), ("embed", "mlp")),
    ((2, 3, 8), (2, 6), ("embed", "heads", "kv")),
    ((2, 3, 2, 4), (5,), ("heads", "kv", "embed")),
]
RANK, ALPHA = 2, 16


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain(layer: Dense, x: jax.Array) -> dict:
    shapes = jax.eval_shape(lambda: nn.meta.unbox(layer.init(KEY, x)["params"]))
    return pytree.map_named(lambda name, leaf: draw(*leaf.shape, seed=len(name)), shapes)


def factors(kernel: jax.Array, features: tuple[int, ...]) -> dict:
    inputs = kernel.shape[: kernel.ndim - len(features)]
    return {
        "lora_a": draw(*inputs, RANK, seed=7),
        "lora_b": ALPHA / RANK * draw(RANK, *features, seed=8),
    }


def quantized(kernel: np.ndarray, features: tuple[int, ...], groups: int) -> Quantized:
    """Returns int8 values and the scales that make the greatest of each group 127."""
    inputs = math.prod(kernel.shape) // math.prod(features)
    grouped = np.asarray(kernel).reshape(groups, inputs // groups, *features)
    scale = np.abs(grouped).max(axis=1) / 127
    values = np.round(grouped / scale[:, None]).astype(np.int8)
    return Quantized(jnp.asarray(values.reshape(kernel.shape)), jnp.asarray(scale, jnp.float32))


@pytest.mark.parametrize(("shape", "features", "axes"), SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_rank_factors_are_added_to_the_kernel(shape, features, axes, dtype):
    x, layer = draw(*shape), Dense(features, axes, dtype=dtype)
    params = plain(layer, x)
    extra = factors(params["kernel"], features)
    merged = params | {
        "kernel": params["kernel"] + jnp.tensordot(extra["lora_a"], extra["lora_b"], 1)
    }
    found, expected = (layer.apply({"params": own}, x) for own in (params | extra, merged))
    assert found.dtype == dtype and np.abs(expected - layer.apply({"params": params}, x)).max() > 1
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(
        found, expected, atol=scale * (1e-6 if dtype == jnp.float32 else 3e-2)
    )


@pytest.mark.parametrize(("shape", "features", "axes"), SHAPES)
@pytest.mark.parametrize("groups", [1, 4])
def test_a_quantized_kernel_is_its_values_times_their_scales(shape, features, axes, groups):
    x, layer = draw(*shape), Dense(features, axes)
    params = plain(layer, x)
    packed = quantized(params["kernel"], features, groups)
    assert packed.scale.shape == (groups, *features) and packed.values.dtype == jnp.int8
    repeats = math.prod(params["kernel"].shape) // math.prod(packed.scale.shape)
    whole = (np.asarray(packed.values, np.float32).reshape(-1, *features)) * np.repeat(
        packed.scale, repeats, axis=0
    )
    np.testing.assert_array_equal(packed.kernel(), whole.reshape(params["kernel"].shape))
    found = layer.apply({"params": params | {"kernel": packed}}, x)
    np.testing.assert_allclose(
        found, layer.apply({"params": params | {"kernel": packed.kernel()}}, x), rtol=1e-6
    )
    off = np.abs(found - layer.apply({"params": params}, x)).max() / np.abs(found).max()
    assert 1e-5 < off < 2e-2


def test_factors_beside_a_quantized_kernel_and_their_gradients():
    x, layer = draw(2, 3, 8), Dense((2, 6), ("embed", "heads", "kv"))
    params = plain(layer, x)
    packed, extra = quantized(params["kernel"], (2, 6), 2), factors(params["kernel"], (2, 6))

    def found(extra):
        return jnp.sin(layer.apply({"params": params | {"kernel": packed} | extra}, x)).sum()

    def expected(extra):
        kernel = packed.kernel() + jnp.tensordot(extra["lora_a"], extra["lora_b"], 1)
        return jnp.sin(layer.apply({"params": params | {"kernel": kernel}}, x)).sum()

    for one, other in zip(
        *(jax.tree.leaves(jax.grad(loss)(extra)) for loss in (found, expected)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-3, rtol=1e-4)


class Tower(nn.Module):
    """Three projections, stacked."""

    layers: Layers

    @nn.compact
    def __call__(self, x):
        return stack(self, Step, self.layers, x, Context())[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, context, cache=None):
        return x + Dense((8,), ("embed", "mlp"), name="up")(x), cache


@pytest.mark.parametrize("scan", [False, True])
def test_stacks_of_layers_hold_them_too(scan):
    x, model = draw(2, 3, 8), Tower(Layers(3, scan))
    params = nn.meta.unbox(model.init(KEY, x)["params"])["layers"]["up"]
    each = [{name: leaf[index] for name, leaf in params.items()} for index in range(3)]
    packed = [quantized(own["kernel"], (8,), 2) for own in each]
    extra = [
        {"lora_a": draw(8, RANK, seed=index), "lora_b": draw(RANK, 8, seed=9 + index)}
        for index in range(3)
    ]
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(
            own | {"kernel": kernel} | more
            for own, kernel, more in zip(each, packed, extra, strict=True)
        ),
    )
    y = x
    for own, kernel, more in zip(each, packed, extra, strict=True):
        y = y + y @ (kernel.kernel() + more["lora_a"] @ more["lora_b"]) + own["bias"][None, None]
    found = model.apply({"params": {"layers": {"up": stacked}}}, x)
    np.testing.assert_allclose(found, y, atol=1e-5 * float(np.abs(y).max()))


class Before(nn.Module):
    """A projection that knows of its kernel and bias alone."""

    @nn.compact
    def __call__(self, x):
        kernel = parameter(
            self, "kernel", nn.initializers.ones_init(), ("embed", "heads", "kv"), (8, 2, 6)
        )
        y = product(x, kernel)
        y = y + parameter(
            self, "bias", nn.initializers.zeros_init(), ("heads", "kv"), (2, 6)
        ).reshape(1, -1)
        return y.reshape(2, 3, 2, 6)


def test_without_them_nothing_changes():
    x, layer = draw(2, 3, 8), Dense((2, 6), ("embed", "heads", "kv"))
    params = {"params": plain(layer, x)}

    def text(module):
        def loss(params):
            return module.apply(params, x).sum()

        return jax.jit(jax.grad(loss)).lower(params).as_text()

    assert text(layer) == text(Before())
    assert "i8" not in text(layer)
    assert set(layer.init(KEY, x)["params"]) == {"kernel", "bias"}
