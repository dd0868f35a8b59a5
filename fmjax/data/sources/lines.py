"""Records in local files: plain text, JSON lines, CSV and TSV, each also packed (.gz, .xz, .bz2, .zst), always UTF-8.

Files are mapped into memory, checked once when opened, and read by a table of offsets, 16 bytes a record.
"""

from __future__ import annotations

import csv
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.data.records import Record, chosen, json_object, locate
from fmjax.data.storage.mapped import File, Line, lines, not_utf8
from fmjax.data.stream.tolerance import tolerates
from fmjax.errors import UserError, nearest

FIELD = r'(?:"[^"]*(?:""[^"]*)*"|[^",\r\n]*)'
CLEAN = re.compile(rf"{FIELD}(?:,{FIELD})*[\r\n]*")  # a row of CSV with no quotes but those of RFC 4180
RECORDS = ("paragraph", "line", "file")
REST = "..."  # as the last of `columns`: rows may have more fields, which are not read

csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 128 kB


class RecordFiles:
    """Records in files of one kind. A kind says where its records stand (`scan`) and what they hold (`parse`).

    Raises UserError if a file is malformed, naming the line, or has no record.
    """

    kind = ""
    columns: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[Path], split: str):
        self.split = split
        self.files = [File(path) for path in paths]
        begins, ends, bounds = array("q"), array("q"), [0]
        for file in self.files:
            for begin, end in self.scan(file):
                begins.append(begin)
                ends.append(end)
            if len(begins) == bounds[-1]:
                raise UserError(f"{file.path}: no records for {split}; give a file that is not empty")
            bounds.append(len(begins))
        # Where each record begins and ends, and the number of records before each file, [files + 1].
        self.begins, self.ends, self.bounds = np.array(begins, np.int64), np.array(ends, np.int64), np.array(bounds)
        self.fingerprint()  # before anything can change

    def scan(self, file: File) -> Iterator[tuple[int, int]]:
        """Yields the begin and end of each record."""
        raise NotImplementedError

    def parse(self, text: str, index: int) -> Record:
        """Returns the record that a text of the file holds."""
        raise NotImplementedError

    def options(self) -> Record:
        """Returns the options that the records depend on."""
        return {}

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> Record:
        file, begin, end = self.place(index)
        try:
            text = file.data[begin:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(index)}: {not_utf8(error)}") from error
        return self.parse(text, index)

    def place(self, index: int) -> tuple[File, int, int]:
        """Returns the file of a record, and where in it the record begins and ends."""
        number, _ = locate(self.bounds, index)
        return self.files[number], int(self.begins[index]), int(self.ends[index])

    def where(self, index: int) -> str:
        file, begin, _ = self.place(index)
        return f"{file.path.name} line {file.line_at(begin)}"

    def fingerprint(self) -> Record:
        files = [file.fingerprint for file in self.files]
        return {"source": self.kind, "split": self.split, **self.options(), "files": files}


class Text(RecordFiles):
    """Texts as `{"text": ...}`: a paragraph (lines up to a blank one, joined by spaces), a line, or a whole file each.

    Blank ones are left out.
    """

    kind = "text"
    columns = ("text",)

    def __init__(self, paths: Sequence[Path], split: str, record: str = "paragraph"):
        if record not in RECORDS:
            raise UserError(f'data.record="{record}"{nearest(record, RECORDS)}: choose one of {", ".join(RECORDS)}')
        self.record = record
        super().__init__(paths, split)

    def options(self) -> Record:
        return {"record": self.record}

    def scan(self, file: File) -> Iterator[tuple[int, int]]:
        begin = end = 0  # of the record that is being gathered; equal: there is none
        for line in lines(file):
            if line.text.strip():
                begin = line.begin if begin == end else begin
                end = line.end
            ended = self.record == "line" or (self.record == "paragraph" and not line.text.strip())
            if begin < end and ended:
                yield begin, end
                begin = end
        if begin < end:
            yield begin, end

    def parse(self, text: str, index: int) -> Record:
        if self.record == "file":
            return {"text": text.replace("\r\n", "\n")}
        return {"text": " ".join(line.strip() for line in text.strip().split("\n"))}

    def where(self, index: int) -> str:
        return self.place(index)[0].path.name if self.record == "file" else super().where(index)


class JsonLines(RecordFiles):
    """A JSON object a line; the columns are the keys of the first. Blank lines are left out."""

    kind = "jsonl"

    def scan(self, file: File) -> Iterator[tuple[int, int]]:
        for line in lines(file):
            if not line.text.strip():
                continue
            try:
                record = json_object(line.text)
                self.columns = self.columns or tuple(record)
            except ValueError as error:
                if not tolerates():
                    raise UserError(f"{file.path} line {line.number}: {error}; write one record a line") from error
            yield line.begin, line.end

    def parse(self, text: str, index: int) -> Record:
        try:
            record = json_object(text)
        except ValueError as error:
            raise UserError(f"{self.where(index)}: {error}; write one record a line") from error
        return chosen(record, self.columns, self.where, index)


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

    def scan(self, file: File) -> Iterator[tuple[int, int]]:
        header = not self.named
        for begin, end, line, row in self.rows(file):
            place = f"{file.path} line {line}"
            if header:
                header = False
                if self.columns and tuple(row) != self.columns:
                    names, others = ", ".join(row), ", ".join(self.columns)
                    raise UserError(f"{place}: the columns are {names}, but those of {self.files[0].path.name} are {others}")
                self.columns = tuple(row)
                self.check_names(place)
                continue
            if not self.fits(row) and not tolerates():
                raise UserError(self.ragged(place, row))
            yield begin, end

    def fits(self, row: list[str]) -> bool:
        return len(row) == len(self.columns) or (len(row) > len(self.columns) and self.open_end)

    def check_names(self, place: str) -> None:
        for name in self.columns:
            if self.columns.count(name) > 1:
                raise UserError(f'{place}: two columns have the name "{name}"; rename one')

    def ragged(self, place: str, row: list[str]) -> str:
        message = f"{place}: has {len(row)} fields, not the {len(self.columns)} of {', '.join(self.columns)}"
        if self.kind == "csv" and "\t" in row[0]:
            return f"{message}; the file seems to be separated by tabs: --config.data.source=tsv"
        if len(row) > len(self.columns):
            return f'{message}; correct the row, or name the columns in data.columns and end with "{REST}" to leave out the rest'
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
        """Yields the same of CSV; where bad records may be left out, no fields for a row that is malformed.

        Raises UserError if one is and may not be left out, is the header, or cannot be told from what follows.
        """
        first: Line | None = None  # of the row that is being read
        last = Line(0, 0, 0, "")

        def feed(after: Line | None) -> Iterator[str]:
            nonlocal first, last
            for last in lines(file, after):
                first = first or last
                yield last.text

        reader, after_header = csv.reader(feed(None), strict=True), bool(self.named)
        doubt, until = "", 0  # what is wrong with a row that may have swallowed others, up to there
        while True:
            first = None
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                assert first
                doubt, until = not_csv(f"{file.path} line {first.number}", error), max(until, last.end)
                if not after_header or not tolerates():
                    raise UserError(doubt) from error
                # A quote that is not closed makes one row of many. It is taken for its first line if those after it are rows.
                yield first.begin, first.end, first.number, []
                reader, last = csv.reader(feed(first), strict=True), first
                continue
            if not row:
                continue
            assert first
            if doubt and not self.is_sound(file, first.begin, last.end, row):
                raise UserError(f"{doubt}; it cannot be left out, for where it ends cannot be told from line {first.number}")
            doubt = doubt if last.end < until else ""
            after_header = True
            yield first.begin, last.end, first.number, row

    def is_sound(self, file: File, begin: int, end: int, row: list[str]) -> bool:
        """Returns whether what stands after a bad row looks like another, and not like the rest of it: its fields are as many as
        they are to be, more than one, and its quotes in their places. The last line of a text of several that lacks its closing
        quote can look so too, and is then a row."""
        return len(row) > 1 and self.fits(row) and CLEAN.fullmatch(file.data[begin:end].decode("utf-8", "replace")) is not None

    def fields(self, text: str) -> list[str]:
        if self.kind == "tsv":
            return text.rstrip("\r\n").split("\t")
        return next(csv.reader([text], strict=True))

    def parse(self, text: str, index: int) -> Record:
        try:
            row = self.fields(text)
        except csv.Error as error:
            raise UserError(not_csv(self.where(index), error)) from error
        if not self.fits(row):
            raise UserError(self.ragged(self.where(index), row))
        return dict(zip(self.columns, row, strict=not self.open_end))


def not_csv(place: str, error: csv.Error) -> str:
    return f"{place}: is not CSV ({error}); quote fields as RFC 4180 says, or use tsv"


def open_files(kind: str, paths: Sequence[Path], split: str, **options: Any) -> RecordFiles:
    """Returns the records of files of a kind: text, jsonl, csv or tsv. Raises UserError for what is malformed."""
    if kind == "text":
        return Text(paths, split, **options)
    return JsonLines(paths, split) if kind == "jsonl" else Table(paths, split, kind, **options)
