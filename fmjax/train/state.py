"""The training state, and its shapes and shardings, which are described before it exists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmjax.contracts import PyTree
from fmjax.distributed.sharding import Rules, kept_axes, parameter_shardings, with_sharding
from fmjax.optim import map_params

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
