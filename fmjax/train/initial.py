"""The state of step 0, created already sharded."""

from __future__ import annotations

from collections.abc import Callable, Collection

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmjax import pytree
from fmjax.contracts import PyTree
from fmjax.distributed.compiler import options_once
from fmjax.randomness import seeded_key
from fmjax.train.state import BatchSpec, TrainState, Transform, init_params


def create_state(
    model: nn.Module, transform: Transform, spec: BatchSpec, abstract: TrainState, seed: int
) -> TrainState:
    """Returns a new state. No array is ever unsharded on a device unless its sharding says so."""

    def create(key: jax.Array) -> TrainState:
        params = nn.meta.unbox(init_params(model, spec, key))
        return TrainState(step=jnp.int32(0), params=params, opt_state=transform.init(params))

    state: TrainState = _drawn(create, abstract, seed)
    return state


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
