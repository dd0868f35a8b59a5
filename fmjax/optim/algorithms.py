"""What makes directions of gradients: the stages that `optim.name` chooses among, each a function of the parameters' names.

Stacked layers give a kernel a leading axis, and attention's kernels keep their heads apart, so "the two largest axes", which
optax's Adafactor factors over, or "rank 2", which its Muon orthogonalises, are not the matrix that multiplies. `matrix` says by
name which axes are. Moments that are means over some axes keep those with size 1, so that they are sharded as their parameter is.

Adam: Kingma and Ba 2015. Lion: Chen et al. 2023 (arXiv:2302.06675). Adafactor: Shazeer and Stern 2018 (arXiv:1804.04235).
Muon: Jordan 2024, with the scale of Liu et al. 2025 (arXiv:2502.16982), by which AdamW's learning rate and decay serve it too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from fmjax import pytree

STACK = re.compile(r"(encoder|decoder)/layers/")  # parameters of all layers, stacked on the first axis
GATHERED = re.compile(r"/out/kernel$")  # of attention: [H,K,D], where all other kernels have one axis of inputs


def matrix(name: str, leaf: Any) -> MuonDimensionNumbers | None:
    """Returns which axes of a parameter are a matrix's inputs and which its outputs; None of what is no matrix.

    The axes left over, that of stacked layers, count matrices.
    """
    first = 1 if STACK.match(name) else 0
    rank = leaf.ndim - first
    if not name.endswith(("kernel", "embedding")) or rank < 2:
        return None
    inputs = rank - 1 if GATHERED.search(name) else 1
    return MuonDimensionNumbers(tuple(range(first, first + inputs)), tuple(range(first + inputs, leaf.ndim)))


def adam(params: Any, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Returns the stage of Adam's direction: bias-corrected mean over root mean square plus `eps`."""
    return optax.scale_by_adam(b1, b2, eps)


def lion(params: Any, *, b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """Returns the stage of the sign of an interpolated momentum. Learning rates are 3 to 10 times smaller than AdamW's, and
    weight decay as much larger."""
    return optax.scale_by_lion(b1, b2)


def muon(
    params: Any, *, beta: float = 0.95, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns the stage that orthogonalises the momentum of each layer's matrices, its root mean square 0.2 as AdamW's is.

    All else, embeddings and heads among it, gets Adam's direction, of b1, b2 and eps.
    """

    def numbers(updates: Any) -> Any:
        return pytree.map_named(matrix, updates)

    def to_mean_square(updates: Any, params: Any) -> Any:
        # An orthogonal matrix has singular values of 1, hence a mean square of 1 over its longer side.
        def scale(name: str, update: jax.Array) -> jax.Array:
            axes = matrix(name, update)
            assert axes is not None
            return 0.2 * max(math.prod(update.shape[axis] for axis in side) for side in axes) ** 0.5 * update

        return pytree.map_named(scale, updates)

    groups = pytree.map_named(lambda name, leaf: "muon" if STACK.match(name) and matrix(name, leaf) else "adam", params)
    stages = {
        "muon": optax.chain(scale_by_muon(beta=beta, weight_dimension_numbers=numbers), optax.stateless(to_mean_square)),
        "adam": optax.scale_by_adam(b1, b2, eps),
    }
    present = set(jax.tree.leaves(groups))
    return optax.partition({name: stage for name, stage in stages.items() if name in present}, groups)


class AdafactorState(NamedTuple):
    """The mean squares of gradients: of a matrix over its outputs and over its inputs, of all else as they are."""

    count: Any
    rows: Any  # [N,inputs,1]
    columns: Any  # [N,1,outputs]
    full: Any


def adafactor(
    params: Any,
    *,
    decay_rate: float = 0.8,
    clipping_threshold: float = 1.0,
    multiply_by_parameter_scale: bool = True,
    min_dim_size_to_factor: int = 128,
) -> optax.GradientTransformation:
    """Returns the stage of Adafactor's direction: gradients over their root mean square, which a matrix whose sides are long
    enough keeps as two vectors; each layer's clipped to a root mean square, and scaled by its weights'.

    It is optax's with the same settings, on parameters that are not stacked and have two axes (tested).
    """

    def factored(name: str, leaf: Any) -> MuonDimensionNumbers | None:
        axes = matrix(name, leaf)
        sides = [math.prod(leaf.shape[axis] for axis in side) for side in axes] if axes else [0]
        return axes if min(sides) >= min_dim_size_to_factor else None

    def zeros(part: Callable[[Any, MuonDimensionNumbers | None], Any], params: Any) -> Any:
        return pytree.map_named(lambda name, leaf: part(leaf, factored(name, leaf)), params)

    def init(params: Any) -> AdafactorState:
        absent = optax.MaskedNode()
        return AdafactorState(
            jnp.zeros((), jnp.int32),
            zeros(lambda leaf, axes: jnp.zeros(reduced(leaf, axes.output_axis), jnp.float32) if axes else absent, params),
            zeros(lambda leaf, axes: jnp.zeros(reduced(leaf, axes.reduction_axis), jnp.float32) if axes else absent, params),
            zeros(lambda leaf, axes: absent if axes else jnp.zeros(leaf.shape, jnp.float32), params),
        )

    def update(updates: Any, state: AdafactorState, params: Any = None) -> tuple[Any, AdafactorState]:
        kept = 1 - (state.count + 1.0) ** -decay_rate

        def mean(before: Any, square: jax.Array, axes: Any) -> jax.Array:
            now = square.mean(axis=axes, keepdims=True) if axes else square
            return kept * before + (1 - kept) * now

        def one(name: str, update: Any, weights: Any, rows: Any, columns: Any, full: Any) -> tuple[Any, Any, Any, Any]:
            square, axes = jnp.square(update) + 1e-30, factored(name, update)
            if axes:
                rows, columns = mean(rows, square, axes.output_axis), mean(columns, square, axes.reduction_axis)
                # Each to the power -1/2 by itself: their product may be too small for fp32.
                direction = update * (rows / rows.mean(axis=axes.reduction_axis, keepdims=True)) ** -0.5 * columns**-0.5
            else:
                full = mean(full, square, ())
                direction = update * full**-0.5
            direction = direction / jnp.maximum(1.0, root_mean_square(name, direction) / clipping_threshold)
            if multiply_by_parameter_scale:
                direction = direction * jnp.maximum(root_mean_square(name, weights), 1e-3)
            return direction, rows, columns, full

        made = unzipped(one, updates, params, state.rows, state.columns, state.full)
        return made[0], AdafactorState(optax.safe_increment(state.count), *made[1:])

    return optax.GradientTransformation(init, update)


def unzipped(function: Callable[..., tuple[Any, ...]], tree: Any, *rest: Any) -> list[Any]:
    """Returns a tree for each value that `function(name, leaf, *others)` returns; where a tree of `rest` has no array, it
    has a node there, which is passed as it is."""
    structure: Any = jax.tree.structure(tree)
    parts = map(structure.flatten_up_to, rest)
    found = [function(*each) for each in zip(pytree.names(tree), jax.tree.leaves(tree), *parts, strict=True)]
    return [structure.unflatten(values) for values in zip(*found, strict=True)]


def reduced(leaf: Any, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a shape in which some axes have become 1."""
    return tuple(1 if axis in axes else size for axis, size in enumerate(leaf.shape))


def root_mean_square(name: str, leaf: jax.Array) -> jax.Array:
    """Returns the root mean square of a parameter's like, of stacked layers each one's, broadcastable to it."""
    first = 1 if STACK.match(name) else 0
    return jnp.sqrt(jnp.mean(jnp.square(leaf), axis=tuple(range(first, leaf.ndim)), keepdims=True))


# `optim.name` -> the stage; keyword arguments are settings, the function's name is the stage's.
ALGORITHMS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adam,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
}
