"""Tar archives of texts: WebDataset, where files with the same name belong to one record, and JSON
lines.

An archive is memory-mapped and read by a table of offsets, 16 bytes per file and 8 per record. A
compressed one is decompressed once into the cache (`mapped.py`), since compressed files have no
random access.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from fmjax.contracts import Record
from fmjax.data.characters import BLANKS
from fmjax.data.records import RecordSource, columns_of, fill_columns, json_object, locate
from fmjax.data.sources.kinds import BY_CONTENT, NO, Files, SourceKind, first_path
from fmjax.data.storage.mapped import File
from fmjax.data.storage.paths import find_files, is_image
from fmjax.data.storage.tar import ARCHIVE_EXTENSIONS, BROKEN, hidden, members
from fmjax.errors import RecordError, UserError, nearest

# The content of a record's files, by extension: a text, an object whose keys become columns, a
# label.
PARTS = {"txt": "text", "text": "text", "json": "json", "cls": "label"}
LINES = ("jsonl", "ndjson")
ENDINGS = (*PARTS, *LINES)
PEEK = 100  # files that determine the kind of an archive; records whose keys become columns


class Part(NamedTuple):
    """A file in an archive: its name without its extension, its extension, and the offsets of its
    header, begin and end."""

    key: str
    ending: str
    head: int
    begin: int
    end: int


class Tar(RecordSource):
    """Records of archives: adjacent files `a.txt`, `a.json` and `a.cls` form one record, with the
    text as `text`, the object's keys, and the label as `label`. Each line of `a.jsonl` is a record.

    Raises UserError, naming the archive and the file in it, for an archive that is damaged or
    contains other files, and for a record that lacks a file of the first record.
    """

    def __init__(self, paths: Sequence[Path], split: str):
        self.split = split
        self.files = [File(path) for path in paths]
        self.endings: tuple[str, ...] = ()
        spans, heads, bounds, width = array("q"), array("q"), [0], 1
        for file in self.files:
            for record in self.scan(file):
                width = len(record)
                heads.append(record[0].head)
                for part in record:
                    spans.extend((part.begin, part.end))
            bounds.append(len(heads))
            if bounds[-1] == bounds[-2]:
                raise UserError(
                    f"{file.path}: no records for {split}; use an archive that is not empty"
                )
        # Begin and end of each file of a record, [records, files, 2], and the number of records
        # before each archive.
        self.spans, self.bounds = np.array(spans, np.int64).reshape(-1, width, 2), np.array(bounds)
        # [records]: where the header of a record's first file begins.
        self.heads = np.array(heads, np.int64)
        self.columns: tuple[str, ...] = ()
        self.columns = columns_of([self.read(0), *self.more_records()])
        self.fingerprint()  # computed now, before the files can change

    def more_records(self) -> Iterator[Record]:
        """Yields the first records if JSON objects define the columns. A bad record is only an
        error when it is read."""
        objects = any(PARTS.get(ending, "json") == "json" for ending in self.endings)
        for index in range(1, min(len(self), PEEK) if objects else 0):
            with contextlib.suppress(RecordError):
                yield self.read(index)

    def scan(self, file: File) -> Iterator[list[Part]]:
        """Yields the files of each record of an archive."""
        gathered: list[Part] = []
        for part in parts(file):
            if gathered and part.key != gathered[0].key:
                yield self.checked(gathered, file)
                gathered = []
            if part.ending in LINES:
                yield from ([line] for line in self.lines(part, file))
            else:
                gathered.append(part)
        if gathered:
            yield self.checked(gathered, file)

    def lines(self, part: Part, file: File) -> Iterator[Part]:
        """Yields the lines of JSON in a file of an archive."""
        self.checked([part], file)
        # A file without line feeds may have carriage returns instead (old Macs).
        line_break = b"\n" if file.data.find(b"\n", part.begin, part.end) >= 0 else b"\r"
        begin = part.begin
        while begin < part.end:
            end = file.data.find(line_break, begin, part.end) + 1 or part.end
            if file.data[begin:end].strip(BLANKS.encode()):
                yield part._replace(begin=begin, end=end)
            begin = end

    def checked(self, record: list[Part], file: File) -> list[Part]:
        """Returns the files of a record in the order of their endings.

        Raises UserError unless they are those of the first.
        """
        record = sorted(record, key=lambda part: part.ending)
        endings = tuple(part.ending for part in record)
        self.endings = self.endings or endings
        if endings != self.endings:
            found, expected = (
                ", ".join(f".{ending}" for ending in each) for each in (endings, self.endings)
            )
            raise UserError(
                f"{file.path}: {record[0].key} has {found}, but the first record has {expected}; "
                "every record needs the same files, one after the other"
            )
        return record

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Record:
        return fill_columns(self.read(index), self.columns)

    def read(self, index: int) -> Record:
        """Returns the content of a record's files.

        Raises RecordError if two have the same column.
        """
        file = self.files[locate(self.bounds, index)[0]]
        record: Record = {}
        for ending, (begin, end) in zip(self.endings, self.spans[index].tolist(), strict=True):
            try:
                text = file.data[begin:end].decode("utf-8").removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                what = f"is not UTF-8 (byte 0x{error.object[error.start]:02x})"
                problem = f"its .{ending} {what}; convert it, for example with iconv"
                raise RecordError(self.where(index), problem, index) from error
            try:
                found = values_of(text, PARTS.get(ending, "json"))
            except ValueError as error:
                raise RecordError(
                    self.where(index), f"its .{ending} {error}; correct it", index
                ) from error
            for name in found:
                if name in record:
                    problem = f'has "{name}" both in its .json and in a file of its own; remove one'
                    raise RecordError(self.where(index), problem, index)
            record |= found
        return record

    def where(self, index: int) -> str:
        file, head, begin = (
            self.files[locate(self.bounds, index)[0]],
            int(self.heads[index]),
            int(self.spans[index, 0, 0]),
        )
        with tarfile.open(fileobj=io.BytesIO(file.data[head:begin]), mode="r:") as archive:
            member = archive.next()
        assert member
        name = f"{file.path.name}: {member.name}"
        if self.endings[0] in LINES:
            return (
                f"{name} line {file.line_at(begin) - file.line_at(head + member.offset_data) + 1}"
            )
        return name.rpartition(".")[0]

    def fingerprint(self) -> Record:
        return {
            "source": "tar",
            "split": self.split,
            "files": [file.fingerprint for file in self.files],
        }


def values_of(text: str, kind: str) -> Record:
    """Returns the columns of one of a record's files.

    Raises ValueError if it should be a JSON object but is not.
    """
    if kind == "json":
        return json_object(text)
    return {kind: text.strip(BLANKS) if kind == "label" else text.replace("\r\n", "\n")}


def parts(file: File) -> Iterator[Part]:
    """Yields the files of an archive in order, without folders and files that operating systems
    leave behind.

    Raises UserError, naming the file, for one that does not belong there, and if the archive is
    damaged.
    """
    for member in members(file):
        if not member.isdir() and not hidden(PurePosixPath(member.name)):
            yield as_part(member, f"{file.path}: {member.name}")


def as_part(member: tarfile.TarInfo, where: str) -> Part:
    """Returns a file of an archive.

    Raises UserError, naming it, if it is not a regular file or not of a supported kind.
    """
    if not member.isreg() or member.issparse():
        raise UserError(
            f"{where}: is a link, a device or sparse, not a file; replace it with the file itself"
        )
    folder, _, base = member.name.rpartition("/")
    stem, _, ending = base.rpartition(".")
    ending = ending.lower()
    if ending not in ENDINGS:
        if is_image(base):
            hint = (
                "images are read from archives of class folders, --config.data.source=class_folders"
            )
        else:
            hint = f"put files of {', '.join(f'.{each}' for each in ENDINGS)} there only"
        raise UserError(
            f"{where}: ends in .{ending}{nearest(ending, ENDINGS)}, which is not supported; {hint}"
        )
    begin = member.offset_data
    return Part(
        f"{folder}/{stem}" if folder else stem, ending, member.offset, begin, begin + member.size
    )


def holds_texts(path: Path) -> bool:
    """Returns whether an archive contains texts: among its first files are texts, but no images (a
    text beside images may be a readme). False if it cannot be read."""
    found = False
    if not path.name.lower().endswith(ARCHIVE_EXTENSIONS):
        return found
    try:
        with tarfile.open(path, "r|*") as archive:
            names = (PurePosixPath(member.name) for member in archive if member.isreg())
            for name in itertools.islice(names, PEEK):
                if is_image(name.name) and not hidden(name):
                    return False
                found = found or (name.suffix[1:].lower() in ENDINGS and not hidden(name))
    except BROKEN:
        pass
    return found


def is_text_archive(files: Files) -> int:
    """Returns the certainty that files are archives of texts, judged by the first one."""
    first = first_path(files)
    if not first.name.lower().endswith(ARCHIVE_EXTENSIONS) or first.is_dir():
        return NO
    return BY_CONTENT if holds_texts(find_files(files, {})[0]) else NO


SOURCES = (SourceKind("tar", Tar, extensions=(".tar",), recognizes=is_text_archive),)
