"""Learning-rate schedules: the rate as a function of the update index."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fmjax.errors import UserError
from fmjax.optim.settings import Settings, choose

# After warm-up: functions of the update index, the length of warm-up, and progress (0 to 1).
SHAPES: dict[str, Callable[[jax.Array, int, jax.Array], jax.Array]] = {
    "constant": lambda number, warmup, progress: jnp.ones_like(progress),
    "linear": lambda number, warmup, progress: 1 - progress,
    "cosine": lambda number, warmup, progress: (1 + jnp.cos(jnp.pi * progress)) / 2,
    "inverse_sqrt": lambda number, warmup, progress: jnp.sqrt(warmup / jnp.maximum(number, 1)),
}


def warmup_count(settings: Settings, steps: int) -> int:
    """Returns the number of warm-up updates.

    Raises UserError if it is set twice, or exceeds the number of updates.
    """
    if settings.warmup_steps is not None and settings.warmup_ratio is not None:
        raise UserError(
            "optim.warmup_steps and optim.warmup_ratio are both set; unset one of them (=none)"
        )
    count = settings.warmup_steps or math.ceil(steps * (settings.warmup_ratio or 0))
    if count > steps:
        raise UserError(
            f"optim: {count} warm-up steps exceed the run's {steps}; lower optim.warmup_steps"
        )
    return count


def schedule(
    name: str, learning_rate: float, steps: int, warmup_steps: int, end_fraction: float = 0.0
) -> optax.Schedule:
    """Returns the learning rate (fp32) as a function of the update index; the first is 0.

    The rate rises from 0 at update 0 to `learning_rate` at update `warmup_steps`, and then is
    - constant: `learning_rate`;
    - linear, cosine: falling so to `end_fraction` of it at `steps`, where it stays;
    - inverse_sqrt: `learning_rate * sqrt(warmup_steps / number)` (Vaswani et al. 2017, section
      5.3).

    With warm-up, the first update has rate 0, as in transformers (get_linear_schedule_with_warmup
    and similar ones).

    Raises UserError for an unknown name, inverse_sqrt without warm-up, or an `end_fraction` without
    effect.
    """
    shape = choose("schedule", name, SHAPES)
    if name == "inverse_sqrt" and not warmup_steps:
        raise UserError(
            "optim.schedule=inverse_sqrt decays from the end of warm-up; set optim.warmup_steps"
        )
    if end_fraction and name not in ("linear", "cosine"):
        raise UserError(
            f"optim.end_fraction={end_fraction} is not used by schedule={name}; unset it"
        )

    def rate(count: ArrayLike) -> jax.Array:
        number = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((number - warmup_steps) / max(steps - warmup_steps, 1), 0, 1)
        after = end_fraction + (1 - end_fraction) * shape(number, warmup_steps, progress)
        return learning_rate * jnp.where(
            number < warmup_steps, number / max(warmup_steps, 1), after
        )

    return rate
