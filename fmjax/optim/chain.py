"""Optimizers, built from optax stages that select parameters by name.

An optimizer is a chain of named stages, and its state is a dictionary of theirs. Unused stages are
left out:

    freeze -> penalty -> clip -> adam (or another algorithm) -> decay -> scale -> rate -> ema

A parameter is decayed, frozen or scaled by its name, never by its rank: stacked layers give biases
and norm scales a leading axis. All state is fp32, like the parameters.

AdamW is Loshchilov and Hutter 2019 (decoupled decay, multiplied by the learning rate, as in
torch.optim.AdamW); penalties are coupled, that is, part of the loss that is differentiated, but not
of the logged one: l1 times the sum of |w|, and l2 / 2 times the sum of w^2, as in
torch.optim.Adam's weight_decay; clipping by the global norm is Pascanu et al. 2013; layer-wise
learning rates are BEiT's (Bao et al. 2022); the moving average is that of Polyak and Juditsky 1992
with exponential weights.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax import pytree
from fmjax.config import limits
from fmjax.contracts import PyTree
from fmjax.errors import UserError, nearest
from fmjax.optim.algorithms import ALGORITHMS, BACKBONE, Leaf
from fmjax.optim.schedules import SHAPES, schedule, warmup_count
from fmjax.optim.settings import LIMITS, OTHERS, POSITIVE, Settings, check, choose

Transform: TypeAlias = optax.GradientTransformation
Factor: TypeAlias = float | np.ndarray


class Optimizer(NamedTuple):
    """A gradient transformation, and its learning rate at each update (the first is update 0)."""

    transform: Transform
    learning_rate: optax.Schedule


def build(config: Mapping[str, PyTree], params: PyTree, steps: int) -> Optimizer:
    """Returns the optimizer that the config's section `optim` describes, for a run of `steps`
    updates.

    `params` is the tree of parameters or of their shapes: only names and shapes are read. Frozen
    parameters get a zero update regardless of their gradient, do not count in norms, and have no
    moments: in a state, optax.MaskedNode takes their place, which `map_params` skips. The average
    has every parameter.

    Raises UserError for an unknown setting or choice, a value out of range, or an expression
    without a match.
    """
    settings, algorithm, direction = read(config, params)
    count = warmup_count(settings, steps)
    rate = schedule(settings.schedule, settings.learning_rate, steps, count, settings.end_fraction)
    decayed = inverse(pytree.mask(params, settings.no_decay, "optim.no_decay"))
    stages = {}
    if settings.l1 or settings.l2:
        stages["penalty"] = optax.masked(penalize(settings.l1, settings.l2), decayed)
    if settings.clip_norm is not None:
        stages["clip"] = optax.clip_by_global_norm(settings.clip_norm)
    stages[algorithm] = direction
    if settings.weight_decay:
        stages["decay"] = optax.add_decayed_weights(settings.weight_decay, decayed)
    if settings.multipliers or settings.layer_decay != 1:
        stages["scale"] = scale_by_name(factors(params, settings.multipliers, settings.layer_decay))
    stages["rate"] = optax.scale_by_learning_rate(rate)
    if settings.freeze:
        trained = trainable(params, settings.freeze)
        zero = optax.masked(optax.set_to_zero(), inverse(trained))
        # Every stage skips the frozen ones, so their zeros arrive as constants, which XLA folds
        # away.
        stages = {"freeze": zero} | {
            name: optax.masked(stage, trained) for name, stage in stages.items()
        }
    if settings.ema is not None:
        stages["ema"] = track_ema(settings.ema)
    return Optimizer(chain(stages), rate)


def read(config: Mapping[str, PyTree], params: PyTree) -> tuple[Settings, str, Transform]:
    """Returns the settings that all optimizers share, and the algorithm's name and stage.

    None means unset.
    """
    check_section(config)
    given = {key: value for key, value in config.items() if value is not None}
    algorithm = ALGORITHMS[given.pop("name", "adamw")]
    special = {key: given.pop(key) for key in own_settings(algorithm) if key in given}
    return Settings(**given), algorithm.__name__, algorithm(params, **special)


def own_settings(algorithm: Callable[..., Transform]) -> list[str]:
    """Returns the names of an algorithm's own settings."""
    return list(inspect.signature(algorithm).parameters)[1:]  # without the parameters


def check_section(config: Mapping[str, PyTree]) -> None:
    """Raises UserError for an unknown setting or choice, and a value out of range.

    It only reads the config's `optim` section. None means unset.
    """
    given = {key: value for key, value in config.items() if value is not None}
    name = given.pop("name", "adamw")
    own = own_settings(choose("name", name, ALGORITHMS))
    known = [field.name for field in dataclasses.fields(Settings)] + own
    for key, value in given.items():
        if key not in known:
            hint = nearest(key, known)
            raise UserError(
                f"optim.{key} is not a setting of {name}{hint}; choose from {', '.join(known)}"
            )
        if key in LIMITS:
            check(key, value, LIMITS[key])
    limits.check("optim", given, OTHERS)
    choose("schedule", given.get("schedule", Settings.schedule), SHAPES)
    for expression, value in given.get("multipliers", {}).items():
        check(f"multipliers.{expression}", value, POSITIVE)
    for key in ("no_decay", "freeze", "multipliers"):
        for expression in given.get(key, ()):
            pytree.check_pattern(f"optim.{key}", expression)


def trainable(params: PyTree, freeze: Sequence[str]) -> PyTree:
    """Returns a tree of bool: whether a parameter is trained, that is, matches none of the
    expressions.

    Raises UserError if an expression matches nothing, or nothing is left to train.
    """
    mask = inverse(pytree.mask(params, freeze, "optim.freeze"))
    if not any(jax.tree.leaves(mask)):
        raise UserError(
            f"optim.freeze={','.join(freeze)} matches every parameter; leave some to train"
        )
    return mask


def inverse(mask: PyTree) -> PyTree:
    return jax.tree.map(lambda chosen: not chosen, mask)


def factors(
    params: PyTree, multipliers: Mapping[str, float], layer_decay: float
) -> dict[str, Factor]:
    """Returns the factor on the learning rate by name: a float, or fp32 [layers, 1, ...] for
    stacked layers.

    It is `layer_decay ** distance`, times every multiplier whose expression is found in the name.
    The distances are BEiT's: layer i of N (from 0) is N - i away from the output, embeddings are
    one farther than the first layer, and everything else (pooler, final norms, heads with any
    layers of their own) is at 0. An encoder and a decoder count their layers separately.

    Raises UserError if an expression matches nothing, or if there are no layers to decay over.
    """
    leaves = pytree.names(params)
    depth = max((leaf.shape[0] for name, leaf in leaves.items() if BACKBONE.match(name)), default=0)
    if layer_decay != 1 and not depth:
        raise UserError(
            f"optim.layer_decay={layer_decay}: the model has no stacked layers; keep it at 1"
        )
    found = {
        expression: pytree.names(pytree.mask(params, [expression], "optim.multipliers"))
        for expression in multipliers
    }

    def distance(name: str, leaf: Leaf) -> Factor:
        if BACKBONE.match(name):
            layers, *rest = leaf.shape
            return np.arange(layers, 0, -1, dtype=np.float32).reshape(layers, *(1 for _ in rest))
        return depth + 1 if name.startswith("embed/") else 0

    def factor(name: str, leaf: Leaf) -> Factor:
        product = math.prod(
            multipliers[expression] for expression, mask in found.items() if mask[name]
        )
        return layer_decay ** distance(name, leaf) * product

    return {name: factor(name, leaf) for name, leaf in leaves.items()}


def penalize(l1: float, l2: float) -> Transform:
    """Returns the stage that adds the gradient of l1 |w| + l2 / 2 w^2, where that of |w| is 0 at
    0."""

    def add(updates: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(lambda update, w: update + l1 * jnp.sign(w) + l2 * w, updates, params)

    return optax.stateless(add)


def scale_by_name(scales: Mapping[str, Factor]) -> Transform:
    """Returns the stage that multiplies each update by the constant of its name."""

    def scale(updates: PyTree, params: PyTree) -> PyTree:
        return pytree.map_named(lambda name, update: update * scales[name], updates)

    return optax.stateless(scale)


class EmaState(NamedTuple):
    """The moving average of the parameters, a tree of the same structure."""

    ema: PyTree


def track_ema(decay: float) -> Transform:
    """Returns the stage, the last of a chain, that averages the updated parameters and passes
    updates on.

    The average starts as the parameters, and is then decay * average + (1 - decay) * (parameters +
    updates).
    """

    def init(params: PyTree) -> EmaState:
        # This is a copy: parameters and average are donated together, so they must not share a
        # buffer.
        return EmaState(jax.tree.map(jnp.copy, params))

    def update(updates: PyTree, state: EmaState, params: PyTree = None) -> tuple[PyTree, EmaState]:
        # Written as a step toward the parameters, which leaves the average of a frozen one exactly
        # unchanged.
        def step(average: jax.Array, param: jax.Array, change: jax.Array) -> jax.Array:
            return average + (1 - decay) * (param + change - average)

        return updates, EmaState(jax.tree.map(step, state.ema, params, updates))

    return optax.GradientTransformation(init, update)


def chain(stages: Mapping[str, Transform]) -> Transform:
    """Returns the composition of the stages, like optax.named_chain, with a plain dictionary as
    state.
    """
    inner = optax.named_chain(*stages.items())

    def init(params: PyTree) -> dict[str, PyTree]:
        return dict(inner.init(params))

    def update(
        updates: PyTree, state: Mapping[str, PyTree], params: PyTree = None
    ) -> tuple[PyTree, dict[str, PyTree]]:
        updates, state = inner.update(updates, state, params)
        return updates, dict(state)

    return optax.GradientTransformation(init, update)


def map_params(
    transform: Transform,
    function: Callable[..., Any],
    state: PyTree,
    *trees: PyTree,
    other: Callable[[PyTree], PyTree],
) -> PyTree:
    """Maps `function(leaf, *leaves)` over a state's copies of the parameter tree, and `other` over
    everything else.

    Like optax.tree_utils.tree_map_params, but skips frozen parameters, which have no moments.
    """

    def absent(node: PyTree) -> bool:
        return isinstance(node, optax.MaskedNode)

    def visit(leaf: PyTree, *leaves: PyTree) -> PyTree:
        return leaf if absent(leaf) else function(leaf, *leaves)

    tree_map_params = optax.tree_utils.tree_map_params
    return tree_map_params(
        transform, visit, state, *trees, transform_non_params=other, is_leaf=absent
    )
