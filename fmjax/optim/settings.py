"""The settings that all optimizers share, and their limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from fmjax.config import limits
from fmjax.errors import UserError, nearest

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config's section `optim`, except for `name` and the algorithm's own settings."""

    learning_rate: float = 1e-4
    schedule: str = "linear"
    warmup_steps: int | None = None  # at most one of warmup_steps and warmup_ratio
    warmup_ratio: float | None = None  # fraction of all steps, rounded up as in transformers
    end_fraction: float = 0.0
    weight_decay: float = 0.01
    l1: float = 0.0
    l2: float = 0.0
    no_decay: Sequence[str] = ("bias$", "norm/scale$")  # neither decayed nor penalized
    clip_norm: float | None = None
    freeze: Sequence[str] = ()
    # Regular expression -> factor.
    multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layer_decay: float = 1.0  # factor on the learning rate for each layer farther from the output
    ema: float | None = None


# Limits of settings: the test, and its description.
Limit = tuple[Callable[[float], bool], str]
FRACTION: Limit = (lambda value: 0 <= value <= 1, "a number from 0 to 1")
BELOW_ONE: Limit = (lambda value: 0 <= value < 1, "a number from 0 to less than 1")
POSITIVE: Limit = (lambda value: value > 0, "a number above 0")
NOT_NEGATIVE: Limit = (lambda value: value >= 0, "a number that is not negative")
COUNT: Limit = (
    lambda value: isinstance(value, int) and 0 <= value <= limits.MOST,
    "a whole number that is 0 or more",
)
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
# Settings that are not numbers.
OTHERS: dict[str, limits.Limit] = {
    "schedule": limits.text,
    "no_decay": limits.texts,
    "freeze": limits.texts,
    "multipliers": limits.group,
    "multiply_by_parameter_scale": limits.truth,
}


def choose(setting: str, name: str, choices: Mapping[str, T]) -> T:
    """Returns the choice named `name`. Raises UserError if there is none."""
    if not isinstance(name, str) or name not in choices:
        hint = nearest(str(name), choices)
        raise UserError(
            f'optim.{setting}: "{name}" is not known{hint}; choose from {", ".join(choices)}'
        )
    return choices[name]


def check(setting: str, value: object, limit: Limit) -> None:
    """Raises UserError unless the value is a finite number within the limit."""
    fits, words = limit
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and isinstance(value, int | float) and fits(value)):
        raise UserError(f"optim.{setting}={value!r} is out of range; use {words}")
