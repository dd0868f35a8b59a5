"""Records in local files: plain text, JSON lines, CSV and TSV, each also gzipped, always UTF-8.

Files are mapped into memory (or unpacked into it), checked once when opened, and read by a table of offsets.
"""

from __future__ import annotations

import csv
import functools
import glob
import gzip
import hashlib
import json
import mmap
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax.data.records import Record
from fmjax.errors import UserError, nearest

ENDINGS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}
BOM = b"\xef\xbb\xbf"
RECORDS = ("paragraph", "line", "file")
REST = "..."  # as the last of `columns`: rows may have more fields, which are not read

csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 128 kB


def kind_of(path: Path) -> str | None:
    """Returns the kind that a file's ending stands for, or None."""
    return ENDINGS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)


def find_files(files: str | Sequence[str], kind: str = "") -> list[Path]:
    """Returns the files that are meant: a path, several joined by commas, a glob, or a folder.

    Of a folder, those with an ending of the kind (of any kind, if none is given), except licences and readmes.
    Raises UserError, naming what is there, if one is missing.
    """
    if isinstance(files, str):
        files = [files] if Path(files).expanduser().exists() else [part.strip() for part in files.split(",") if part.strip()]
    return [path for part in files for path in expand(Path(part).expanduser(), kind)]


def expand(path: Path, kind: str) -> list[Path]:
    """Returns the files of one path, glob or folder. Raises UserError if there are none."""
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.is_file() and is_data(file, kind)]
        if not found:
            endings = ", ".join(ending for ending, name in ENDINGS.items() if kind in ("", name))
            raise UserError(f"{path}: the folder has no file that ends in {endings} (.gz may follow); name the files")
        return found
    if glob.has_magic(str(path)):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not found:
            raise UserError(f"{path}: no file matches; correct the pattern")
        return found
    if not path.parent.is_dir():
        raise UserError(f"{path}: no such file, nor the folder {path.parent}; correct the path")
    there = sorted(file.name for file in path.parent.iterdir())
    listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") if there else "nothing"
    raise UserError(f"{path}: no such file{nearest(path.name, there)}; the folder has {listed}")


def is_data(file: Path, kind: str) -> bool:
    """Returns whether a file in a folder is one of its data files."""
    known = kind_of(file)
    return known is not None and kind in ("", known) and not file.name.upper().startswith(("LICENSE", "README", "."))


class File:
    """The bytes of a file, pickled by its path. Raises UserError if it cannot be read."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.data = contents(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); correct the file") from error
        except (EOFError, zlib.error) as error:
            raise UserError(f"{path}: is not a whole gzip file ({error}); fetch it again") from error

    def __reduce__(self) -> tuple[type[File], tuple[Path]]:
        return File, (self.path,)

    @functools.cached_property
    def fingerprint(self) -> Record:
        with self.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"name": self.path.name, "size": self.path.stat().st_size, "sha256": digest}


def contents(path: Path) -> bytes | mmap.mmap:
    """Returns a file's bytes, mapped; those of a .gz file unpacked."""
    if path.suffix == ".gz":
        with gzip.open(path) as packed:
            return packed.read()
    with path.open("rb") as stream:
        # An empty file cannot be mapped.
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


class Line(NamedTuple):
    """A line of a file: its offsets, its number from 1, and its text with the line break."""

    begin: int
    end: int
    number: int
    text: str


def lines(file: File) -> Iterator[Line]:
    """Yields the lines of a file. Raises UserError, naming the line, if one is not UTF-8."""
    begin, number = len(BOM) if file.data[: len(BOM)] == BOM else 0, 0
    while begin < len(file.data):
        number += 1
        end = file.data.find(b"\n", begin) + 1 or len(file.data)
        try:
            text = file.data[begin:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file.path} line {number}: is not UTF-8 (byte 0x{error.object[error.start]:02x}); "
                "convert the file, for example with iconv -t UTF-8"
            ) from error
        yield Line(begin, end, number, text)
        begin = end


class RecordFiles:
    """Records in files of one kind. A kind says where its records stand (`scan`) and what they hold (`parse`).

    Raises UserError if a file is malformed, naming the line, or there is no record.
    """

    kind = ""
    columns: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[Path], split: str):
        self.split = split
        self.files = [File(path) for path in paths]
        spans = array("q")
        for number, file in enumerate(self.files):
            for begin, end, line in self.scan(file):
                spans.extend((number, begin, end, line))
        self.spans = np.array(spans, np.int64).reshape(-1, 4)
        if not len(self.spans):
            raise UserError(f"{', '.join(str(path) for path in paths)}: no records for {split}; give a file that is not empty")
        self.fingerprint()  # before anything can change

    def scan(self, file: File) -> Iterator[tuple[int, int, int]]:
        """Yields the begin, end and first line of each record."""
        raise NotImplementedError

    def parse(self, text: str, index: int) -> Record:
        """Returns the record that a text of the file holds."""
        raise NotImplementedError

    def options(self) -> Record:
        """Returns the options that the records depend on."""
        return {}

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Record:
        number, begin, end, _ = self.spans[index].tolist()
        return self.parse(self.files[number].data[begin:end].decode("utf-8"), index)

    def where(self, index: int) -> str:
        number, _, _, line = self.spans[index].tolist()
        return f"{self.files[number].path.name} line {line}"

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

    def scan(self, file: File) -> Iterator[tuple[int, int, int]]:
        begin = end = first = 0  # of the record that is being gathered, first line 0: none
        for line in lines(file):
            if line.text.strip():
                if not first:
                    begin, first = line.begin, line.number
                end = line.end
            ended = self.record == "line" or (self.record == "paragraph" and not line.text.strip())
            if first and ended:
                yield begin, end, first
                first = 0
        if first:
            yield begin, end, first

    def parse(self, text: str, index: int) -> Record:
        if self.record == "file":
            return {"text": text.replace("\r\n", "\n")}
        return {"text": " ".join(line.strip() for line in text.strip().split("\n"))}

    def where(self, index: int) -> str:
        return self.files[int(self.spans[index, 0])].path.name if self.record == "file" else super().where(index)


class JsonLines(RecordFiles):
    """A JSON object a line; the columns are the keys of the first. Blank lines are left out."""

    kind = "jsonl"

    def scan(self, file: File) -> Iterator[tuple[int, int, int]]:
        for line in lines(file):
            if not line.text.strip():
                continue
            try:
                record = json.loads(line.text)
                if "\\u" in line.text:
                    json.dumps(record, ensure_ascii=False).encode("utf-8")
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{file.path} line {line.number}: is not JSON ({error}); correct the line") from error
            except UnicodeEncodeError as error:
                raise UserError(f"{file.path} line {line.number}: has half of a surrogate pair; correct the line") from error
            if not isinstance(record, dict):
                raise UserError(f"{file.path} line {line.number}: is not a JSON object {{...}}; write one record a line")
            self.columns = self.columns or tuple(record)
            yield line.begin, line.end, line.number

    def parse(self, text: str, index: int) -> Record:
        record = json.loads(text)
        for name in self.columns:
            if name not in record:
                raise UserError(f'{self.where(index)}: lacks "{name}", which the first record has; correct the line')
        return {name: record[name] for name in self.columns}


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

    def scan(self, file: File) -> Iterator[tuple[int, int, int]]:
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
            if len(row) < len(self.columns) or (len(row) > len(self.columns) and not self.open_end):
                raise UserError(self.ragged(place, row))
            yield begin, end, line

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
        if self.kind == "tsv":
            for line in lines(file):
                if line.text.strip("\r\n"):
                    yield line.begin, line.end, line.number, self.fields(line.text)
            return
        last = Line(0, 0, 0, "")

        def feed() -> Iterator[str]:
            nonlocal last
            for last in lines(file):
                yield last.text

        reader = csv.reader(feed(), strict=True)
        while True:
            begin, number = last.end or (len(BOM) if file.data[: len(BOM)] == BOM else 0), last.number + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(
                    f"{file.path} line {number}: is not CSV ({error}); quote fields as RFC 4180 says, or use tsv"
                ) from error
            if row:
                yield begin, last.end, number, row

    def fields(self, text: str) -> list[str]:
        if self.kind == "tsv":
            return text.rstrip("\r\n").split("\t")
        return next(csv.reader([text], strict=True))

    def parse(self, text: str, index: int) -> Record:
        return dict(zip(self.columns, self.fields(text), strict=not self.open_end))


def open_files(kind: str, paths: Sequence[Path], split: str, **options: Any) -> RecordFiles:
    """Returns the records of files of a kind: text, jsonl, csv or tsv. Raises UserError for what is malformed."""
    if kind == "text":
        return Text(paths, split, **options)
    return JsonLines(paths, split) if kind == "jsonl" else Table(paths, split, kind, **options)
