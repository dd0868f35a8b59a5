"""Parts of files, in TFDS's manner: `input.txt[:90%]` and `input.txt[90%:]`.

What stands in `[BEGIN:END]` counts records, or characters where a record is a whole file, through all the files that are
meant; with a % it is a share of them, rounded down, so that two parts that meet have everything once. A minus counts from
the end, and what is left out is the beginning or the end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax.data.records import Record, Source, Subset
from fmjax.errors import UserError

# Brackets without a colon or a per cent sign are a glob's.
PART = re.compile(r"\[([^\[\]]*[:%][^\[\]]*)\]$")
BOUND = r"(-?((100|\d{1,2}(\.\d+)?)%|\d+))?"
BOUNDS = re.compile(f"(?P<begin>{BOUND}):(?P<end>{BOUND})")


class Slice(NamedTuple):
    """A part of files as it was written, and its two bounds: numbers, shares with a %, or nothing."""

    written: str
    begin: str
    end: str

    def span(self, count: int, unit: str) -> tuple[int, int]:
        """Returns the first and the one-past-last of `count` units. Raises UserError if that is nothing, or beyond them."""
        begin = place(self.begin, count) if self.begin else 0
        end = place(self.end, count) if self.end else count
        if not 0 <= begin < end <= count:
            raise UserError(f"{self.written}: is not a part of the {count:,} {unit} there are; give one that holds some of them")
        return begin, end

    @property
    def mark(self) -> Record:
        return {"slice": f"[{self.begin}:{self.end}]"}


def place(bound: str, count: int) -> int:
    """Returns where a bound lies among `count`."""
    size = bound.lstrip("-")
    offset = int(Fraction(size[:-1]) * count / 100) if size.endswith("%") else int(size)
    return count - offset if bound.startswith("-") else offset


def split_slice(files: str | Sequence[str]) -> tuple[str | Sequence[str], Slice | None]:
    """Returns the files without the part that is meant of them, and that part, or None.

    Raises UserError for a part that is malformed, or stands at one of several names.
    """
    whole = isinstance(files, str) and Path(files).expanduser().exists()
    names = [name.strip() for name in files.split(",")] if isinstance(files, str) and not whole else list(files)
    cut = [] if whole else [name for name in names if PART.search(name) and not Path(name).expanduser().exists()]
    if not cut:
        return files, None
    if len(names) > 1:
        raise UserError(f"{cut[0]}: a part is of one file, glob or folder; name the {len(names)} by a glob, or leave it out")
    written = cut[0]
    found = PART.search(written)
    assert found
    bounds = BOUNDS.fullmatch(found[1].replace(" ", ""))
    if not bounds:
        raise UserError(f"{written}: [{found[1]}] is not a part; write [BEGIN:END] with numbers or shares, as [:90%] or [1000:]")
    return written[: found.start()], Slice(written, bounds["begin"], bounds["end"])


def part(source: Source, wanted: Slice) -> Source:
    """Returns some of a source's records, consecutive ones."""
    begin, end = wanted.span(len(source), "records")
    return Subset(source, np.arange(begin, end), wanted.mark)


class Characters:
    """Some of the characters of a source's column `text`, counted through all records; at most two records are cut."""

    def __init__(self, source: Source, wanted: Slice):
        self.source, self.mark = source, wanted.mark
        lengths = np.array([len(source[index]["text"]) for index in range(len(source))], np.int64)
        ends = lengths.cumsum()
        begins = ends - lengths
        begin, end = wanted.span(int(ends[-1]), "characters")
        self.indices = np.flatnonzero((ends > begin) & (begins < end))
        self.spans = np.stack([np.maximum(begin - begins, 0), np.minimum(end - begins, lengths)], axis=1)[self.indices]

    @property
    def columns(self) -> tuple[str, ...]:
        return self.source.columns

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        record = self.source[int(self.indices[index])]
        return record | {"text": record["text"][slice(*self.spans[index].tolist())]}

    def where(self, index: int) -> str:
        return self.source.where(int(self.indices[index]))

    def fingerprint(self) -> Record:
        return self.source.fingerprint() | self.mark
