"""Arrow and Parquet files of which only the parts that are used are read: record batches, or row
groups and their chosen columns.

A part can only be decoded as a whole, so the first process on a host that reads a record of it
writes its columns into the cache, where it is mapped like a local file. No part is read twice.

The places of the batches of an Arrow file are found once, with a request for the header of each.
Headers are flatbuffers; the few fields that are needed are read here ("Columnar format",
arrow.apache.org, "Encapsulated message format").
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from fmjax.contracts import Record, Value
from fmjax.data.records import locate
from fmjax.data.storage import cache
from fmjax.data.storage.arrow_files import (
    BROKEN,
    FILE_MAGIC,
    ArrowFile,
    row_group,
    write_batches,
)
from fmjax.data.storage.mapped import make_room
from fmjax.data.storage.ranged import CannotRange, RangedFile, Stream
from fmjax.errors import UserError, one_line

HEADER = 2**12  # bytes that are read of a message at first: most headers are shorter
MOST = 2**28  # bytes of a record batch, which is in memory while it is decoded
CONTINUES = b"\xff\xff\xff\xff"  # begins a message
SCHEMA, DICTIONARY, BATCH = 1, 2, 3  # kinds of messages


class RangedArrowFile:
    """The parts of a remote file, each mapped from the cache once it is used; pickled by the file.

    Raises UserError if it is damaged.
    """

    def __init__(self, path: RangedFile, columns: tuple[str, ...], is_parquet: bool):
        self.path, self.columns, self.is_parquet = path, columns, is_parquet
        self.parts = parts_of(path, is_parquet)
        self.bounds = np.cumsum([0, *self.parts["rows"]])
        make_room(len(self.parts["rows"]))
        self.opened: dict[int, ArrowFile] = {}

    def __reduce__(self) -> tuple[type[RangedArrowFile], tuple[RangedFile, tuple[str, ...], bool]]:
        return RangedArrowFile, (self.path, self.columns, self.is_parquet)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def row(self, index: int) -> Record:
        file, own = self.part(index)
        return file.row(own)

    def value(self, index: int, name: str) -> Value:
        """Returns one value of a record."""
        file, own = self.part(index)
        return file.value(own, name)

    def part(self, index: int) -> tuple[ArrowFile, int]:
        """Returns the part that has a record, and the record's number in it."""
        number, own = locate(self.bounds, index)
        file = self.opened.get(number)
        if file is None:
            name = Path("ranged", cache.name_for([self.path.key, *self.columns]), f"{number}.arrow")
            local = cache.get_or_make(name, partial(self.write, number))
            file = self.opened[number] = ArrowFile(Path(self.path.name), local, self.columns)
        return file, own

    def write(self, number: int, stream: BinaryIO) -> None:
        """Writes a part into the cache, as a stream of small batches; checks its values."""
        begin, schema = int(self.bounds[number]), schema_of(self.path, self.is_parquet)
        if self.is_parquet:
            with explained(self.path, "Parquet"):
                file = parquet.ParquetFile(
                    pa.PythonFile(Stream(self.path), "r"),
                    metadata=metadata_of(self.path),
                    pre_buffer=True,
                    page_checksum_verification=True,
                )
            batches = row_group(f"{self.path}", file, number, self.columns)
        else:
            batches = self.batches(number, schema)
        write_batches(f"{self.path}", schema, self.columns, batches, stream, begin)

    def batches(self, number: int, schema: pa.Schema) -> Iterator[tuple[pa.RecordBatch, str]]:
        """Yields the one batch of a part of an Arrow file."""
        begin, end = self.parts["spans"][number]
        data = pa.py_buffer(self.path.read(begin, end))
        with explained(self.path, "Arrow"):
            batch = pa.ipc.read_record_batch(data, schema)
        yield batch, ""


class explained:
    """Turns errors about the content of a file in the block into a UserError."""

    def __init__(self, path: RangedFile, kind: str):
        self.path, self.kind = path, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (*BROKEN, struct.error, IndexError)):
            raise UserError(
                f"{self.path}: is not a complete {self.kind} file ({one_line(error, 200)}); "
                "upload it again, or set its kind with --config.data.source"
            ) from error


@functools.lru_cache(256)
def metadata_of(path: RangedFile) -> parquet.FileMetaData:
    """Returns the metadata at the end of a Parquet file. Raises UserError if it is damaged."""
    with explained(path, "Parquet"):
        return parquet.read_metadata(pa.PythonFile(Stream(path), "r"))


def schema_of(path: RangedFile, is_parquet: bool) -> pa.Schema:
    """Returns the names and types of a file's columns. Raises UserError if it is damaged."""
    if is_parquet:
        return metadata_of(path).schema.to_arrow_schema()
    with explained(path, "Arrow"):
        begin, end = parts_of(path, is_parquet)["schema"]
        return pa.ipc.read_schema(pa.py_buffer(path.read(begin, end)))


def parts_of(path: RangedFile, is_parquet: bool) -> Record:
    """Returns the number of `rows` of each part; of an Arrow file also the place of the `schema`,
    and the `spans` of the batches, which are remembered in the cache.

    Raises UserError if the file is damaged, and CannotRange for dictionaries and large batches.
    """
    if not is_parquet:
        found = cache.remembered(Path("ranged", f"{path.key}.json"), partial(messages, path))
        if (size := max((end - begin for begin, end in found["spans"]), default=0)) > MOST:
            raise CannotRange(f"{path}: has a record batch of {size:,} bytes; download it")
        return found
    about = metadata_of(path)
    return {"rows": [about.row_group(number).num_rows for number in range(about.num_row_groups)]}


def messages(path: RangedFile) -> Record:
    """Returns where the messages of an Arrow file are, in the stream or the file format."""
    found: Record = {"schema": None, "rows": [], "spans": []}
    with explained(path, "Arrow"):
        is_file = path.read(0, min(len(FILE_MAGIC), path.size)) == FILE_MAGIC
        place = 8 if is_file else 0
        while True:
            data = path.read(place, min(place + HEADER, path.size))
            if data[:4] != CONTINUES:
                raise ValueError(f"no message at byte {place:,}")
            size = int.from_bytes(data[4:8], "little")
            if not size:
                break
            if 8 + size > len(data):
                data = path.read(place, min(place + 8 + size, path.size))
            kind, rows, body = header_of(data[8 : 8 + size])
            end = place + 8 + size + body
            if end > path.size:
                raise ValueError(f"ends in the message at byte {place:,}")
            if kind == DICTIONARY:
                raise CannotRange(f"{path}: has dictionaries; download it")
            if kind == SCHEMA:
                found["schema"] = [place, end]
            else:
                found["rows"].append(rows)
                found["spans"].append([place, end])
            place = end
        if is_file and path.read(path.size - len(FILE_MAGIC), path.size) != FILE_MAGIC:
            raise ValueError("its end is missing")
        if found["schema"] is None:
            raise ValueError("has no schema")
    return found


def header_of(data: bytes) -> tuple[int, int, int]:
    """Returns a message's kind, its number of rows, and the size of its body in bytes."""
    message = struct.unpack_from("<I", data)[0]
    kind = field(data, message, 1)
    body = field(data, message, 3)
    rows = 0
    if kind and data[kind] == BATCH:
        at = field(data, message, 2)
        batch = at + struct.unpack_from("<I", data, at)[0]
        length = field(data, batch, 0)
        rows = struct.unpack_from("<q", data, length)[0] if length else 0
    return data[kind], rows, struct.unpack_from("<q", data, body)[0] if body else 0


def field(data: bytes, table: int, number: int) -> int:
    """Returns the place of a field of a flatbuffer's table; 0 if it has the default value."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, fields)[0]:
        return 0
    offset = struct.unpack_from("<H", data, fields + 4 + 2 * number)[0]
    return table + offset if offset else 0
