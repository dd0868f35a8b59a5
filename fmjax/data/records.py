"""What a source of records is, and what holds for every kind: which columns there are, and holding some records out."""

from __future__ import annotations

from collections.abc import Iterable
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


def hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """Returns a source without a share of its records, and that share, chosen by a hash of the records' numbers.

    Raises UserError unless the share lies between 0 and 1 and leaves both sides a record.
    """
    count = round(share * len(source)) if 0 < share < 1 else 0
    if not 0 < count < len(source):
        raise UserError(
            f"data.hold_out={share} of {len(source)} records leaves nothing on one side; "
            "choose a share between 0 and 1 that leaves records on both, or give data.files.validation"
        )
    order = np.argsort(scrambled(len(source)), kind="stable")
    rest, held = np.sort(order[count:]), np.sort(order[:count])
    return Subset(source, rest, {"hold_out": share, "part": "rest"}), Subset(source, held, {"hold_out": share, "part": "held"})


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

    def where(self, index: int) -> str:
        return self.source.where(int(self.indices[index]))

    def fingerprint(self) -> Record:
        return self.source.fingerprint() | self.mark
