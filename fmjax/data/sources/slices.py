"""Parts of files, in TFDS's notation: `input.txt[:90%]` and `input.txt[90%:]`.

`[BEGIN:END]` counts records, or characters if a record is a whole file, through all files; with a %
it is a fraction of them, rounded down, so that adjacent parts neither overlap nor leave a gap. A
minus sign counts from the end; a missing bound is the beginning or the end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax.contracts import Record, Source
from fmjax.data.records import RecordSource, Selected
from fmjax.errors import UserError

# Brackets without a colon or a per cent sign are a glob's.
PART = re.compile(r"\[([^\[\]]*[:%][^\[\]]*)\]$")
BOUND = r"(-?((100|[0-9]{1,2}(\.[0-9]+)?)%|[0-9]+))?"
BOUNDS = re.compile(f"(?P<begin>{BOUND}):(?P<end>{BOUND})")


class Slice(NamedTuple):
    """A part of files as the user wrote it, and its two bounds: numbers, percentages, or
    nothing."""

    written: str
    begin: str
    end: str

    def span(self, count: int, unit: str) -> tuple[int, int]:
        """Returns the first and the one-past-last of `count` units.

        Raises UserError if that is empty or out of range.
        """
        begin = place(self.begin, count) if self.begin else 0
        end = place(self.end, count) if self.end else count
        if not 0 <= begin < end <= count:
            raise UserError(
                f"{self.written}: selects none of the {count:,} {unit}; choose a part that "
                "contains some"
            )
        return begin, end

    @property
    def mark(self) -> Record:
        return {"slice": f"[{self.begin}:{self.end}]"}


def place(bound: str, count: int) -> int:
    """Returns the index of a bound among `count` units."""
    size = bound.lstrip("-")
    offset = int(Fraction(size[:-1]) * count / 100) if size.endswith("%") else int(size)
    return count - offset if bound.startswith("-") else offset


def split_slice(files: str | Sequence[str]) -> tuple[str | Sequence[str], Slice | None]:
    """Returns the files without the part, and the part or None.

    Raises UserError for a malformed part, or a part of one of several names.
    """
    whole = isinstance(files, str) and Path(files).expanduser().exists()
    names = (
        [name.strip() for name in files.split(",")]
        if isinstance(files, str) and not whole
        else list(files)
    )
    cut = (
        []
        if whole
        else [name for name in names if PART.search(name) and not Path(name).expanduser().exists()]
    )
    if not cut:
        return files, None
    if len(names) > 1:
        raise UserError(
            f"{cut[0]}: a part applies to one file, glob or folder; match the {len(names)} files "
            "with a glob, or leave the part out"
        )
    written = cut[0]
    match = PART.search(written)
    assert match
    bounds = BOUNDS.fullmatch(match[1].replace(" ", ""))
    if not bounds:
        raise UserError(
            f"{written}: [{match[1]}] is not a part; write [BEGIN:END] with numbers or "
            "percentages, such as [:90%] or [1000:]"
        )
    return written[: match.start()], Slice(written, bounds["begin"], bounds["end"])


def part(source: Source, wanted: Slice) -> Source:
    """Returns consecutive records of a source."""
    begin, end = wanted.span(len(source), "records")
    return Selected(source, range(begin, end), wanted.mark)


class Characters(RecordSource):
    """Consecutive characters of a source's column `text`, counted through all records; at most two
    records are cut, so these are not records of the source (`Selected`)."""

    def __init__(self, source: Source, wanted: Slice):
        lengths = (len(source.value(index, "text")) for index in range(len(source)))
        ends = np.fromiter(lengths, np.int64, len(source)).cumsum()
        begin, end = wanted.span(int(ends[-1]), "characters")
        first, last = (int(np.searchsorted(ends, place, "right")) for place in (begin, end - 1))
        self.whole = Selected(source, range(first, last + 1), wanted.mark)
        self.columns = source.columns
        # The characters before the first record, and before the last one.
        before = [int(ends[number - 1]) if number else 0 for number in (first, last)]
        self.begin, self.end = begin - before[0], end - before[1]

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        record = self.whole[index]
        begin = self.begin if index == 0 else 0
        end = self.end if index == len(self) - 1 else None
        return record | {"text": record["text"][begin:end]}

    def where(self, index: int) -> str:
        return self.whole.where(index)

    def fingerprint(self) -> Record:
        return self.whole.fingerprint()
