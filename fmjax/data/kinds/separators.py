"""The separator between several labels in one string, as in a csv file: given, or inferred from
whether the parts recur as separate labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from fmjax.contracts import Where
from fmjax.errors import UserError

DEFAULT = "|"
MARKS = (",", ";")
SPACE = " "
NONE = "none"  # each string is one label
ENOUGH = 0.5  # fraction of recurring parts that makes labels of several words doubtful


def split(value: str, separator: str) -> list[str]:
    """Returns the labels in a string, without white space around them; blank ones are left out."""
    return [part.strip() for part in pieces(value, separator) if part.strip()]


def pieces(value: str, separator: str) -> list[str]:
    """Returns the pieces between separators in a string, without a blank last one: "a, b, " has
    two."""
    parts = [value] if separator == NONE else value.split(separator)
    return parts if parts[-1].strip() else parts[:-1]


def find(first: Mapping[str, int], where: Where, column: str, labels: Collection[str] = ()) -> str:
    """Returns the separator of the strings in a column; DEFAULT if there is none.

    It is "|" if that occurs. It is "," or ";" if most of the parts between them recur in other
    strings or among the labels, and a space if all parts between spaces recur.

    Args:
      first: the strings, and the index of the first record that holds each.
      where: a source's `where`.
      column: the name of the column.
      labels: the names of the labels, if known.

    Raises UserError, naming a record, if it is unclear whether to split, or at which of two
    separators.
    """
    values = [value for value in first if value not in labels]
    if any(DEFAULT in value for value in values):
        return DEFAULT
    there = [mark for mark in MARKS if any(mark in value for value in values)]
    shares = {mark: recurring(values, mark, labels) for mark in there}
    best = max(shares.values(), default=0.0)
    if shares:
        chosen = [mark for mark, share in shares.items() if share == best]
        if len(chosen) > 1 or not best:
            raise UserError(doubt(first, where, column, tuple(shares)))
        return chosen[0]
    share = recurring(values, SPACE, labels)
    if ENOUGH <= share < 1:
        raise UserError(doubt(first, where, column, (SPACE,)))
    return SPACE if share == 1 else DEFAULT


def recurring(values: Collection[str], separator: str, labels: Collection[str]) -> float:
    """Returns the fraction of the parts of multi-label strings that recur in another string or
    among the labels; 0 if no string has several parts."""
    parts = [set(split(value, separator)) for value in values]
    counts = Counter(part for own in parts for part in own)
    several = {part for own in parts if len(own) > 1 for part in own}
    known = sum(counts[part] > 1 or part in labels for part in several)
    return known / len(several) if several else 0.0


def doubt(first: Mapping[str, int], where: Where, column: str, marks: tuple[str, ...]) -> str:
    """Returns the message about strings that may hold one label or several."""
    value = next(value for value in first if any(mark in value for mark in marks))
    choices = " or ".join(f'"{mark}"' for mark in (*marks, NONE))
    return (
        f'{where(first[value])}: column "{column}" holds "{value}", which may be one label or '
        f"several; set what separates labels: task.separator={choices}"
    )
