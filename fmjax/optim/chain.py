"""Optimizers and learning-rate schedules, built of optax stages that know the parameters by name.

An optimizer is a chain of named stages and its state a dictionary of theirs; a stage that is not asked for is
left out:

    freeze -> penalty -> clip -> adam (or another algorithm) -> decay -> scale -> rate -> ema

A parameter is decayed, frozen or scaled by its name, never by its rank: stacked layers give biases and norm
scales a leading axis. All state is fp32, as the parameters are.

AdamW is Loshchilov and Hutter 2019 (decoupled decay, multiplied by the learning rate, as in
torch.optim.AdamW); penalties are the coupled kind, part of the loss whose gradient the algorithm sees, though
not of the one that is logged: l1 times the sum of |w|, and l2 / 2 times that of w^2, as torch.optim.Adam's
weight_decay; clipping by the global norm is Pascanu et al. 2013; layer-wise learning rates are BEiT's
(Bao et al. 2022); the moving average is Polyak and Juditsky's of 1992 with exponential weights.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax import pytree
from fmjax.errors import UserError, nearest
from fmjax.optim.algorithms import ALGORITHMS, STACK


class Optimizer(NamedTuple):
    """A gradient transformation, and the learning rate it has at each update (the first is update 0)."""

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that every optimizer has: the config's `optim` but for `name` and the algorithm's own."""

    learning_rate: float = 1e-4
    schedule: str = "linear"
    warmup_steps: int | None = None  # at most one of warmup_steps and warmup_ratio
    warmup_ratio: float | None = None  # of all steps, rounded up as transformers does
    end_fraction: float = 0.0
    weight_decay: float = 0.01
    l1: float = 0.0
    l2: float = 0.0
    no_decay: Sequence[str] = ("bias$", "norm/scale$")  # neither decayed nor penalised
    clip_norm: float | None = None
    freeze: Sequence[str] = ()
    multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)  # regular expression -> factor
    layer_decay: float = 1.0  # of the learning rate, for each layer farther from the output
    ema: float | None = None


# What schedules do after warm-up: functions of the update's number, warm-up's length, and progress (0 to 1).
SHAPES: dict[str, Callable[[jax.Array, int, jax.Array], jax.Array]] = {
    "constant": lambda number, warmup, progress: jnp.ones_like(progress),
    "linear": lambda number, warmup, progress: 1 - progress,
    "cosine": lambda number, warmup, progress: (1 + jnp.cos(jnp.pi * progress)) / 2,
    "inverse_sqrt": lambda number, warmup, progress: jnp.sqrt(warmup / jnp.maximum(number, 1)),
}

# What a setting must be: the test, and its name in words.
Limit = tuple[Callable[[float], bool], str]
FRACTION: Limit = (lambda value: 0 <= value <= 1, "a number from 0 to 1")
BELOW_ONE: Limit = (lambda value: 0 <= value < 1, "a number from 0 to below 1")
POSITIVE: Limit = (lambda value: value > 0, "a number above 0")
NOT_NEGATIVE: Limit = (lambda value: value >= 0, "a number that is 0 or more")
COUNT: Limit = (lambda value: value >= 0 and value == int(value), "a whole number that is 0 or more")
LIMITS: dict[str, Limit] = {
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": COUNT,
    "warmup_ratio": FRACTION,
    "end_fraction": FRACTION,
    "b1": BELOW_ONE,
    "b2": BELOW_ONE,
    "beta": BELOW_ONE,
    "eps": POSITIVE,
    "decay_rate": POSITIVE,
    "clipping_threshold": POSITIVE,
    "min_dim_size_to_factor": COUNT,
    "weight_decay": NOT_NEGATIVE,
    "l1": NOT_NEGATIVE,
    "l2": NOT_NEGATIVE,
    "clip_norm": POSITIVE,
    "layer_decay": (lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "ema": BELOW_ONE,
}


def build(config: Mapping[str, Any], params: Any, steps: int) -> Optimizer:
    """Returns the optimizer that the config's section `optim` describes, for a run of `steps` updates.

    `params` is the tree of parameters or of their shapes: only names and shapes are read. Frozen parameters
    get an update of zero whatever their gradient, count for no norm, and have no moments: in a state,
    optax.MaskedNode stands for them, which `map_params` passes over. The average has every parameter.

    Raises UserError for an unknown setting or choice, a value out of range, or an expression without a match.
    """
    settings, algorithm, direction = read(config, params)
    count = warmup(settings, steps)
    rate = schedule(settings.schedule, settings.learning_rate, steps, count, settings.end_fraction)
    decayed = inverse(pytree.mask(params, settings.no_decay, "optim.no_decay"))
    stages = {}
    if settings.l1 or settings.l2:
        stages["penalty"] = optax.masked(penalise(settings.l1, settings.l2), decayed)
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
        # Every stage passes the frozen ones by, so their zeros arrive as constants, which XLA folds away.
        stages = {"freeze": zero} | {name: optax.masked(stage, trained) for name, stage in stages.items()}
    if settings.ema is not None:
        stages["ema"] = track_ema(settings.ema)
    return Optimizer(chain(stages), rate)


def read(config: Mapping[str, Any], params: Any) -> tuple[Settings, str, optax.GradientTransformation]:
    """Returns the settings all optimizers share, and the algorithm's name and stage. None is unset."""
    given = {key: value for key, value in config.items() if value is not None}
    name = given.pop("name", "adamw")
    algorithm = choose("name", name, ALGORITHMS)
    own = list(inspect.signature(algorithm).parameters)[1:]  # but for the parameters
    known = [field.name for field in dataclasses.fields(Settings)] + own
    for key, value in given.items():
        if key not in known:
            hint = nearest(key, known)
            raise UserError(f"optim.{key} is not a setting of {name}{hint}; there are {', '.join(known)}")
        if key in LIMITS:
            check(key, value, LIMITS[key])
    for expression, value in given.get("multipliers", {}).items():
        check(f"multipliers.{expression}", value, POSITIVE)
    special = {key: given.pop(key) for key in own if key in given}
    return Settings(**given), algorithm.__name__, algorithm(params, **special)


def choose(setting: str, name: str, choices: Mapping[str, Any]) -> Any:
    """Returns the choice of that name. Raises UserError if there is none."""
    if name not in choices:
        hint = nearest(str(name), choices)
        raise UserError(f'optim.{setting}: there is no "{name}"{hint}; choose from {", ".join(choices)}')
    return choices[name]


def check(setting: str, value: Any, limit: Limit) -> None:
    """Raises UserError unless the value is a finite number within the limit."""
    fits, words = limit
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not fits(value):
        raise UserError(f"optim.{setting}={value!r} is out of range; give {words}")


def warmup(settings: Settings, steps: int) -> int:
    """Returns how many updates warm up. Raises UserError if that is given twice, or is more than all."""
    if settings.warmup_steps is not None and settings.warmup_ratio is not None:
        raise UserError("optim.warmup_steps and optim.warmup_ratio are both set; unset one of them (=none)")
    count = settings.warmup_steps or math.ceil(steps * (settings.warmup_ratio or 0))
    if count > steps:
        raise UserError(f"optim: {count} warm-up steps exceed the run's {steps}; lower optim.warmup_steps")
    return count


def schedule(
    name: str, learning_rate: float, steps: int, warmup_steps: int, end_fraction: float = 0.0
) -> optax.Schedule:
    """Returns the learning rate (fp32) as a function of the update's number, of which the first is 0.

    The rate rises from 0 at update 0 to `learning_rate` at update `warmup_steps`, and then is
    - constant: `learning_rate`;
    - linear, cosine: falling so to `end_fraction` of it at `steps`, where it stays;
    - inverse_sqrt: `learning_rate * sqrt(warmup_steps / number)` (Vaswani et al. 2017, section 5.3).

    With warm-up the first update has rate 0, as in transformers (get_linear_schedule_with_warmup and kin).

    Raises UserError for an unknown name, inverse_sqrt without warm-up, or an `end_fraction` without effect.
    """
    shape = choose("schedule", name, SHAPES)
    if name == "inverse_sqrt" and not warmup_steps:
        raise UserError("optim.schedule=inverse_sqrt falls from the end of warm-up; set optim.warmup_steps")
    if end_fraction and name not in ("linear", "cosine"):
        raise UserError(f"optim.end_fraction={end_fraction} is not used by schedule={name}; unset it")

    def rate(count: Any) -> jax.Array:
        number = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((number - warmup_steps) / max(steps - warmup_steps, 1), 0, 1)
        after = end_fraction + (1 - end_fraction) * shape(number, warmup_steps, progress)
        return learning_rate * jnp.where(number < warmup_steps, number / max(warmup_steps, 1), after)

    return rate


def trainable(params: Any, freeze: Sequence[str]) -> Any:
    """Returns a tree of bool: whether a parameter is trained, which is if it matches none of the expressions.

    Raises UserError if an expression matches nothing, or nothing is left to train.
    """
    mask = inverse(pytree.mask(params, freeze, "optim.freeze"))
    if not any(jax.tree.leaves(mask)):
        raise UserError(f"optim.freeze={','.join(freeze)} matches every parameter; leave some to train")
    return mask


def inverse(mask: Any) -> Any:
    return jax.tree.map(lambda chosen: not chosen, mask)


def factors(params: Any, multipliers: Mapping[str, float], layer_decay: float) -> dict[str, Any]:
    """Returns by name what multiplies the learning rate: a float, or fp32 [layers, 1, ...] of stacked layers.

    It is `layer_decay ** distance`, times every multiplier whose expression is found in the name. The
    distances are BEiT's: layer i of N (from 0) is N - i away from the output, embeddings are one farther than
    the first layer, and all else (heads, pooler, final norms) is at 0. An encoder and a decoder each count
    their own layers.

    Raises UserError if an expression matches nothing, or there are no layers to decay over.
    """
    leaves = pytree.names(params)
    depth = max((leaf.shape[0] for name, leaf in leaves.items() if STACK.match(name)), default=0)
    if layer_decay != 1 and not depth:
        raise UserError(f"optim.layer_decay={layer_decay}: the model has no stacked layers; leave it at 1")
    found = {
        expression: pytree.names(pytree.mask(params, [expression], "optim.multipliers"))
        for expression in multipliers
    }

    def distance(name: str, leaf: Any) -> Any:
        if STACK.match(name):
            layers, *rest = leaf.shape
            return np.arange(layers, 0, -1, dtype=np.float32).reshape(layers, *(1 for _ in rest))
        return depth + 1 if name.startswith("embed/") else 0

    def factor(name: str, leaf: Any) -> Any:
        product = math.prod(multipliers[expression] for expression, mask in found.items() if mask[name])
        return layer_decay ** distance(name, leaf) * product

    return {name: factor(name, leaf) for name, leaf in leaves.items()}


def penalise(l1: float, l2: float) -> optax.GradientTransformation:
    """Returns the stage that adds the gradient of l1 |w| + l2 / 2 w^2; that of |w| is 0 at 0."""

    def add(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda update, w: update + l1 * jnp.sign(w) + l2 * w, updates, params)

    return optax.stateless(add)


def scale_by_name(scales: Mapping[str, Any]) -> optax.GradientTransformation:
    """Returns the stage that multiplies each update by the constant of its name."""

    def scale(updates: Any, params: Any) -> Any:
        return pytree.map_named(lambda name, update: update * scales[name], updates)

    return optax.stateless(scale)


class EmaState(NamedTuple):
    """The moving average of the parameters, a tree like theirs."""

    ema: Any


def track_ema(decay: float) -> optax.GradientTransformation:
    """Returns the stage, the last of a chain, that averages the updated parameters and passes updates on.

    The average starts as the parameters, and is then decay * average + (1 - decay) * (parameters + updates).
    """

    def init(params: Any) -> EmaState:
        # A copy: parameters and average are donated together, so they may not share a buffer.
        return EmaState(jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: EmaState, params: Any = None) -> tuple[Any, EmaState]:
        # Written as a step towards the parameters, which leaves the average of a frozen one exactly as it is.
        def step(average: jax.Array, param: jax.Array, change: jax.Array) -> jax.Array:
            return average + (1 - decay) * (param + change - average)

        return updates, EmaState(jax.tree.map(step, state.ema, params, updates))

    return optax.GradientTransformation(init, update)


def chain(stages: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """Returns the stages one after the other, as optax.named_chain does, with a plain dictionary as state."""
    inner = optax.named_chain(*stages.items())

    def init(params: Any) -> dict[str, Any]:
        return dict(inner.init(params))

    def update(updates: Any, state: Mapping[str, Any], params: Any = None) -> tuple[Any, dict[str, Any]]:
        updates, state = inner.update(updates, state, params)
        return updates, dict(state)

    return optax.GradientTransformation(init, update)


def map_params(
    transform: optax.GradientTransformation,
    function: Callable[..., Any],
    state: Any,
    *trees: Any,
    other: Callable[[Any], Any],
) -> Any:
    """Maps `function(leaf, *leaves)` over a state's copies of the parameter tree, and `other` over all else
    in it.

    It is optax.tree_utils.tree_map_params, but passes over frozen parameters, which have no moments.
    """

    def absent(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def visit(leaf: Any, *leaves: Any) -> Any:
        return leaf if absent(leaf) else function(leaf, *leaves)

    tree_map_params = optax.tree_utils.tree_map_params
    return tree_map_params(transform, visit, state, *trees, transform_non_params=other, is_leaf=absent)
