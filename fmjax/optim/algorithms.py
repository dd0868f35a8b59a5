"""What makes directions of gradients: the stages that `optim.name` chooses among, each a function
of the parameters' names.

Stacked layers give a kernel a leading axis, and attention's kernels keep their heads apart, so "the
two largest axes", which optax's Adafactor factors over, or "rank 2", which its Muon orthogonalizes,
are not the matrix that multiplies. `matrix` says by name which axes are. Moments that are means
over some axes keep those with size 1, so that they are sharded as their parameter is.

Adam: Kingma and Ba 2015. Lion: Chen et al. 2023 (arXiv:2302.06675). Adafactor: Shazeer and Stern
2018 (arXiv:1804.04235). Muon: Jordan 2024, with the scale of Liu et al. 2025 (arXiv:2502.16982), by
which AdamW's learning rate and decay serve it too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from fmjax import pytree
from fmjax.contracts import PyTree

Leaf: TypeAlias = jax.Array | jax.ShapeDtypeStruct
Shape: TypeAlias = tuple[int, ...]

# Parameters of all layers, stacked on the first axis: the encoder's and the decoder's ...
BACKBONE = re.compile(r"(encoder|decoder)/layers/")
# ... and those of a head, such as MAE's decoder.
STACK = re.compile(r"(encoder|decoder|head/.+)/layers/")
# Of attention: [H,K,D], where all other kernels have one axis of inputs.
GATHERED = re.compile(r"/out/kernel$")


def matrix(name: str, leaf: Leaf) -> MuonDimensionNumbers | None:
    """Returns the input axes and the output axes of a parameter as a matrix.

    None of what is no matrix.

    The axes left over, that of stacked layers, count matrices.
    """
    first = 1 if STACK.match(name) else 0
    rank = leaf.ndim - first
    if not name.endswith(("kernel", "embedding")) or rank < 2:
        return None
    inputs = rank - 1 if GATHERED.search(name) else 1
    return MuonDimensionNumbers(
        tuple(range(first, first + inputs)), tuple(range(first + inputs, leaf.ndim))
    )


def adam(
    params: PyTree, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns the stage of Adam's direction: bias-corrected mean over root mean square plus
    `eps`.
    """
    return optax.scale_by_adam(b1, b2, eps)


def lion(params: PyTree, *, b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """Returns the stage of the sign of an interpolated momentum.

    Learning rates are 3 to 10 times smaller than AdamW's, and weight decay as much larger.
    """
    return optax.scale_by_lion(b1, b2)


def muon(
    params: PyTree, *, beta: float = 0.95, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns the stage that orthogonalizes the momentum of each layer's matrices, its root mean
    square 0.2 as AdamW's is.

    All else, embeddings and heads among it, gets Adam's direction, of b1, b2 and eps.
    """

    def numbers(updates: PyTree) -> PyTree:
        return pytree.map_named(matrix, updates)

    def to_mean_square(updates: PyTree, params: PyTree) -> PyTree:
        # An orthogonal matrix has singular values of 1, hence a mean square of 1 over its longer
        # side.
        def scale(name: str, update: jax.Array) -> jax.Array:
            axes = matrix(name, update)
            assert axes is not None
            root: float = (
                max(math.prod(update.shape[axis] for axis in side) for side in axes) ** 0.5
            )
            return 0.2 * root * update

        return pytree.map_named(scale, updates)

    groups = pytree.map_named(
        lambda name, leaf: "muon" if BACKBONE.match(name) and matrix(name, leaf) else "adam", params
    )
    stages = {
        "muon": optax.chain(
            scale_by_muon(beta=beta, weight_dimension_numbers=numbers),
            optax.stateless(to_mean_square),
        ),
        "adam": optax.scale_by_adam(b1, b2, eps),
    }
    present = set(jax.tree.leaves(groups))
    return optax.partition(
        {name: stage for name, stage in stages.items() if name in present}, groups
    )


class AdafactorState(NamedTuple):
    """The mean squares of gradients: of a matrix over its outputs and over its inputs, of all else
    as they are.
    """

    count: PyTree  # int32 []; to a type checker, tuple's method
    rows: PyTree  # [N,inputs,1]
    columns: PyTree  # [N,1,outputs]
    full: PyTree


def adafactor(
    params: PyTree,
    *,
    decay_rate: float = 0.8,
    clipping_threshold: float = 1.0,
    multiply_by_parameter_scale: bool = True,
    min_dim_size_to_factor: int = 128,
) -> optax.GradientTransformation:
    """Returns the stage of Adafactor's direction: gradients over their root mean square, which a
    matrix whose sides are long enough keeps as two vectors; each layer's clipped to a root mean
    square, and scaled by its weights'.

    It is optax's with the same settings, on parameters that are not stacked and have two axes
    (tested).
    """

    def factored(name: str, leaf: Leaf) -> MuonDimensionNumbers | None:
        return long_sides(name, leaf, min_dim_size_to_factor)

    def init(params: PyTree) -> AdafactorState:
        def zeros(place: int) -> PyTree:
            def one(name: str, leaf: Leaf) -> jax.Array | optax.MaskedNode:
                shape = square_shapes(leaf, factored(name, leaf))[place]
                return optax.MaskedNode() if shape is None else jnp.zeros(shape, jnp.float32)

            return pytree.map_named(one, params)

        return AdafactorState(jnp.zeros((), jnp.int32), *map(zeros, range(3)))

    def update(
        updates: PyTree, state: AdafactorState, params: PyTree = None
    ) -> tuple[PyTree, AdafactorState]:
        mean = partial(moving_mean, 1 - (state.count + 1.0) ** -decay_rate)

        def one(
            name: str, update: jax.Array, weights: jax.Array, *squares: PyTree
        ) -> tuple[PyTree, ...]:
            direction, *squares_now = normalized(update, factored(name, update), mean, *squares)
            direction = direction / jnp.maximum(
                1.0, root_mean_square(name, direction) / clipping_threshold
            )
            if multiply_by_parameter_scale:
                direction = direction * jnp.maximum(root_mean_square(name, weights), 1e-3)
            return direction, *squares_now

        directions, rows, columns, full = unzipped(
            one, updates, params, state.rows, state.columns, state.full
        )
        return directions, AdafactorState(optax.safe_increment(state.count), rows, columns, full)

    return optax.GradientTransformation(init, update)


def square_shapes(leaf: Leaf, axes: MuonDimensionNumbers | None) -> tuple[Shape | None, ...]:
    """Returns the shapes of a parameter's rows, columns and full squares; None where it has none.

    Of a matrix, `axes` are its sides.
    """
    if axes is None:
        return None, None, leaf.shape
    return reduced(leaf, axes.output_axis), reduced(leaf, axes.reduction_axis), None


def normalized(
    update: jax.Array,
    axes: MuonDimensionNumbers | None,
    mean: Callable[[jax.Array, jax.Array, Sequence[int]], jax.Array],
    rows: PyTree,
    columns: PyTree,
    full: PyTree,
) -> tuple[PyTree, ...]:
    """Returns a gradient over its root mean square, and its rows, columns and full squares after
    it.

    Of a matrix, `axes` are its sides. `mean` continues a moving average, with the mean of what is
    new over some axes.
    """
    square = jnp.square(update) + 1e-30
    if axes is None:
        full = mean(full, square, ())
        return update * full**-0.5, rows, columns, full
    rows = mean(rows, square, axes.output_axis)
    columns = mean(columns, square, axes.reduction_axis)
    # Each to the power -1/2 by itself: their product may be too small for fp32.
    relative = rows / rows.mean(axis=tuple(axes.reduction_axis), keepdims=True)
    return update * relative**-0.5 * columns**-0.5, rows, columns, full


def long_sides(name: str, leaf: Leaf, least: int) -> MuonDimensionNumbers | None:
    """Returns the axes of a matrix whose sides both have at least `least` entries; else None."""
    axes = matrix(name, leaf)
    sides = [math.prod(leaf.shape[axis] for axis in side) for side in axes] if axes else [0]
    return axes if min(sides) >= least else None


def moving_mean(
    kept: jax.Array, before: jax.Array, square: jax.Array, axes: Sequence[int]
) -> jax.Array:
    """Returns the moving average, of which `kept` is the share of what was before, of the mean over
    axes.
    """
    now: jax.Array = square.mean(axis=tuple(axes), keepdims=True) if axes else square
    return kept * before + (1 - kept) * now


def unzipped(
    function: Callable[..., tuple[PyTree, ...]], tree: PyTree, *rest: PyTree
) -> list[PyTree]:
    """Returns a tree for each value that `function(name, leaf, *others)` returns.

    Where a tree of `rest` has no array, it has a node there, which is passed as it is.
    """
    structure: PyTree = jax.tree.structure(tree)
    parts = map(structure.flatten_up_to, rest)
    values = [
        function(*each)
        for each in zip(pytree.names(tree), jax.tree.leaves(tree), *parts, strict=True)
    ]
    return [structure.unflatten(column) for column in zip(*values, strict=True)]


def reduced(leaf: Leaf, axes: Sequence[int]) -> Shape:
    """Returns a shape in which some axes have become 1."""
    return tuple(1 if axis in axes else size for axis, size in enumerate(leaf.shape))


def root_mean_square(name: str, leaf: jax.Array) -> jax.Array:
    """Returns the root mean square of a parameter's like, of stacked layers each one's,
    broadcastable to it.
    """
    first = 1 if STACK.match(name) else 0
    return jnp.sqrt(jnp.mean(jnp.square(leaf), axis=tuple(range(first, leaf.ndim)), keepdims=True))


# `optim.name` -> the stage; keyword arguments are settings, the function's name is the stage's.
ALGORITHMS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adam,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
}
