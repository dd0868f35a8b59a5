"""Tables as text:

CSV files (RFC 4180) and TSV files (tabs, no quoting), also compressed, in UTF-8.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fmjax.contracts import Record
from fmjax.data.sources.kinds import SourceKind
from fmjax.data.sources.lines import RecordFiles, block_texts
from fmjax.data.storage.mapped import File, Line, lines
from fmjax.data.stream.tolerance import tolerates
from fmjax.errors import RecordError, UserError

FIELD = r'(?:"[^"]*(?:""[^"]*)*"|[^",\r\n]*)'
# A row of CSV whose quotes all follow RFC 4180.
CLEAN = re.compile(rf"{FIELD}(?:,{FIELD})*[\r\n]*")
REST = "..."  # as the last of `columns`: further fields of rows are not read

csv.field_size_limit(2**31 - 1)  # the default limit is 128 kB


class Table(RecordFiles):
    """Rows of a CSV file (RFC 4180) or a TSV file (tabs, no quoting), values as str.

    The first row names the columns, unless `columns` does.
    """

    def __init__(self, paths: Sequence[Path], split: str, kind: str, columns: Sequence[str] = ()):
        self.kind = kind
        self.named = tuple(columns)
        self.open_end = self.named[-1:] == (REST,)
        self.columns = self.named[:-1] if self.open_end else self.named
        self.check_names("data.columns")
        super().__init__(paths, split)

    def options(self) -> Record:
        return {"columns": list(self.named)} if self.named else {}

    def scan(self, file: File, facts: Record) -> Iterator[tuple[int, int]]:
        for begin, end, line, row in self.rows(file):
            if not self.named and not facts:
                facts |= {"columns": row, "line": line}
                self.use(file, facts)
                continue
            if not self.fits(row) and not tolerates():
                raise RecordError(f"{file.path} line {line}", self.ragged(row))
            yield begin, end

    def use(self, file: File, facts: Record) -> None:
        """Takes the columns from the header of a file.

        Raises UserError if they are not those of the first file, or two have the same name.
        """
        if not facts:
            return
        place, found = f"{file.path} line {facts['line']}", tuple(facts["columns"])
        if self.columns and found != self.columns:
            names, others = ", ".join(found), ", ".join(self.columns)
            raise UserError(
                f"{place}: the columns are {names}, but those of {self.files[0].path.name} "
                f"are {others}"
            )
        self.columns = found
        self.check_names(place)

    def fits(self, row: list[str]) -> bool:
        return len(row) == len(self.columns) or (len(row) > len(self.columns) and self.open_end)

    def check_names(self, place: str) -> None:
        for name in self.columns:
            if self.columns.count(name) > 1:
                raise UserError(f'{place}: two columns have the name "{name}"; rename one')

    def ragged(self, row: list[str]) -> str:
        """Returns the error message for a row with too many or too few fields."""
        message = f"has {len(row)} fields, not the {len(self.columns)} of {', '.join(self.columns)}"
        if self.kind == "csv" and "\t" in row[0]:
            return (
                f"{message}; the file seems to be separated by tabs: use --config.data.source=tsv"
            )
        if len(row) > len(self.columns):
            fix = f'name the columns in data.columns and end with "{REST}" to leave out the rest'
            return f"{message}; correct the row, or {fix}"
        return f"{message}; correct the row"

    def rows(self, file: File) -> Iterator[tuple[int, int, int, list[str]]]:
        """Yields the begin, end, first line and fields of each row; blank lines are left out."""
        if self.kind == "csv":
            yield from self.quoted_rows(file)
            return
        for line in lines(file):
            if line.text.strip("\r\n"):
                yield line.begin, line.end, line.number, self.fields(line.text)

    def quoted_rows(self, file: File) -> Iterator[tuple[int, int, int, list[str]]]:
        """Yields the same for CSV; if bad records may be skipped, a malformed row has no fields.

        Raises UserError if a malformed row may not be skipped, is the header, or has no clear end.
        """
        first: Line | None = None  # of the current row
        last = Line(0, 0, 0, "")

        def feed(after: Line | None) -> Iterator[str]:
            nonlocal first, last
            for last in lines(file, after):
                first = first or last
                yield last.text

        reader, after_header = csv.reader(feed(None), strict=True), bool(self.named)
        doubt: RecordError | None = None  # what is wrong with a row that may have swallowed others
        until = 0  # up to there
        while True:
            first = None
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                assert first
                doubt, until = (
                    RecordError(f"{file.path} line {first.number}", not_csv(error)),
                    max(until, last.end),
                )
                if not after_header or not tolerates():
                    raise doubt from error
                # An unclosed quote merges many rows into one. If the following lines are rows,
                # treat it as a single line.
                yield first.begin, first.end, first.number, []
                reader, last = csv.reader(feed(first), strict=True), first
                continue
            if not row:
                continue
            assert first
            if doubt and not self.is_sound(file, first.begin, last.end, row):
                raise UserError(
                    f"{doubt}; it cannot be skipped, because its end is unclear from line "
                    f"{first.number}"
                )
            doubt = doubt if last.end < until else None
            after_header = True
            yield first.begin, last.end, first.number, row

    def is_sound(self, file: File, begin: int, end: int, row: list[str]) -> bool:
        """Returns whether the row after a bad one looks like a separate row, not like the rest of
        the bad one.

        It has the right number of fields, more than one, and its quotes are in their places. The
        last line of a multi-line text without its closing quote can also look like that, and then
        counts as a row.
        """
        return (
            len(row) > 1
            and self.fits(row)
            and CLEAN.fullmatch(file.text(begin, end, "replace")) is not None
        )

    def fields(self, text: str) -> list[str]:
        if self.kind == "tsv":
            return text.rstrip("\r\n").split("\t")
        return next(csv.reader([text], strict=True))

    def parse_block(self, file: File, places: np.ndarray) -> list[Record] | None:
        if self.kind == "tsv":
            return super().parse_block(file, places)
        try:
            texts = block_texts(file, places)
            rows = list(csv.reader(texts, strict=True))
        except (UnicodeDecodeError, csv.Error):
            return None
        # A row with an open quote would have swallowed the next.
        if len(rows) != len(texts) or not all(map(self.fits, rows)):
            return None
        return [dict(zip(self.columns, row, strict=not self.open_end)) for row in rows]

    def parse(self, text: str, index: int) -> Record:
        try:
            row = self.fields(text)
        except csv.Error as error:
            raise RecordError(self.where(index), not_csv(error), index) from error
        if not self.fits(row):
            raise RecordError(self.where(index), self.ragged(row), index)
        return dict(zip(self.columns, row, strict=not self.open_end))


def not_csv(error: csv.Error) -> str:
    return f"is not CSV ({error}); quote fields as in RFC 4180, or use tsv"


SOURCES = (
    SourceKind("csv", partial(Table, kind="csv"), options=("columns",), extensions=(".csv",)),
    SourceKind("tsv", partial(Table, kind="tsv"), options=("columns",), extensions=(".tsv",)),
)
