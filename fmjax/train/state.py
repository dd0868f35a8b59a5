"""The training state: described abstractly first, and created already sharded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmjax import pytree
from fmjax.contracts import PyTree
from fmjax.distributed.compiler import options_once
from fmjax.distributed.sharding import Rules, kept_axes, parameter_shardings, with_sharding
from fmjax.optim import map_params
from fmjax.randomness import seeded_key

BatchSpec: TypeAlias = Mapping[str, jax.ShapeDtypeStruct]
Transform: TypeAlias = optax.GradientTransformation


@flax.struct.dataclass
class TrainState:
    """Everything that training changes: the step number, the fp32 parameters, and the optimizer
    state.

    It has no random key: the key of a step is `fold_in(key(seed), step)`.
    """

    step: PyTree  # int32 [], or its shape
    params: PyTree
    opt_state: PyTree


def init_params(model: nn.Module, spec: BatchSpec, key: jax.Array) -> PyTree:
    """Returns fresh parameters, each still boxed with the logical names of its axes."""
    batch = {name: jnp.zeros(array.shape, array.dtype) for name, array in spec.items()}
    return model.init(key, batch)["params"]


def abstract_params(model: nn.Module, spec: BatchSpec, mesh: Mesh, rules: Rules) -> PyTree:
    """Returns the parameters' shapes, dtypes and shardings, without creating an array.

    Raises UserError if an axis does not divide over the devices that it is sharded over.
    """
    boxed = jax.eval_shape(lambda: init_params(model, spec, jax.random.key(0)))
    shardings = parameter_shardings(boxed, rules, mesh)
    # Under a mesh, unboxing adds a sharding constraint, which is impossible for a shape.
    params = jax.eval_shape(nn.meta.unbox, boxed)
    return jax.tree.map(with_sharding, params, shardings)


def abstract_state(params: PyTree, transform: Transform, mesh: Mesh) -> TrainState:
    """Returns the abstract state.

    Optimizer moments are sharded like their parameters, except along axes that they are a mean
    over; counters are replicated.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    opt_state = map_params(
        transform,
        lambda leaf, param: with_sharding(leaf, kept_axes(param, leaf.shape)),
        jax.eval_shape(transform.init, params),
        params,
        other=lambda leaf: with_sharding(leaf, whole),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(step=step, params=params, opt_state=opt_state)


def create_state(
    model: nn.Module, transform: Transform, spec: BatchSpec, abstract: TrainState, seed: int
) -> TrainState:
    """Returns a new state. No array is ever unsharded on a device unless its sharding says so."""

    def create(key: jax.Array) -> TrainState:
        params = nn.meta.unbox(init_params(model, spec, key))
        return TrainState(step=jnp.int32(0), params=params, opt_state=transform.init(params))

    return _drawn(create, abstract, seed)


def create_params(
    model: nn.Module, spec: BatchSpec, params: PyTree, seed: int, wanted: Collection[str]
) -> dict[str, jax.Array]:
    """Returns those of the parameters that are wanted, by slash-joined name, with the values that
    `create_state` gives them. The others are neither computed nor stored.
    """

    def create(key: jax.Array) -> PyTree:
        return only(nn.meta.unbox(init_params(model, spec, key)))

    def only(tree: PyTree) -> PyTree:
        return {name: leaf for name, leaf in pytree.names(tree).items() if name in wanted}

    return _drawn(create, only(params), seed) if wanted else {}


def _drawn(create: Callable[[jax.Array], PyTree], abstract: PyTree, seed: int) -> PyTree:
    """Returns what a function makes of the seed's key, sharded like `abstract`."""
    leaves = jax.tree.leaves(abstract)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    run = jax.jit(
        create, out_shardings=shardings, compiler_options=options_once(leaves[0].sharding.mesh)
    )
    return run(seeded_key(seed, "train.seed"))


def with_params(params: PyTree, transform: Transform, abstract: TrainState) -> TrainState:
    """Returns the state at step 0 that starts from given parameters."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    on_devices = jax.tree.map(jax.device_put, params, shardings.params)
    opt_state = jax.jit(transform.init, out_shardings=shardings.opt_state)(on_devices)
    step = jax.device_put(np.int32(0), shardings.step)
    return TrainState(step=step, params=on_devices, opt_state=opt_state)
