"""Checks that answers can be represented in JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fmjax.contracts import PyTree, Value, Where
from fmjax.errors import UserError


def check_answers(answers: Sequence[PyTree], where: Where) -> None:
    """Raises UserError, naming the example by `where(index)`, for an answer that has NaN or
    infinity.
    """
    for index, answer in enumerate(answers):
        if not is_finite(answer):
            raise UserError(
                f"{where(index)}: the model's output is NaN or infinite; its weights do not fit "
                "its settings, or model.dtype has too little precision for it"
            )


def is_finite(value: Value) -> bool:
    """Returns whether all numbers of nested lists and dictionaries are finite."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
