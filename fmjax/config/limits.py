"""Limits on the values of settings: small checks, combined into one table per section.

A table maps the names of a section's keys to checks. A check is called with the full name of the
key and its value, and raises UserError, in one line, for a value that it does not allow.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeAlias

from fmjax.contracts import Value
from fmjax.errors import UserError, in_range, one_of

Limit: TypeAlias = Callable[[str, Value], None]
MOST = 2**31 - 1  # the largest step, and the largest index of an array


def number(
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> Limit:
    """Returns a check for a finite number within bounds."""
    return partial(in_range, least=least, most=most, above=above, below=below, hint=hint)


def count(least: int = 0, most: int = MOST, hint: str = "") -> Limit:
    """Returns a check for a whole number from `least` to `most`."""
    return partial(in_range, least=least, most=most, whole=True, hint=hint)


def choice(choices: Iterable[str]) -> Limit:
    """Returns a check for one of a few names."""
    listed = tuple(choices)

    def check(key: str, value: Value) -> None:
        one_of(key, value, listed)

    return check


def truth(key: str, value: Value) -> None:
    """Raises UserError unless the value is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{key}={value}: must be true or false")


def text(key: str, value: Value) -> None:
    """Raises UserError unless the value is text."""
    if not isinstance(value, str):
        raise UserError(f"{key}={value}: must be text, not a {type(value).__name__}")


def texts(key: str, value: Value) -> None:
    """Raises UserError unless the value is a list of texts."""
    if not isinstance(value, list | tuple):
        raise UserError(f"{key}={value}: must be a list, such as a,b")
    for item in value:
        if not isinstance(item, str):
            raise UserError(f"{key}: {item!r:.60} must be text, not a {type(item).__name__}")


def unique_texts(key: str, value: Value) -> None:
    """Raises UserError unless the value is a list of different texts."""
    texts(key, value)
    for name in value:
        if list(value).count(name) > 1:
            raise UserError(f'{key}: has "{name}" twice; remove one')


def group(key: str, value: Value) -> None:
    """Raises UserError unless the value is a group of keys."""
    if not isinstance(value, Mapping):
        raise UserError(f'{key}={value}: must be a group of keys, such as {{"KEY": VALUE}}')


def each(limit: Limit) -> Limit:
    """Returns a check for a group of keys, or a list, whose values all pass `limit`."""

    def check(key: str, value: Value) -> None:
        if isinstance(value, Mapping):
            for name, part in value.items():
                limit(f"{key}.{name}", part)
            return
        if not isinstance(value, list | tuple):
            raise UserError(f"{key}={value}: must be a list, such as 1,2")
        for part in value:
            limit(key, part)

    return check


def either(*limits: Limit, words: str) -> Limit:
    """Returns a check for a value that passes one of the limits; `words` is for errors."""

    def check(key: str, value: Value) -> None:
        for limit in limits:
            try:
                return limit(key, value)
            except UserError:
                continue
        raise UserError(f"{key}={value}: must be {words}")

    return check


def check(section: str, values: Mapping[str, Value], limits: Mapping[str, Limit]) -> None:
    """Raises UserError, naming the key, for the first value that its limit does not allow.

    An unset key (None) and one without a limit pass.
    """
    for key, value in values.items():
        if value is not None and key in limits:
            limits[key](f"{section}.{key}", value)


def of_fields(settings: type) -> dict[str, Limit]:
    """Returns, for each field of a dataclass of settings, the check of its type."""
    try:
        hints = typing.get_type_hints(settings)
    except NameError:  # an extension's, of a type that it only imports for type checking
        return {}
    return {field.name: of_type(hints[field.name]) for field in dataclasses.fields(settings)}


def of_type(kind: Value) -> Limit:
    """Returns a check for a type: bool, int, float, str, tuples of these, or a union of them."""
    plain: dict[Value, Limit] = {
        bool: truth,
        int: partial(in_range, whole=True),
        float: partial(in_range),
        str: text,
        type(None): lambda key, value: None,
    }
    if kind in plain:
        return plain[kind]
    origin: Value = typing.get_origin(kind)
    parts = typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        named = " or ".join(part.__name__ for part in parts)
        return either(*map(of_type, parts), words=named)
    if origin is tuple:
        return texts if parts == (str, ...) else each(of_type(parts[0]))
    return group if isinstance(origin, type) and issubclass(origin, Mapping) else anything


def anything(key: str, value: Value) -> None:
    """Raises UserError for a number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: must be finite")
