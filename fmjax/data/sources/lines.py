"""Text and JSON lines files in UTF-8, optionally compressed (.gz, .xz, .bz2, .zst).

Files are memory-mapped. The first time, they are read and checked as a whole; the offsets of their
records are kept in an index (`storage/index.py`), which is memory-mapped, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fmjax.contracts import Record
from fmjax.data.characters import is_blank
from fmjax.data.records import RecordSource, fill_columns, json_object, locate
from fmjax.data.sources import json_blocks
from fmjax.data.sources.kinds import SourceKind
from fmjax.data.storage.index import Index, Rows
from fmjax.data.storage.line_scan import filled_lines, paragraphs
from fmjax.data.storage.mapped import BOM, MEGABYTE, File, Line, lines, not_utf8, open_files
from fmjax.data.stream.tolerance import tolerates
from fmjax.errors import RecordError, UserError, one_of

HELD = 32 * MEGABYTE  # of text that is parsed at once, at most
RECORDS = ("paragraph", "line", "file")
ONE_A_LINE = "write one record per line"


class RecordFiles(RecordSource):
    """Records in files of one kind. A subclass finds the records (`scan`) and parses them
    (`parse`). If other records are found in the same bytes than before, raise its `version`.

    Raises UserError if a file is malformed, naming the line, or has no record.
    """

    kind = ""
    version = 1

    def __init__(self, paths: Sequence[Path], split: str):
        self.split = split
        self.files = open_files(paths)
        reader = f"{type(self).__module__}.{type(self).__qualname__}.{self.kind}"
        options = {"version": self.version, **self.options()}
        self.places: list[Index] = []  # the begin and end of the records of each file
        for file in self.files:
            found = file.index(reader, options, 2, partial(self.scan, file))
            self.use(file, found.facts)
            if not len(found):
                raise UserError(
                    f"{file.path}: no records for {split}; use a file that is not empty"
                )
            self.places.append(found)
        # The number of records before each file, [files + 1].
        self.bounds = np.cumsum([0, *map(len, self.places)])
        self.fingerprint()  # computed now, before the files can change

    def scan(self, file: File, facts: Record) -> Iterator[Rows]:
        """Yields the begin and end of a record, or of many, and adds what else it finds to
        `facts`."""
        raise NotImplementedError

    def use(self, file: File, facts: Record) -> None:
        """Uses the facts of a file that was scanned, now or earlier."""

    def parse(self, text: str, index: int) -> Record:
        """Returns the record in a text of the file."""
        raise NotImplementedError

    def options(self) -> Record:
        """Returns the options that the records depend on."""
        return {}

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: int) -> Record:
        file, begin, end = self.place(index)
        try:
            text = file.text(begin, end)
        except UnicodeDecodeError as error:
            raise RecordError(self.where(index), not_utf8(error), index) from error
        return self.parse(text, index)

    def place(self, index: int) -> tuple[File, int, int]:
        """Returns the file of a record, and the record's begin and end in it."""
        number, row = locate(self.bounds, index)
        begin, end = self.places[number].rows[row].tolist()
        return self.files[number], begin, end

    def block(self, indices: np.ndarray) -> list[Record] | None:
        """Returns some records; None if they are few of those around them, too large to be in
        memory together, or one of them may be bad."""
        found: list[Record] = []
        owner = np.searchsorted(self.bounds, indices, side="right") - 1
        for number in np.unique(owner).tolist():
            own = indices[owner == number] - self.bounds[number]
            first, last = int(own[0]), int(own[-1]) + 1
            places = self.places[number].rows[first:last].astype(np.int64)
            if len(places) > 2 * len(own) or places[-1, 1] - places[0, 0] > HELD:
                return None
            read = self.parse_block(self.files[number], places)
            if read is None:
                return None
            found += read if len(read) == len(own) else map(read.__getitem__, own - first)
        return found

    def parse_block(self, file: File, places: np.ndarray) -> list[Record] | None:
        """Returns consecutive records of a file, `places [N, 2]`; None if one may be bad."""
        try:
            return [self.parse(text, 0) for text in block_texts(file, places)]
        except (UnicodeDecodeError, RecordError):
            return None

    def where(self, index: int) -> str:
        file, begin, _ = self.place(index)
        return f"{file.path.name} line {file.line_at(begin)}"

    def fingerprint(self) -> Record:
        files = [file.fingerprint for file in self.files]
        return {"source": self.kind, "split": self.split, **self.options(), "files": files}


def block_texts(file: File, places: np.ndarray) -> list[str]:
    """Returns consecutive records of a file as text. Raises UnicodeDecodeError if one is not
    UTF-8."""
    first = int(places[0, 0])
    content = file.read(first, int(places[-1, 1]))
    if content.isascii():  # so that bytes are characters
        whole = file.as_text(content)
        return [whole[begin:end] for begin, end in (places - first).tolist()]
    return [file.as_text(content[begin:end]) for begin, end in (places - first).tolist()]


class Text(RecordFiles):
    """Texts as `{"text": ...}`: each a paragraph (lines up to a blank one, joined by spaces), a
    line, or a whole file.

    Blank ones are left out.
    """

    kind = "text"
    columns = ("text",)

    def __init__(self, paths: Sequence[Path], split: str, record: str = "paragraph"):
        one_of("data.record", record, RECORDS)
        self.record = record
        super().__init__(paths, split)

    def options(self) -> Record:
        return {"record": self.record}

    def scan(self, file: File, facts: Record) -> Iterator[Rows]:
        if self.record == "paragraph":
            yield from paragraphs(file)
        elif self.record == "line":
            yield from filled_lines(file)
        elif found := [(part[0, 0], part[-1, 1]) for part in filled_lines(file) if part.size]:
            yield found[0][0], found[-1][1]

    def parse(self, text: str, index: int) -> Record:
        if self.record == "file":
            return {"text": text.replace("\r\n", "\n")}
        return {"text": " ".join(line.strip() for line in text.strip().split("\n"))}

    def where(self, index: int) -> str:
        return self.place(index)[0].path.name if self.record == "file" else super().where(index)


class JsonLines(RecordFiles):
    """One JSON object per line; the columns are the keys of all of them, and missing values are
    None.

    Blank lines are left out.
    """

    kind = "jsonl"

    def scan(self, file: File, facts: Record) -> Iterator[Rows]:
        known: Record = {}
        types: json_blocks.Types = {}
        last = Line(0, len(BOM) if file.data[: len(BOM)] == BOM else 0, 0, "")
        while last.end < len(file.data):
            begin = last.end
            end = file.data.find(file.line_break, begin + MEGABYTE) + 1 or len(file.data)
            content = file.read(begin, end)
            found = json_blocks.objects(content)
            if found is None or json_blocks.table(content, found, types) is None:
                for line in lines(file, last):
                    last = line
                    if not is_blank(line.text):
                        known |= dict.fromkeys(self.keys(file, line))
                        yield line.begin, line.end
                    if line.end >= end:
                        break
                continue
            known |= dict.fromkeys(types)
            last = Line(begin, end, last.number + content.count(b"\n"), "")
            yield found + begin
        facts["columns"] = list(known)

    def keys(self, file: File, line: Line) -> Iterable[str]:
        """Returns the keys of an object. Raises RecordError if the line has none, and that is an
        error."""
        try:
            return json_object(line.text)
        except ValueError as error:
            if tolerates():
                return ()
            place = f"{file.path} line {line.number}"
            raise RecordError(place, f"{error}; {ONE_A_LINE}") from error

    def use(self, file: File, facts: Record) -> None:
        self.columns = tuple(dict.fromkeys((*self.columns, *facts["columns"])))

    def parse_block(self, file: File, places: np.ndarray) -> list[Record] | None:
        first = int(places[0, 0])
        content = file.read(first, int(places[-1, 1]))
        return json_blocks.records(content, len(places), self.columns) or super().parse_block(
            file, places
        )

    def parse(self, text: str, index: int) -> Record:
        try:
            record = json_object(text)
        except ValueError as error:
            raise RecordError(self.where(index), f"{error}; {ONE_A_LINE}", index) from error
        return fill_columns(record, self.columns)


SOURCES = (
    SourceKind("text", Text, options=("record",), extensions=(".txt", ".text", ".md")),
    SourceKind("jsonl", JsonLines, extensions=(".jsonl", ".ndjson")),
)
