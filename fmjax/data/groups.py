"""Columns that divide records: groups, such as users, speakers or patients, and times; and the
records of each group as one record.

Memory holds numbers instead of values: 8 to 24 bytes per record, and about 60 while groups are
numbered.
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np

from fmjax.contracts import Record, Source, Value
from fmjax.data.records import RecordSource, check_columns, smallest
from fmjax.errors import RecordError, UserError

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
MICROSECOND = datetime.timedelta(microseconds=1)
HISTORY = "history"  # the column of `Groups` with the number of records of earlier splits
Time = int | float
# How the times of a column are written, and how one is read; raises ValueError if it is not one.
Reader = tuple[str, Callable[[Value], Time]]


def group_numbers(source: Source, by: str, required: bool = False) -> np.ndarray:
    """Returns the group of each record [N]: numbers of the values of a column, in order of first
    occurrence.

    Raises UserError if there is no such column, and RecordError for a record without a value if
    one is `required`.
    """
    check_columns(source, (by,))
    digests = np.empty(len(source), "S16")  # numbers of values in a dictionary would be objects
    for index in range(len(source)):
        value = source.value(index, by)
        if required and value in (None, ""):
            problem = f'has no value in column "{by}"; fill it in, or remove the record'
            raise RecordError(source.where(index), problem, index)
        text = str(value).encode("utf-8", "surrogatepass")
        digests[index] = hashlib.blake2b(text, digest_size=16).digest()
    _, first, numbers = np.unique(digests, return_index=True, return_inverse=True)
    ranks = np.empty(len(first), np.int64)
    ranks[np.argsort(first)] = np.arange(len(first))
    return smallest(ranks[numbers])


def times_of(source: Source, name: str) -> np.ndarray:
    """Returns the time of each record [N], as int64 or float64.

    Times are numbers, or dates in ISO 8601, which become microseconds since 1970 in UTC. Raises
    UserError if there is no such column, and RecordError for a value that is not a time, or is
    written in another way than the first.
    """
    check_columns(source, (name,))
    found, read = np.empty(len(source), np.int64), None
    for index in range(len(source)):
        value = source.value(index, name)
        read = read or reader_of(value)
        try:
            time = read[1](value)
        except (ValueError, TypeError, OverflowError):
            problem = (
                f'has {value!r:.40} in column "{name}", but data.time needs {read[0]} in all '
                "records; correct it"
            )
            raise RecordError(source.where(index), problem, index) from None
        if isinstance(time, float) and found.dtype == np.int64:
            found = found.astype(np.float64)
        found[index] = time
    return found


def reader_of(value: Value) -> Reader:
    """Returns how times like this one are read."""
    try:
        as_number(value)
    except (ValueError, TypeError, OverflowError):
        try:
            as_date(value)
        except (ValueError, TypeError, OverflowError):
            return "a number, or a date such as 2013-03-01 or 2013-03-01T12:30:00,", as_number
        return "a date such as 2013-03-01T12:30:00", as_date
    return "a number", as_number


def as_number(value: Value) -> Time:
    """Returns a number. Raises ValueError, TypeError or OverflowError if it is not one."""
    if isinstance(value, bool | None):
        raise ValueError
    try:
        number: Time = float(value)
        if isinstance(value, str | int) or number == int(number):
            number = int(value)  # exact beyond 2**53
    except ValueError:
        number = float(value)
    if not math.isfinite(number) or abs(number) >= 2**63:
        raise ValueError
    return number


def as_date(value: Value) -> int:
    """Returns the microseconds since 1970 of a date; without a time zone, in UTC."""
    if not isinstance(value, str | datetime.date):
        raise ValueError
    date = datetime.datetime.fromisoformat(value if isinstance(value, str) else value.isoformat())
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return (date - EPOCH) // MICROSECOND


def bounds_of(numbers: np.ndarray) -> np.ndarray:
    """Returns where each of the sorted groups begins, and the end of the last [groups + 1]."""
    return np.searchsorted(numbers, np.arange(int(numbers[-1]) + 2))


class Groups(RecordSource):
    """One record per group: the group's value, and lists of the values of its other columns in
    time order.

    Args:
      source: the records.
      by: the column of groups.
      numbers: the group of each record [N].
      times: the time of each record [N]; records with the same time keep their order. None: the
        order of the source.
      parts: the split of each record [N], 0 for the earliest.
      part: the split to view. It has the groups with a record in it; their records of earlier
        splits come first, and the column `history` has their number. Records of later splits are
        left out.
      mark: is added to the fingerprint.

    Raises UserError if the source has a column `history`.
    """

    def __init__(
        self,
        source: Source,
        by: str,
        numbers: np.ndarray,
        times: np.ndarray | None,
        parts: np.ndarray,
        part: int,
        mark: Record,
    ):
        if HISTORY in source.columns:
            raise UserError(
                f'data.group_by={by}: the data has a column "{HISTORY}", which is the number of '
                "earlier records here; rename it"
            )
        self.source, self.by, self.mark = source, by, mark
        self.columns = (*source.columns, HISTORY)
        kept = np.flatnonzero((parts <= part) & np.isin(numbers, np.unique(numbers[parts == part])))
        _, own = np.unique(numbers[kept], return_inverse=True)
        keys = (parts[kept], own) if times is None else (times[kept], parts[kept], own)
        order = np.lexsort(keys)
        # The records of the groups one after the other, and where those of each begin.
        self.indices, self.bounds = smallest(kept[order]), smallest(bounds_of(own[order]))
        earlier = np.bincount(own, weights=parts[kept] < part)
        self.histories = smallest(earlier.astype(np.int64))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def members(self, index: int) -> Iterator[int]:
        """Yields the indices of a group's records in the source."""
        index = range(len(self))[index]
        yield from self.indices[self.bounds[index] : self.bounds[index + 1]].tolist()

    def __getitem__(self, index: int) -> Record:
        records = [self.source[own] for own in self.members(index)]
        record: Record = {name: [each[name] for each in records] for name in self.source.columns}
        return record | {self.by: records[0][self.by], HISTORY: int(self.histories[index])}

    def value(self, index: int, name: str) -> Value:
        if name == HISTORY:
            return int(self.histories[index])
        if name == self.by:
            return self.source.value(next(self.members(index)), name)
        return [self.source.value(own, name) for own in self.members(index)]

    def where(self, index: int) -> str:
        first = next(self.members(index))
        count = len(list(self.members(index)))
        return f"{self.source.where(first)} (the first of {count:,} with the same {self.by})"

    def fingerprint(self) -> Record:
        return self.source.fingerprint() | self.mark
