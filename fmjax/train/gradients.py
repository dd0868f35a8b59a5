"""Gradients of a batch: as a whole, accumulated over parts, or clipped per example."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from fmjax.contracts import Arrays, Batch, PyTree
from fmjax.distributed.layout import Layout
from fmjax.distributed.sharding import mesh_axes, written

Key: TypeAlias = jax.Array
# Maps parameters, a batch or a part of one, the weights of the loss terms, and the dropout key to
# the loss and its terms.
Loss: TypeAlias = Callable[[PyTree, Batch, Arrays, Key], tuple[jax.Array, Arrays]]
Weigh: TypeAlias = Callable[[Batch], Arrays]
# The gradient of the loss, and its terms.
Gradients: TypeAlias = Callable[[PyTree, Batch, Key], tuple[PyTree, Arrays]]


def whole(loss: Loss, weigh: Weigh) -> Gradients:
    """Returns the gradient of a batch in one pass."""

    def gradients(params: PyTree, batch: Batch, key: Key) -> tuple[PyTree, Arrays]:
        found: tuple[PyTree, Arrays] = jax.grad(loss, has_aux=True)(
            params, batch, weigh(batch), key
        )
        return found

    return gradients


# Number of elements below which a sum of gradients is not worth dividing.
SMALL = 2**16


class SumShardings(NamedTuple):
    """Where the sum of the gradients of a batch's parts is kept: trees like the parameters."""

    during: PyTree  # while the parts are added
    after: PyTree  # of the result


def accumulated(
    loss: Loss, weigh: Weigh, parts: int, shardings: SumShardings | None = None
) -> Gradients:
    """Returns the gradient of a batch part by part, each with its own dropout key.

    Weights are those of the whole batch, so the parts add up to the same loss. `shardings` divide
    the sum over devices; without them, the compiler chooses.
    """
    during, after = shardings or SumShardings(None, None)

    def placed(grads: PyTree, where: PyTree) -> PyTree:
        return grads if where is None else jax.lax.with_sharding_constraint(grads, where)

    def gradients(params: PyTree, batch: Batch, key: Key) -> tuple[PyTree, Arrays]:
        weights = weigh(batch)
        grad = jax.grad(loss, has_aux=True)
        stacked = jax.tree.map(lambda x: split(x, parts), dict(batch))

        def add(total: PyTree, indexed: tuple[jax.Array, Batch]) -> tuple[PyTree, None]:
            index, part = indexed
            grads, terms = grad(params, part, weights, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, (placed(grads, during), terms)), None

        zeros = placed(jax.tree.map(jnp.zeros_like, params), during)
        begun = zeros, {name: jnp.float32(0) for name in weights}
        total, terms = jax.lax.scan(add, begun, (jnp.arange(parts), stacked))[0]
        return placed(total, after), terms

    return gradients


def sum_shardings(params: PyTree, layout: Layout) -> SumShardings | None:
    """Returns where the sum of the gradients of a batch's parts is kept, if the layout divides it
    further than the parameters. CPUs share their memory, so there the sum is not divided."""
    if layout.platform == "cpu":
        return None
    axes = mesh_axes("act_batch", layout.rules, layout.mesh)
    during = jax.tree.map(lambda param: divided_sum(param, axes), params)
    after = jax.tree.map(lambda param: param.sharding, params)
    return None if during == after else SumShardings(during, after)


def divided_sum(param: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> NamedSharding:
    """Returns the sharding of the sum of a parameter's gradients over the parts of a batch.

    It also divides the last axis that the parameter's sharding leaves whole, over those mesh `axes`
    of the batch that it does not use, so that each device keeps a part of the sum instead of all of
    it (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054). Small parameters, and those that do not
    divide, keep their own sharding.
    """
    sharding: NamedSharding = param.sharding
    spec = [*sharding.spec, *[None] * (len(param.shape) - len(sharding.spec))]
    used = {axis for part in spec if part for axis in written(part)}
    free = tuple(axis for axis in axes if axis not in used and sharding.mesh.shape[axis] > 1)
    ways = math.prod(sharding.mesh.shape[axis] for axis in free)
    if ways > 1 and math.prod(param.shape) >= SMALL:
        for axis in reversed(range(len(spec))):
            if spec[axis] is None and param.shape[axis] % ways == 0:
                spec[axis] = free
                return NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return sharding


def clipped(loss: Loss, weigh: Weigh, norm: float, trainable: PyTree) -> Gradients:
    """Returns the mean of the per-example gradients, each scaled down to a norm of at most `norm`.

    Each example is a separate batch with its own weights and dropout key (Abadi et al. 2016,
    algorithm 1). Only trainable parameters count. Needs the memory of the parameters once per
    example.
    """

    def gradients(params: PyTree, batch: Batch, key: Key) -> tuple[PyTree, Arrays]:
        def one(row: Batch, index: jax.Array) -> tuple[PyTree, Arrays]:
            own_key = jax.random.fold_in(key, index)
            grads, terms = jax.grad(loss, has_aux=True)(params, row, weigh(row), own_key)
            grads = without_frozen(grads, trainable)
            factor = jnp.minimum(1.0, norm / jnp.maximum(optax.tree_utils.tree_norm(grads), 1e-12))
            return jax.tree.map(lambda grad: grad * factor, grads), terms

        rows = {name: array[:, None] for name, array in batch.items()}
        each = jax.vmap(one)(rows, jnp.arange(len(next(iter(batch.values())))))
        found: tuple[PyTree, Arrays] = jax.tree.map(lambda leaf: leaf.mean(axis=0), each)
        return found

    return gradients


def without_frozen(grads: PyTree, trainable: PyTree) -> PyTree:
    """Returns gradients that are 0 where `trainable`, a tree of bool, is False.

    If a step does so immediately, XLA drops their backward pass.
    """
    return jax.tree.map(
        lambda grad, trained: grad if trained else jnp.zeros_like(grad), grads, trainable
    )


def split(x: jax.Array, parts: int) -> jax.Array:
    """Returns [parts, B / parts, ...], where row i goes to part i mod parts, so each device keeps
    its own rows.
    """
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
