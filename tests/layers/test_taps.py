"""Taps: weights and hidden states of every layer, read and perturbed, whichever way the layers
run."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import pytree
from fmjax.layers.attention import Attention, Context, CrossAttention
from fmjax.layers.blocks import PostNorm, PreNorm
from fmjax.layers.mask import Mask
from fmjax.layers.mlp import Mlp, gelu
from fmjax.layers.norm import LayerNorm
from fmjax.layers.stack import Layers, stack

KEY = jax.random.key(0)
ROWS, LENGTH, MEMORY, WIDTH, COUNT = 2, 5, 3, 8, 3
# How layers run, and how they are wired.
WAYS = [
    (False, "none", PreNorm),
    (True, "none", PostNorm),
    (False, "everything", PostNorm),
    (True, "dots", PreNorm),
]


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Tower(nn.Module):
    """Layers with self-attention and cross-attention, with and without a window in turn."""

    layers: Layers
    block: type[PostNorm | PreNorm] = PreNorm
    windows: tuple[int, ...] = (2, 0)  # of the layers in turn; 0: none

    @nn.compact
    def __call__(self, x):
        parts = {
            "attention": partial(Attention, 2, 4),
            "cross": partial(CrossAttention, 4, 2),
            "mlp": partial(Mlp, 12, gelu),
            "norm": partial(LayerNorm, 1e-5),
        }
        memory = draw(ROWS, MEMORY, WIDTH, seed=5)
        masks = [Mask(causal=True, window=window) for window in self.windows]
        contexts = [Context(mask=mask, memory=memory) for mask in masks]
        return stack(self, partial(self.block, **parts), self.layers, x, contexts)[0]


def variables() -> dict:
    shapes = jax.eval_shape(
        lambda: nn.meta.unbox(Tower(Layers(COUNT)).init(KEY, draw(ROWS, LENGTH, WIDTH)))
    )
    return pytree.map_named(lambda name, leaf: 0.4 * draw(*leaf.shape, seed=len(name)), shapes)


X = draw(ROWS, LENGTH, WIDTH, seed=1)


def run(model: nn.Module, given: dict, mutable: list[str] | bool = False):
    """Returns what the model gives for X, and the collections asked for; compiled as a whole."""
    return jax.jit(partial(model.apply, mutable=mutable))(given, X)


NAMES = {
    f"layers/{index}/{name}": shape
    for index in range(COUNT)
    for name, shape in (
        ("hidden", (ROWS, LENGTH, WIDTH)),
        ("attention/weights", (ROWS, 2, LENGTH, LENGTH)),
        ("cross/weights", (ROWS, 4, LENGTH, MEMORY)),
    )
}


@pytest.mark.parametrize(
    ("scan", "remat", "block"),
    [WAYS[0], WAYS[-1], *(pytest.param(*way, marks=pytest.mark.full) for way in WAYS[1:-1])],
)
def test_values_stand_under_the_number_of_their_layer(scan, remat, block):
    model, params = Tower(Layers(COUNT, scan, remat), block), variables()
    out, taps = jax.jit(partial(model.apply, mutable=["intermediates"]))(params, X)
    np.testing.assert_allclose(out, run(Tower(Layers(COUNT), block), params), atol=1e-5)
    found = pytree.names(taps["intermediates"])
    assert {name: leaf.shape for name, leaf in found.items()} == NAMES
    # The hidden states are those of towers of fewer layers, whose parameters are the first of the
    # stack.
    for index in range(COUNT):
        fewer = jax.tree.map(lambda leaf, count=index + 1: leaf[:count], params)
        np.testing.assert_allclose(
            found[f"layers/{index}/hidden"],
            run(Tower(Layers(index + 1), block), fewer),
            atol=1e-5,
        )
        weights = np.asarray(found[f"layers/{index}/attention/weights"])
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        seen = np.tril(np.ones((LENGTH, LENGTH), bool)) & ~np.tril(
            np.ones((LENGTH, LENGTH), bool), -2 if index % 2 == 0 else -9
        )
        assert ((weights > 0) == seen).all()


def test_weights_are_those_before_dropout():
    layer = Attention(2, 4, dropout=0.9)
    params = nn.meta.unbox(layer.init(KEY, X, Context()))
    _, calm = layer.apply(params, X, Context(), mutable=["intermediates"])
    _, taps = layer.apply(params, X, Context(), mutable=["intermediates"], rngs={"dropout": KEY})
    np.testing.assert_array_equal(
        taps["intermediates"]["weights"], calm["intermediates"]["weights"]
    )


@pytest.mark.parametrize(("scan", "remat", "block"), WAYS[-1:])
def test_gradients_with_respect_to_hidden_states_are_finite_differences(scan, remat, block):
    model, params = Tower(Layers(COUNT, scan, remat), block), variables()
    _, zeros = run(model, params, ["perturbations"])
    assert {
        name: leaf.shape for name, leaf in pytree.names(zeros["perturbations"]).items()
    } == NAMES
    assert not any(leaf.any() for leaf in jax.tree.leaves(zeros))

    def loss(perturbations):
        return jnp.sin(model.apply({**params, "perturbations": perturbations}, X)).sum()

    own = jax.jit(loss)
    gradient = pytree.names(jax.jit(jax.grad(loss))(zeros["perturbations"]))
    for name, shape in NAMES.items():
        direction = draw(*shape, seed=len(name))
        steps = [
            float(own(pytree.unnames(pytree.names(zeros["perturbations"]) | {name: size * direction})))
            for size in (1e-2, -1e-2)
        ]
        slope = (steps[0] - steps[1]) / 2e-2
        assert float(jnp.vdot(gradient[name], direction)) == pytest.approx(slope, rel=2e-2, abs=2e-2)


def test_a_gradient_is_that_of_the_layers_above():
    """Against an explicit computation: the hidden state of layer 0 is what the rest of the tower
    reads."""
    model, params = Tower(Layers(COUNT, True)), variables()
    _, taps = run(model, params, ["intermediates"])
    below = taps["intermediates"]["layers"]["0"]["hidden"]

    # Layers 1 and 2, whose windows are those of layers 1 and 2 of the tower.
    above = Tower(Layers(COUNT - 1), windows=(0, 2))
    rest = jax.tree.map(lambda leaf: leaf[1:], params)
    expected = jax.jit(jax.grad(lambda hidden: jnp.sin(above.apply(rest, hidden)).sum()))(below)
    only = {"layers": {"0": {"hidden": jnp.zeros_like(below)}}}  # some taps, and not of all layers

    def loss(perturbations):
        return jnp.sin(model.apply({**params, "perturbations": perturbations}, X)).sum()

    found = jax.jit(jax.grad(loss))(only)["layers"]["0"]["hidden"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_both_collections_at_once_and_values_hold_their_perturbation():
    model, params = Tower(Layers(COUNT, True)), variables()
    own = {
        "layers": {
            str(index): {"hidden": jnp.full((ROWS, LENGTH, WIDTH), index, jnp.float32)}
            for index in range(COUNT)
        }
    }
    given = {**params, "perturbations": own}
    out, taps = run(model, given, ["intermediates", "perturbations"])
    np.testing.assert_array_equal(taps["intermediates"]["layers"]["2"]["hidden"], out)
    np.testing.assert_array_equal(
        taps["perturbations"]["layers"]["2"]["hidden"], own["layers"]["2"]["hidden"]
    )
    np.testing.assert_allclose(out, run(Tower(Layers(COUNT)), given), atol=1e-5)
    assert np.abs(out - run(model, params)).max() > 0.5


def test_initialization_makes_parameters_alone():
    assert set(jax.eval_shape(Tower(Layers(COUNT)).init, KEY, X)) == {"params"}
