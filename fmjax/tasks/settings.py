"""Limits of task settings: their types, and the ranges that apply to every task.

Ranges and choices of a single task are checked where the task is defined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fmjax.config import limits
from fmjax.errors import UserError

TOKENS, PIXELS, COUNT = 2**20, 2**14, 10_000  # upper limits of settings
LIMITS: dict[str, limits.Limit] = {
    "labels": limits.unique_texts,
    "label_columns": limits.unique_texts,
    "endings": limits.unique_texts,
    "scores": limits.unique_texts,
    "max_new_tokens": limits.count(0, TOKENS),
    "top_k": limits.count(0, hint="0 means all tokens"),
    "top_p": limits.number(above=0, most=1),
    "num_beams": limits.count(1, COUNT),
    "length_penalty": limits.number(least=-100, most=100),
    "no_repeat_ngram_size": limits.count(0, TOKENS, hint="0 means none"),
    "target_length": limits.count(0, TOKENS),
    "packed_target_length": limits.count(0, TOKENS),
    "temperature": limits.number(least=0, most=1e6),
    "max_question": limits.count(1, TOKENS),
    "max_answer": limits.count(1, TOKENS),
    "n_best": limits.count(1, COUNT),
    "stride": limits.count(0, TOKENS, hint="0 means half of the row"),
    "choices": limits.count(0, COUNT, hint="0 means as many as in the data"),
    "focal_gamma": limits.number(least=0, most=100),
    "rand_augment": limits.count(0, 100),
    "mixup": limits.number(least=0, most=1000),
    "cutmix": limits.number(least=0, most=1000),
    "patch_size": limits.count(1, PIXELS),
    "image_size": limits.either(
        limits.count(0, PIXELS),
        limits.each(limits.count(1, PIXELS)),
        words=f"a side in pixels from 0 to {PIXELS:,}, or height,width",
    ),
    "resize_size": limits.count(0, PIXELS),
    "shift": limits.count(0, PIXELS),
}
# Settings whose 0 means "same as another", in tasks where 0 is the default.
MAY_BE_ZERO = ("max_new_tokens",)


def typed(task: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a task's settings with the types of its fields. Lists become tuples, since settings
    are hashable and JSON has no tuples; labels that are whole numbers become names.

    Raises UserError, naming the key, for a value of another type.
    """
    given = {key: tuple(it) if isinstance(it, list) else it for key, it in settings.items()}
    if isinstance(given.get("labels"), tuple):
        given["labels"] = tuple(
            str(label) if type(label) is int else label for label in given["labels"]
        )
    limits.check("task", given, limits.of_fields(task))
    return given


def check_ranges(task: Any) -> None:
    """Raises UserError, naming the key, for a setting of a task that is out of range."""
    limits.check("task", vars(task), LIMITS)
    defaults = {field.name: field.default for field in dataclasses.fields(task)}
    for name in MAY_BE_ZERO:
        if vars(task).get(name) == 0 and defaults[name] != 0:
            raise UserError(f"task.{name}=0: must be at least 1")
