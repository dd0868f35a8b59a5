"""Converts text to numbers by the grammar of JSON, not by Python's.

Python's `int` and `float` also read "1_000", "١٢" (Arabic digits), " 1", "infinity" and "0x10".
Such text in a column or a flag is an error, since its meaning would be a guess.
"""

from __future__ import annotations

import math
import re

WHOLE = re.compile(r"[+-]?[0-9]+")
REAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def whole(text: str) -> int:
    """Returns the whole number that a text spells: an optional sign, then digits 0 to 9.

    Raises ValueError for anything else.
    """
    if not WHOLE.fullmatch(text):
        raise ValueError(f"{text!r:.60} is not a whole number")
    return int(text)


def is_count(text: str) -> bool:
    """Returns whether a text consists of at most 18 digits from 0 to 9."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


def is_positive(text: str) -> bool:
    """Returns whether a text is a count of at least 1."""
    return is_count(text) and int(text) > 0


def real(text: str) -> float:
    """Returns the finite number that a text spells: "0.1", "-3", "1e-4", ".5".

    Raises ValueError for anything else, and for a number that a float cannot hold.
    """
    if not REAL.fullmatch(text):
        raise ValueError(f"{text!r:.60} is not a number")
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text!r:.60} is too large for a number")
    return number


def number_of(value: object) -> float:
    """Returns the finite number that a value is or spells; surrounding blanks are allowed.

    Raises ValueError for anything else, including booleans, None, NaN and infinity.
    """
    if isinstance(value, str):
        return real(value.strip(" \t"))
    if isinstance(value, bool | bytes) or value is None:
        raise ValueError(f"{value!r:.60} is not a number")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r:.60} is not a finite number")
    return number
