"""What a source of records is, and what holds for every kind: which columns there are, and holding some records out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from fmjax.errors import UserError, nearest

Record = dict[str, Any]


class Source(Protocol):
    """Random access to records, as Grain's map-datasets read from. Sources are pickled for Grain's workers."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a record's values."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Returns a record: column -> str, int, float or list."""

    def where(self, index: int) -> str:
        """Returns where a record stands, for messages: "reviews.tsv line 12"."""

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells these data from others, JSON-able: names, sizes and hashes, no folders."""


def check_columns(source: Source, wanted: Iterable[str]) -> None:
    """Raises UserError, listing the columns there are, unless a source has all that are wanted."""
    for name in wanted:
        if name not in source.columns:
            raise UserError(
                f'the data have no column "{name}"{nearest(name, source.columns)}; {source.where(0)} has '
                f"{', '.join(source.columns)}; name the right one in the task's settings, or the columns in data.columns"
            )


def locate(bounds: np.ndarray, index: int) -> tuple[int, int]:
    """Returns the number of the file that holds a record, and the record's number in it; `bounds` [files + 1] are the numbers
    of records before each file. Raises IndexError for a record that is not there; a negative one counts from the end."""
    index = range(int(bounds[-1]))[index]
    number = int(np.searchsorted(bounds, index, side="right")) - 1
    return number, index - int(bounds[number])


def value_of(source: Source, index: int, name: str) -> Any:
    """Returns one value of a record. A source with a method `value` does not read the others for it, an image for its label."""
    return source.value(index, name) if hasattr(source, "value") else source[index][name]


def json_object(text: str) -> Record:
    """Returns the JSON object that a text is. Raises ValueError, with the reason, if it is none or holds half a letter."""
    try:
        record = json.loads(text)
        if "\\u" in text:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    except UnicodeEncodeError as error:
        raise ValueError("has half of a surrogate pair") from error
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object {...}")
    return record


def chosen(record: Record, columns: Iterable[str], where: Callable[[int], str], index: int) -> Record:
    """Returns the columns of a record, the others left out. Raises UserError, naming the record, if it lacks one."""
    for name in columns:
        if name not in record:
            raise UserError(f'{where(index)}: lacks "{name}", which the first record has; correct it')
    return {name: record[name] for name in columns}


def hold_out(source: Source, share: float, by: str = "") -> tuple[Source, Source]:
    """Returns a source without a share of its records, and that share, chosen by a hash of the records' numbers.

    Where `by` names a column, records with the same value there stay together, and the share is of the values: the
    questions about one article, say. Raises UserError unless the share lies between 0 and 1 and leaves both sides a record.
    """
    groups = np.arange(len(source))
    if by:
        check_columns(source, (by,))
        numbers: dict[Any, int] = {}
        groups = np.array([numbers.setdefault(str(value_of(source, index, by)), len(numbers)) for index in range(len(source))])
    total = int(groups.max(initial=-1)) + 1
    count = round(share * total) if 0 < share < 1 else 0
    if not 0 < count < total:
        raise UserError(
            f"data.hold_out={share} of {total} {'values of ' + by if by else 'records'} leaves nothing on one side; "
            "choose a share between 0 and 1 that leaves records on both, or give data.files.validation"
        )
    held = np.isin(groups, np.argsort(scrambled(total), kind="stable")[:count])
    mark = {"hold_out": share} | ({"hold_out_by": by} if by else {})
    rest, chosen = np.flatnonzero(~held), np.flatnonzero(held)
    return Subset(source, rest, mark | {"part": "rest"}), Subset(source, chosen, mark | {"part": "held"})


def scrambled(count: int) -> np.ndarray:
    """Returns [count] uint64 hashes of 0, 1, ...: the output function of SplitMix64, the same with every NumPy."""
    state = (np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


class Subset:
    """Some records of a source; `mark` is added to its fingerprint."""

    def __init__(self, source: Source, indices: np.ndarray, mark: Record):
        self.source, self.indices, self.mark = source, indices, mark

    @property
    def columns(self) -> tuple[str, ...]:
        return self.source.columns

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]

    def value(self, index: int, name: str) -> Any:
        return value_of(self.source, int(self.indices[index]), name)

    def where(self, index: int) -> str:
        return self.source.where(int(self.indices[index]))

    def fingerprint(self) -> Record:
        return self.source.fingerprint() | self.mark


class Bundle:
    """The training data of a mixture of tasks: a source for each part."""

    def __init__(self, parts: Mapping[str, Source]):
        self.parts = parts

    def fingerprint(self) -> Record:
        return {part: source.fingerprint() for part, source in self.parts.items()}
