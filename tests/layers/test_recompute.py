"""Norms, activations and dropout: on devices the backward pass computes them again, with the same results."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.layers.attention import Attention, Context
from fmjax.layers.blocks import PostNorm, PreNorm
from fmjax.layers.dropout import Dropout
from fmjax.layers.kernels.call import lowered_for
from fmjax.layers.mlp import GatedMlp, Mlp, activation
from fmjax.layers.norm import LayerNorm, RmsNorm
from fmjax.randomness import dropout_key

ROWS, LENGTH, WIDTH = 2, 16, 8
UNIT = ROWS * LENGTH * WIDTH * 4  # bytes of x
BLOCKS = {
    "bert": (PostNorm, Mlp, LayerNorm, "gelu"),
    "gpt": (PreNorm, Mlp, LayerNorm, "gelu_new"),
    "llama": (PreNorm, GatedMlp, RmsNorm, "silu"),
}


def block(name: str) -> nn.Module:
    wiring, mlp, norm, function = BLOCKS[name]
    return wiring(
        partial(Attention, heads=2, head_width=WIDTH // 2, dropout=0.2),
        partial(mlp, width=4 * WIDTH, activation=activation(function), dropout=0.2),
        norm,
        dropout=0.2,
    )


def loss_and_inputs(name: str, generator: str):
    made = block(name)
    x = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, WIDTH))
    params = nn.meta.unbox(jax.jit(lambda: made.init(jax.random.key(0), x, Context()))()["params"])
    leaves, structure = jax.tree.flatten(params)
    draws = [jax.random.normal(jax.random.key(i), leaf.shape) * 0.3 for i, leaf in enumerate(leaves)]
    key = dropout_key(3, generator)

    def loss(params, x):
        out, _ = made.apply({"params": params}, x, Context(), rngs={"dropout": key})
        return jnp.sin(out).sum()

    return loss, (jax.tree.unflatten(structure, draws), x)


@pytest.mark.parametrize(("name", "generator"), [("bert", "hash"), ("gpt", "threefry2x32"), ("llama", "rbg")])
def test_gradients_are_those_of_what_is_stored(name, generator):
    loss, inputs = loss_and_inputs(name, generator)
    plain = jax.jit(jax.grad(loss, argnums=(0, 1)))(*inputs)

    def on_device(*given):
        with lowered_for("tpu"):
            return jax.grad(loss, argnums=(0, 1))(*given)

    again = jax.jit(on_device)(*inputs)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * max(1, np.abs(theirs).max()))


def stored(name: str, generator: str, platform: str) -> float:
    """The size of what the backward pass reads apart from its arguments, in sizes of x."""
    loss, inputs = loss_and_inputs(name, generator)
    with lowered_for(platform):
        jaxpr = jax.make_jaxpr(lambda *given: jax.tree.leaves(jax.vjp(loss, *given)[1]))(*inputs).jaxpr
    kept = {var for var in jaxpr.outvars if var not in jaxpr.invars and var.aval.shape}
    return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in kept) / UNIT


@pytest.mark.parametrize("name", BLOCKS)
def test_layers_store_arguments_of_products_alone(name):
    whole, few, fewer = (
        stored(name, *how) for how in (("hash", "cpu"), ("threefry2x32", "tpu"), ("hash", "tpu"))
    )
    # x, its norm, queries, keys, values, what attention returns, the MLP's input and its hidden
    # arrays; a norm's output is x itself where it comes last. Scores and weights, [B,H,L,S], have
    # four times the size of x each; 1 is for shifts and scales.
    hidden = {"bert": 6 + 8, "gpt": 8 + 8, "llama": 8 + 12}[name]
    assert fewer < few < whole
    assert hidden <= fewer < hidden + 5 * 4 + 1
    masks = 3 * 4 / 4 + 2 / 4  # booleans: weights and the MLP's hidden array, two of x
    assert few == pytest.approx(fewer + masks, abs=1)


@pytest.mark.parametrize("generator", ["threefry2x32", "hash"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_draws_are_those_of_flax(generator, platform):
    x, rngs = jax.random.normal(jax.random.key(0), (5, 7)), {"dropout": dropout_key(1, generator)}
    with lowered_for(platform):
        found = Dropout(0.3).apply({}, x, rngs=rngs)
    np.testing.assert_array_equal(found, nn.Dropout(0.3, deterministic=False).apply({}, x, rngs=rngs))
    assert Dropout(0.3).apply({}, x) is x and Dropout(0.0).apply({}, x, rngs=rngs) is x
