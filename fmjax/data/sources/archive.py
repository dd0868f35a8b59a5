"""Tar archives of texts, images and audio: WebDataset, where files with the same name belong to one
record, and JSON lines.

An archive is memory-mapped and read by an index of offsets, which is memory-mapped, too
(`index.py`). A compressed one is decompressed once into the cache (`mapped.py`), since compressed
files have no random access.
"""

from __future__ import annotations

import contextlib
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from fmjax.contracts import Record
from fmjax.data.characters import BLANKS
from fmjax.data.records import RecordSource, columns_of, fill_columns, json_object, locate
from fmjax.data.sources.kinds import BY_CONTENT, NO, Files, SourceKind, first_path
from fmjax.data.storage.index import Index
from fmjax.data.storage.mapped import File, open_files
from fmjax.data.storage.paths import IMAGE_EXTENSIONS, find_files, is_image
from fmjax.data.storage.tar import ARCHIVE_EXTENSIONS, BROKEN, hidden, member_at, members
from fmjax.errors import RecordError, UserError, nearest

AUDIO = ("wav", "flac", "mp3", "ogg", "opus", "m4a")
BYTES = ("image", "audio")  # columns whose values are the bytes of a file, which kinds decode
# The content of a record's files, by extension: a text, an object whose keys become columns, a
# label, an image, a recording.
PARTS = {"txt": "text", "text": "text", "json": "json", "cls": "label"}
PARTS |= {extension[1:]: "image" for extension in IMAGE_EXTENSIONS}
PARTS |= dict.fromkeys(AUDIO, "audio")
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
    text as `text`, the object's keys, and the label as `label`; of `a.jpg` and `a.wav` the bytes
    are `image` and `audio`. Each line of `a.jsonl` is a record.

    Raises UserError, naming the archive and the file in it, for an archive that is damaged or
    contains other files, and for a record that lacks a file of the first record.
    """

    def __init__(self, paths: Sequence[Path], split: str):
        self.split = split
        self.files = open_files(paths)
        self.endings: tuple[str, ...] = ()
        # Of each archive, [records, 1 + 2 x files of a record]: where the header of a record's
        # first file begins, and the begin and end of each file.
        self.places: list[Index] = []
        for file in self.files:
            if not self.endings:
                next(self.scan(file, {}), None)  # finds the endings
            width = 1 + 2 * len(self.endings)
            options = {"endings": self.endings}
            found = file.index(__name__, options, width, partial(self.scan, file))
            if not len(found):
                raise UserError(
                    f"{file.path}: no records for {split}; use an archive that is not empty"
                )
            self.places.append(found)
        # The number of records before each archive, [archives + 1].
        self.bounds = np.cumsum([0, *map(len, self.places)])
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

    def scan(self, file: File, facts: Record) -> Iterator[list[int]]:
        """Yields the row of the index for each record of an archive."""
        for record in self.records(file):
            yield [record[0].head, *(place for part in record for place in (part.begin, part.end))]

    def records(self, file: File) -> Iterator[list[Part]]:
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
        return int(self.bounds[-1])

    def __getitem__(self, index: int) -> Record:
        return fill_columns(self.read(index), self.columns)

    def read(self, index: int) -> Record:
        """Returns the content of a record's files.

        Raises RecordError if two have the same column.
        """
        file, (_, *spans) = self.place(index)
        record: Record = {}
        for ending, begin, end in zip(self.endings, spans[::2], spans[1::2], strict=True):
            kind = PARTS.get(ending, "json")
            try:
                text = (
                    ""
                    if kind in BYTES
                    else file.read(begin, end).decode("utf-8").removeprefix("\ufeff")
                )
            except UnicodeDecodeError as error:
                what = f"is not UTF-8 (byte 0x{error.object[error.start]:02x})"
                problem = f"its .{ending} {what}; convert it, for example with iconv"
                raise RecordError(self.where(index), problem, index) from error
            try:
                found = {kind: file.read(begin, end)} if kind in BYTES else values_of(text, kind)
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

    def place(self, index: int) -> tuple[File, list[int]]:
        """Returns the archive of a record, and its row of the index."""
        number, row = locate(self.bounds, index)
        place: list[int] = self.places[number].rows[row].tolist()
        return self.files[number], place

    def where(self, index: int) -> str:
        file, (head, begin, *_) = self.place(index)
        member = member_at(file, head, begin)
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
        hint = f"put files of {', '.join(f'.{each}' for each in ENDINGS)} there only"
        raise UserError(
            f"{where}: ends in .{ending}{nearest(ending, ENDINGS)}, which is not supported; {hint}"
        )
    begin = member.offset_data
    return Part(
        f"{folder}/{stem}" if folder else stem, ending, member.offset, begin, begin + member.size
    )


def holds_records(path: Path) -> bool:
    """Returns whether an archive contains records: among its first files are texts or recordings,
    but no images, unless an image has the name of another file. (A text beside images may be a
    readme.) False if the archive cannot be read."""
    images, others = set[str](), set[str]()
    if not path.name.lower().endswith(ARCHIVE_EXTENSIONS):
        return False
    try:
        with tarfile.open(path, "r|*") as archive:
            names = (PurePosixPath(member.name) for member in archive if member.isreg())
            for name in itertools.islice(names, PEEK):
                if not hidden(name) and name.suffix[1:].lower() in ENDINGS:
                    (images if is_image(name.name) else others).add(str(name.with_suffix("")))
    except BROKEN:
        pass
    return bool(images & others if images else others)


def is_record_archive(files: Files) -> int:
    """Returns the certainty that files are archives of records, judged by the first one."""
    first = first_path(files)
    if not first.name.lower().endswith(ARCHIVE_EXTENSIONS) or first.is_dir():
        return NO
    return BY_CONTENT if holds_records(find_files(files, {})[0]) else NO


SOURCES = (SourceKind("tar", Tar, extensions=(".tar",), recognizes=is_record_archive),)
