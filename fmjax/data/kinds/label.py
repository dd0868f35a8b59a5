"""Labels: the names of classes. If a source has both a number and a name, the label is the name."""

from __future__ import annotations

from collections.abc import Mapping

from fmjax.config.numbers import is_count
from fmjax.contracts import Value, Where
from fmjax.data.kinds import separators
from fmjax.errors import RecordError

FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True}


class ClassName(str):
    """The name of a class, which is its label; `number` is the source's number of it.

    Older runs, trained when sources only had the number, use the number as the label.
    """

    number: int

    def __new__(cls, name: str, number: int) -> ClassName:
        made = super().__new__(cls, name)
        made.number = number
        return made

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override]
        return str(self), self.number


def names_of(
    value: Value,
    where: str,
    column: str,
    several: bool = False,
    separator: str = separators.DEFAULT,
) -> list[str]:
    """Returns the label names of a value: one name; or, if `several`, any number of names from a
    list or a string with separators.

    Raises RecordError if a label is not a name or a whole number.
    """
    items: list[Value] = [value]
    if several and isinstance(value, str | list):
        items = separators.pieces(value, separator) if isinstance(value, str) else value
    found = []
    for item in items:
        if several and item == "":
            continue
        if isinstance(item, bool) or not isinstance(item, str | int) or not str(item).strip():
            raise RecordError(
                where, f'column "{column}" holds {item!r}, not a label; correct the record'
            )
        found.append(item if isinstance(item, ClassName) else str(item).strip())
    return found


def flag(value: Value, where: str, column: str) -> bool:
    """Returns whether a value marks a label as present: 1, and 0 as absent. Raises RecordError for
    another value.
    """
    if isinstance(value, int | float) and value in (0, 1):  # also True and False
        return bool(value)
    if isinstance(value, str) and value.strip() in FLAGS:
        return FLAGS[value.strip()]
    raise RecordError(where, f'column "{column}" holds {value!r}, not 0 or 1; correct the record')


def known_name(name: str, labels: tuple[str, ...]) -> str:
    """Returns the label of a name: the name itself, or its number if that is the label."""
    if name not in labels and isinstance(name, ClassName) and str(name.number) in labels:
        return str(name.number)
    return name


def ordered(first: Mapping[str, int], where: Where) -> tuple[str, ...]:
    """Returns label names in order: whole numbers by their value, others alphabetically.

    Args:
      first: for each name, the index of the first record that has it.
      where: a source's `where`.

    Raises RecordError if whole numbers are mixed with others, negative, or have gaps.
    """
    numbers = {name for name in first if is_count(name.removeprefix("-"))}
    if not numbers:
        return tuple(sorted(map(str, first)))
    for name, index in first.items():
        if name not in numbers or not 0 <= int(name) < len(first):
            found = ", ".join(sorted(first)[:10])
            raise RecordError(
                where(index),
                f'label "{name}" does not fit; whole-number labels run from 0 without gaps, and '
                f"those of the training data are {found}; correct the record, or list the labels "
                "in task.labels",
                index,
            )
    return tuple(map(str, range(len(first))))
