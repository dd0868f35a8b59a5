"""Adafactor, Lion and Muon: optax's on plain matrices, and on stacked kernels what they are layer by layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec as P

from fmjax import optim, pytree
from fmjax.distributed import sharding
from fmjax.optim import algorithms
from fmjax.train.state import abstract_state

LAYERS, WIDTH, HEADS, HEAD = 3, 8, 2, 5
SHAPES = {
    "embed/word/embedding": (9, WIDTH),
    "encoder/layers/attention/query/kernel": (LAYERS, WIDTH, HEADS, HEAD),
    "encoder/layers/attention/out/kernel": (LAYERS, HEADS, HEAD, WIDTH),
    "encoder/layers/attention/query/bias": (LAYERS, HEADS, HEAD),
    "encoder/layers/mlp/up/kernel": (LAYERS, WIDTH, 6),
    "encoder/layers/norm/scale": (LAYERS, WIDTH),
    "head/classify/kernel": (WIDTH, 4),
    "head/classify/bias": (4,),
}
SMALL = {"name": "adafactor", "min_dim_size_to_factor": 4}


def draw(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Any:
    rng = np.random.default_rng(seed)
    return pytree.unnames({name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in sorted(shapes.items())})


def directions(stage: optax.GradientTransformation, params: Any, steps: int = 3) -> list[dict[str, np.ndarray]]:
    """Returns what a stage makes of some gradients, one after the other."""
    state, update, found = stage.init(params), jax.jit(stage.update), []
    shapes = {name: leaf.shape for name, leaf in pytree.names(params).items()}
    for seed in range(1, steps + 1):
        direction, state = update(draw(seed, shapes), state, params)
        found.append({name: np.asarray(leaf) for name, leaf in pytree.names(direction).items()})
    return found


def test_matrices_are_known_by_name():
    leaves = pytree.names(draw(0))
    found = {name: algorithms.matrix(name, leaf) for name, leaf in leaves.items()}
    assert found == {
        "embed/word/embedding": ((0,), (1,)),
        "encoder/layers/attention/query/kernel": ((1,), (2, 3)),
        "encoder/layers/attention/out/kernel": ((1, 2), (3,)),
        "encoder/layers/attention/query/bias": None,
        "encoder/layers/mlp/up/kernel": ((1,), (2,)),
        "encoder/layers/norm/scale": None,
        "head/classify/kernel": ((0,), (1,)),
        "head/classify/bias": None,
    }


@pytest.mark.parametrize("scaled", [True, False])
def test_adafactor_is_that_of_optax_on_plain_parameters(scaled):
    params = {"kernel": draw(0)["embed"]["word"]["embedding"], "bias": jnp.arange(5.0) / 9, "small/kernel": jnp.ones((3, 7))}
    params = pytree.unnames(params)
    settings = {"min_dim_size_to_factor": 4, "decay_rate": 0.7, "clipping_threshold": 0.9, "multiply_by_parameter_scale": scaled}
    theirs = optax.adafactor(1.0, **settings)
    ours = directions(algorithms.adafactor(params, **settings), params)
    for one, other in zip(ours, directions(theirs, params), strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], -other[name], rtol=2e-5, err_msg=name)


def alone(layer: int) -> dict[str, Any]:
    """Returns the stacked parameters of one layer as matrices of no stack."""
    flat = {name: leaf[layer] for name, leaf in pytree.names(draw(0)).items() if name.startswith("encoder/")}
    return pytree.unnames({name.removeprefix("encoder/layers/"): as_matrix(name, leaf) for name, leaf in flat.items()})


def as_matrix(name: str, leaf: Any) -> Any:
    if "kernel" not in name:
        return leaf
    return leaf.reshape((-1, leaf.shape[-1]) if "/out/" in name else (leaf.shape[0], -1))


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_stacked_layers_are_what_each_is_alone(name):
    settings = {"min_dim_size_to_factor": 4} if name == "adafactor" else {}
    stage = algorithms.ALGORITHMS[name](draw(0), **settings)
    stacked = directions(stage, draw(0), steps=1)[0]
    for layer in range(LAYERS):
        params = alone(layer)
        gradients = pytree.unnames(
            {
                key.removeprefix("encoder/layers/"): as_matrix(key, leaf[layer])
                for key, leaf in pytree.names(draw(1)).items()
                if key.startswith("encoder/")
            }
        )
        reference = optax.adafactor(1.0, **settings) if settings else optax.contrib.muon(1.0, consistent_rms=0.2)
        expected, _ = reference.update(gradients, reference.init(params), params)
        for key, leaf in pytree.names(expected).items():
            if name == "muon" and "kernel" not in key:
                continue  # optax's Adam is Nesterov's, and it takes the biases of heads for a matrix
            found = as_matrix(f"encoder/layers/{key}", stacked[f"encoder/layers/{key}"][layer])
            np.testing.assert_allclose(found, -np.asarray(leaf), rtol=1e-4, atol=1e-5, err_msg=f"{key} {layer}")


HEAD_STACK = {
    "head/pixels/layers/attention/out/kernel": (LAYERS, HEADS, HEAD, WIDTH),
    "head/pixels/layers/mlp/up/kernel": (LAYERS, WIDTH, 6),
    "head/pixels/layers/mlp/up/bias": (LAYERS, 6),
}


def test_adafactor_takes_each_layer_of_a_stack_under_a_head_alone():
    """As MAE's decoder: the direction of a layer does not depend on the layers beside it."""
    params, gradients = draw(0, HEAD_STACK), draw(1, HEAD_STACK)
    assert algorithms.matrix("head/pixels/layers/attention/out/kernel", jnp.ones((3, 2, 5, 8))) == ((1, 2), (3,))
    stage = algorithms.adafactor(params, min_dim_size_to_factor=4)
    stacked = pytree.names(jax.jit(stage.update)(gradients, stage.init(params), params)[0])
    reference = optax.adafactor(1.0, min_dim_size_to_factor=4)
    for layer in range(LAYERS):
        own, gradient = (
            {name: as_matrix(name, leaf[layer]) for name, leaf in pytree.names(tree).items()}
            for tree in (params, gradients)
        )
        expected, _ = reference.update(gradient, reference.init(own), own)
        for name, leaf in expected.items():
            np.testing.assert_allclose(as_matrix(name, stacked[name][layer]), -leaf, rtol=1e-4, atol=1e-5, err_msg=name)


def test_muon_leaves_the_layers_of_a_head_to_adam():
    shapes = SHAPES | HEAD_STACK
    found = directions(algorithms.muon(draw(0, shapes)), draw(0, shapes), steps=1)[0]
    adam = directions(algorithms.adam(draw(0, shapes)), draw(0, shapes), steps=1)[0]
    for name in HEAD_STACK:
        np.testing.assert_allclose(found[name], adam[name], rtol=1e-5)


def test_muon_makes_matrices_orthogonal_and_nothing_else():
    found = directions(algorithms.muon(draw(0)), draw(0), steps=1)[0]
    adam = directions(algorithms.adam(draw(0)), draw(0), steps=1)[0]
    for name, direction in found.items():
        if not name.startswith("encoder/") or "kernel" not in name:
            np.testing.assert_allclose(direction, adam[name], rtol=1e-5)
            continue
        for layer in direction:
            singular = np.linalg.svd(as_matrix(name, layer) / (0.2 * max(as_matrix(name, layer).shape) ** 0.5))[1]
            # Newton and Schulz's quintic leaves them within about a third of 1.
            assert singular.min() > 0.6 and singular.max() < 1.3


def test_lion_is_a_sign():
    found = directions(algorithms.lion(draw(0), b1=0.5, b2=0.8), draw(0), steps=2)
    one, two = (pytree.names(draw(seed)) for seed in (1, 2))
    for name, direction in found[1].items():
        np.testing.assert_array_equal(direction, np.sign(0.5 * 0.2 * np.asarray(one[name]) + 0.5 * np.asarray(two[name])))


@pytest.mark.parametrize("freeze", [(), ("embed",)])
@pytest.mark.parametrize("config", [SMALL, {"name": "muon"}, {"name": "lion"}])
def test_moments_are_sharded_as_their_parameters(config, freeze):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    spec = {
        "embed/word/embedding": P(None, "fsdp"),
        "encoder/layers/attention/query/kernel": P(None, "fsdp", "tensor"),
        "encoder/layers/attention/out/kernel": P(None, "tensor", None, "fsdp"),
    }
    params = pytree.map_named(
        lambda name, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec.get(name, P()))),
        draw(0),
    )
    transform = optim.build(config | {"freeze": freeze}, params, 10).transform
    state = abstract_state(params, transform, mesh)
    made = jax.jit(transform.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state.opt_state))(draw(0))
    found = [leaf for name, leaf in pytree.names(made).items() if "query/kernel" in name]
    for leaf in found:
        whole = leaf.shape == (LAYERS, WIDTH, HEADS, HEAD)
        parts = [1, 2 if leaf.shape[1] == WIDTH else 1, 2 if leaf.shape[2] == HEADS else 1, 1]
        assert leaf.sharding.shard_shape(leaf.shape) == tuple(size // part for size, part in zip(leaf.shape, parts, strict=True))
        assert whole or config["name"] == "adafactor"
    assert len(found) == (2 if config["name"] == "adafactor" else 1)
