"""Sources of records: their base class, and sources made from others, such as subsets and
concatenations."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from fmjax.config.json_files import DuplicateKey, parse_json
from fmjax.contracts import Record as Record
from fmjax.contracts import Source as Source
from fmjax.contracts import Value
from fmjax.errors import UserError, nearest

BLOCK = 4096  # records that are read at once


class RecordSource:
    """A base class for sources (`contracts.Source`): by default, reading a value reads its whole
    record."""

    columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        """Returns a record.

        Raises IndexError beyond the last one, and RecordError if it cannot be read.
        """
        raise NotImplementedError

    def value(self, index: int, name: str) -> Value:
        """Returns one value of a record."""
        return self[index][name]

    def block(self, indices: np.ndarray) -> list[Record] | None:
        """Returns some records, read at once; None if they have to be read one by one, because that
        is as fast, or because one of them may be bad.

        `indices` are ascending.
        """
        return None

    def where(self, index: int) -> str:
        """Returns where a record is, for messages: "reviews.tsv line 12"."""
        raise NotImplementedError

    def fingerprint(self) -> Record:
        """Returns the identity of the data as JSON values: names, sizes and hashes, but no
        folders."""
        raise NotImplementedError


def records_of(source: Source, indices: Sequence[int] | np.ndarray) -> Iterator[Record]:
    """Yields some records, many read at once if the source can. `indices` are ascending."""
    for begin in range(0, len(indices), BLOCK):
        own = np.asarray(indices[begin : begin + BLOCK])
        yield from block_of(source, own) or map(source.__getitem__, own.tolist())


def values_of(source: Source, name: str, indices: Sequence[int] | np.ndarray) -> Iterator[Value]:
    """Yields one value of some records, as `records_of` does; of a source that reads records one by
    one, only that value."""
    for begin in range(0, len(indices), BLOCK):
        own = np.asarray(indices[begin : begin + BLOCK])
        found = block_of(source, own)
        if found:
            yield from (record[name] for record in found)
        else:
            yield from (source.value(index, name) for index in own.tolist())


def block_of(source: Source, indices: np.ndarray) -> list[Record] | None:
    """Returns `RecordSource.block` of any source."""
    return source.block(indices) if isinstance(source, RecordSource) else None


def check_columns(source: Source, wanted: Iterable[str]) -> None:
    """Raises UserError, listing the existing columns, unless a source has all wanted ones."""
    for name in wanted:
        if name not in source.columns:
            raise UserError(
                f'the data has no column "{name}"{nearest(name, source.columns)}; '
                f"{source.where(0)} has {', '.join(source.columns)}; name the right one in the "
                "task's settings, or list the columns in data.columns"
            )


def locate(bounds: np.ndarray, index: int) -> tuple[int, int]:
    """Returns the number of the file that holds a record, and the record's number in it.

    `bounds` [files + 1] are the numbers of records before each file. A negative index counts from
    the end. Raises IndexError for a record that does not exist.
    """
    index = range(int(bounds[-1]))[index]
    number = int(np.searchsorted(bounds, index, side="right")) - 1
    return number, index - int(bounds[number])


def json_object(text: str) -> Record:
    """Returns the JSON object in a text.

    Raises ValueError, with the reason, if it is not one or has half of a surrogate pair.
    """
    try:
        record = parse_json(text)
        if "\\u" in text:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("has half of a surrogate pair") from error
    except DuplicateKey as error:
        raise ValueError(f"is not clear: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object {...}")
    return record


def fill_columns(record: Record, columns: Iterable[str]) -> Record:
    """Returns the columns of a record; missing ones are None, as in a table."""
    return {name: record.get(name) for name in columns}


def columns_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Returns the keys of records, in order of first occurrence."""
    return tuple(dict.fromkeys(name for record in records for name in record))


def hold_out(source: Source, share: float, by: str = "") -> tuple[Source, Source]:
    """Splits off a fraction of a source's records, chosen by a hash of their indices. Returns the
    rest and the held-out records.

    If `by` names a column, records with the same value, such as questions about one article, stay
    together, and the fraction refers to the values. Raises UserError unless the fraction is between
    0 and 1 and leaves a record in both parts.
    """
    groups = np.arange(len(source))
    if by:
        check_columns(source, (by,))
        numbers: dict[str, int] = {}
        groups = np.array(
            [
                numbers.setdefault(str(source.value(index, by)), len(numbers))
                for index in range(len(source))
            ]
        )
    total = int(groups.max(initial=-1)) + 1
    count = held_count(total, share)
    if count is None:
        what = ("values of " + by) if by else "record" if total == 1 else "records"
        fix = "choose a fraction between 0 and 1 that leaves records on both sides, or set "
        fix = "add data, or " if total < 2 and 0 < share < 1 else fix
        raise UserError(
            f"data.hold_out={share} of {total} {what} leaves one side empty; "
            f"{fix}data.files.validation"
        )
    hashes = scrambled(total)  # no two are the same
    held = (hashes <= np.partition(hashes, count - 1)[count - 1])[groups]
    mark = {"hold_out": share} | ({"hold_out_by": by} if by else {})
    return (
        Selected(source, np.flatnonzero(~held), mark | {"part": "rest"}),
        Selected(source, np.flatnonzero(held), mark | {"part": "held"}),
    )


def smallest(numbers: np.ndarray) -> np.ndarray:
    """Returns non-negative numbers in the smallest unsigned integer type that holds them."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))


def held_count(total: int, share: float) -> int | None:
    """Returns how many of `total` are held out; None if that leaves one side empty."""
    count = round(share * total) if 0 < share < 1 else 0
    return count if 0 < count < total else None


def scrambled(count: int) -> np.ndarray:
    """Returns [count] uint64 hashes of 0, 1, ...: the output function of SplitMix64, the same with
    every NumPy."""
    state = (np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)))


def chosen_of(selected: np.ndarray | range, indices: np.ndarray) -> np.ndarray:
    """Returns some of the selected numbers, int64 [N]."""
    if isinstance(selected, range):
        return np.asarray(selected.start + selected.step * indices)
    return np.asarray(selected[indices], np.int64)


class Selected(RecordSource):
    """Some records of a source, in any order.

    Args:
      source: the records.
      indices: those to select [N]; an array is kept in the smallest type, a range as it is.
      mark: is added to the fingerprint.
    """

    def __init__(self, source: Source, indices: np.ndarray | range, mark: Record):
        self.source, self.mark, self.columns = source, mark, source.columns
        self.indices = indices if isinstance(indices, range) else smallest(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]

    def value(self, index: int, name: str) -> Value:
        return self.source.value(int(self.indices[index]), name)

    def block(self, indices: np.ndarray) -> list[Record] | None:
        chosen = chosen_of(self.indices, indices)
        return block_of(self.source, chosen) if (np.diff(chosen) > 0).all() else None

    def where(self, index: int) -> str:
        return self.source.where(int(self.indices[index]))

    def fingerprint(self) -> Record:
        return self.source.fingerprint() | self.mark


class ConcatenatedSources(RecordSource):
    """The concatenated records of several named sources, with the columns that all of them have."""

    def __init__(self, parts: Mapping[str, Source]):
        self.parts = dict(parts)
        *self.begins, self.size = np.cumsum([0, *map(len, self.parts.values())]).tolist()
        first = next(iter(self.parts.values()))
        self.columns = tuple(
            name
            for name in first.columns
            if all(name in part.columns for part in self.parts.values())
        )

    def __len__(self) -> int:
        return int(self.size)

    def find(self, index: int) -> tuple[Source, int]:
        """Returns the source of a record, and the record's number in it."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        part = bisect.bisect_right(self.begins, index) - 1
        return list(self.parts.values())[part], index - self.begins[part]

    def __getitem__(self, index: int) -> Record:
        source, own = self.find(index)
        record = source[own]
        return {name: record[name] for name in self.columns}

    def value(self, index: int, name: str) -> Value:
        source, own = self.find(index)
        return source.value(own, name)

    def where(self, index: int) -> str:
        source, own = self.find(index)
        return source.where(own)

    def take(self, indices: np.ndarray, mark: Record) -> ConcatenatedSources:
        """Returns some of the records, in order; `mark` is added to the fingerprints."""
        ends = [*self.begins[1:], self.size]
        own = [
            indices[(indices >= begin) & (indices < end)] - begin
            for begin, end in zip(self.begins, ends, strict=True)
        ]
        return ConcatenatedSources(
            {
                name: Selected(part, kept, mark)
                for (name, part), kept in zip(self.parts.items(), own, strict=True)
            }
        )

    def fingerprint(self) -> Record:
        return {name: source.fingerprint() for name, source in self.parts.items()}


def take(source: Source, indices: np.ndarray, mark: Record) -> Source:
    """Returns some records of a source, in order; concatenated sources stay concatenated.

    `mark` is added to fingerprints.
    """
    return (
        source.take(indices, mark)
        if isinstance(source, ConcatenatedSources)
        else Selected(source, indices, mark)
    )


class Bundle:
    """The training data of a mixture of tasks: a source for each part."""

    def __init__(self, parts: Mapping[str, Source]):
        self.parts = parts

    def fingerprint(self) -> Record:
        return {part: source.fingerprint() for part, source in self.parts.items()}
