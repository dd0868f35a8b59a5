"""Arrow and Parquet files: their columns, checked, and their records, memory-mapped.

Parquet is rewritten once as Arrow in the cache and mapped there. Only whole row groups can be
decoded, so random access would decode, and hold in memory, up to a million records for each record
read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import parquet, types

from fmjax.contracts import Record, Value
from fmjax.data.records import locate
from fmjax.data.storage import cache
from fmjax.data.storage.index import index_of
from fmjax.data.storage.mapped import decompressed
from fmjax.data.storage.ranged import RangedFile
from fmjax.errors import UserError, nearest, one_line

BATCH = 1024  # records per batch of a rewritten file, at most
BYTES = 2**24  # of such a batch, about; images are large
FILE_MAGIC = b"ARROW1"  # begins a file of the IPC file format; any other is a stream
END = b"\xff\xff\xff\xff\0\0\0\0"  # ends a complete stream
BROKEN = (pa.ArrowException, OSError, ValueError)


class ArrowFile:
    """The batches of a memory-mapped file, pickled by its name.

    Args:
      path: the file that the user named.
      local: the mapped file.
      columns: the columns to read.
    """

    def __init__(self, path: Path, local: Path, columns: tuple[str, ...]):
        self.path, self.local, self.columns = path, local, columns
        self.batches = [batch.select(list(columns)) for batch in batches(path, local)]
        self.bounds = np.concatenate(
            [[0], np.cumsum([batch.num_rows for batch in self.batches], dtype=np.int64)]
        )

    def __reduce__(self) -> tuple[type[ArrowFile], tuple[Path, Path, tuple[str, ...]]]:
        return ArrowFile, (self.path, self.local, self.columns)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def row(self, index: int) -> Record:
        number, row = locate(self.bounds, index)
        return {
            name: column[row].as_py()
            for name, column in zip(self.columns, self.batches[number].columns, strict=True)
        }

    def value(self, index: int, name: str) -> Value:
        """Returns one value of a record; the others are not read."""
        number, row = locate(self.bounds, index)
        return self.batches[number].columns[self.columns.index(name)][row].as_py()

    def check(self, facts: Record) -> Iterator[tuple[int]]:
        """Checks all values, and yields nothing. Raises UserError, naming the record."""
        for begin, batch in zip(self.bounds.tolist(), self.batches, strict=False):
            check_values(batch, f"{self.path} record", begin)
        yield from ()

    def is_mapped(self) -> bool:
        """Returns whether the values are mapped from the file, which must be aligned and not
        compressed."""
        whole = pa.memory_map(str(self.local)).read_buffer()
        first = next(batches(self.path, self.local, whole), None)
        kept = (
            [part for column in first.columns for part in column.buffers() if part and part.size]
            if first
            else []
        )
        return all(whole.address <= part.address < whole.address + whole.size for part in kept)


def opened(path: Path, columns: tuple[str, ...], is_parquet: bool) -> ArrowFile:
    """Returns an Arrow file, checked; a Parquet file or a compressed Arrow file is rewritten into
    the cache."""
    if not is_parquet:
        local = decompressed(path)
        state = cache.state_of(local)
        file = ArrowFile(path, local, columns)
        if file.is_mapped():
            index_of(file.local, "arrow", columns, 1, file.check, state)  # checked once
            return file
    key = cache.name_for([cache.digest(path)["sha256"], columns])
    local = cache.get_or_make(
        Path("arrow", key, f"{path.stem}.arrow"), partial(rewrite, path, columns, is_parquet)
    )
    return ArrowFile(path, local, columns)


def rewrite(path: Path, columns: tuple[str, ...], is_parquet: bool, stream: BinaryIO) -> None:
    """Writes the columns of a file as a stream of small batches that can be mapped, and checks each
    batch."""
    parts = (
        row_groups(path, columns)
        if is_parquet
        else ((batch, "") for batch in batches(path, decompressed(path)))
    )
    write_batches(f"{path}", schema_of(path, is_parquet), columns, parts, stream)


def write_batches(
    path: str,
    source: pa.Schema,
    columns: tuple[str, ...],
    parts: Iterable[tuple[pa.RecordBatch, str]],
    stream: BinaryIO,
    done: int = 0,
) -> None:
    """Writes the columns of batches, each with its place in the file, as a stream of small batches
    that can be mapped, and checks each batch. `done` records come before."""
    schema = pa.schema([(name, decoded(source.field(name).type)) for name in columns])
    with pa.ipc.new_stream(stream, schema) as writer:
        for batch, place in parts:
            batch = batch.select(list(columns))
            check_values(batch, f"{path}{place} record", done)
            done += batch.num_rows
            arrays = [
                column.cast(kind) for column, kind in zip(batch.columns, schema.types, strict=True)
            ]
            for part in pa.Table.from_arrays(arrays, schema=schema).to_batches(max_chunksize=BATCH):
                writer.write_batch(part)


def row_groups(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[pa.RecordBatch, str]]:
    """Yields batches of the records of a Parquet file, each with its row group for messages.

    Raises UserError, naming the row group, if it cannot be read.
    """
    file = parquet.ParquetFile(decompressed(path), memory_map=True, page_checksum_verification=True)
    for group in range(file.num_row_groups):
        yield from row_group(f"{path}", file, group, columns)


def row_group(
    path: str, file: parquet.ParquetFile, group: int, columns: tuple[str, ...]
) -> Iterator[tuple[pa.RecordBatch, str]]:
    """Yields batches of the records of a row group, each with its row group for messages.

    Raises UserError, naming the row group, if it cannot be read.
    """
    place = f" row group {group}"
    about = file.metadata.row_group(group)
    rows = max(1, min(BATCH, BYTES * about.num_rows // max(about.total_byte_size, 1)))
    read = file.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False)
    while True:
        try:
            batch = next(read, None)
        except BROKEN as error:
            raise UserError(
                f"{path}{place}: cannot be read ({one_line(error, 200)}); fetch the file again"
            ) from error
        if batch is None:
            break
        yield batch, place


def batches(path: Path, local: Path, whole: pa.Buffer | None = None) -> Iterator[pa.RecordBatch]:
    """Yields the batches of an Arrow file, in the stream or the file format.

    Raises UserError if it is damaged.
    """
    count = 0
    try:
        whole = pa.memory_map(str(local)).read_buffer() if whole is None else whole
        if whole.slice(0, len(FILE_MAGIC)).to_pybytes() == FILE_MAGIC:
            file = pa.ipc.open_file(whole)
            for count in range(file.num_record_batches):
                yield file.get_batch(count)
            return
        for batch in pa.ipc.open_stream(whole):
            yield batch
            count += 1
        # A stream that is truncated between two batches would look complete.
        if whole.slice(max(whole.size - len(END), 0)).to_pybytes() != END:
            raise pa.ArrowInvalid("its end is missing")
    except BROKEN as error:
        raise UserError(
            f"{path}: is not a complete Arrow file (batch {count}: {one_line(error, 200)}); "
            "fetch it again, or set its kind with --config.data.source"
        ) from error


def schema_of(path: Path, is_parquet: bool) -> pa.Schema:
    """Returns the names and types of a file's columns. Raises UserError if they cannot be read."""
    try:
        local = decompressed(path)
        if is_parquet:
            return parquet.ParquetFile(local, memory_map=True).schema_arrow
        with pa.memory_map(str(local)) as stream:
            whole = stream.read_buffer()
        is_file = whole.slice(0, len(FILE_MAGIC)).to_pybytes() == FILE_MAGIC
        return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(whole).schema
    except BROKEN as error:
        kind = "Parquet" if is_parquet else "Arrow"
        raise UserError(
            f"{path}: is not a complete {kind} file ({one_line(error, 200)}); "
            "fetch it again, or set its kind with --config.data.source"
        ) from error


def readable_columns(
    path: Path | RangedFile, schema: pa.Schema, named: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns the columns to be read.

    Raises UserError if one is missing, occurs twice, or has an unsupported type.
    """
    for name in named:
        if name not in schema.names:
            raise UserError(
                f'data.columns: {path} has no column "{name}"{nearest(name, schema.names)}; '
                f"it has {', '.join(schema.names)}"
            )
    wanted = named or tuple(schema.names)
    fine = [field.name for field in schema if is_readable(field.type)]
    for name in wanted:
        if schema.names.count(name) > 1:
            raise UserError(f'{path}: two columns have the name "{name}"; rename one')
        if name not in fine:
            raise UserError(
                f'{path}: column "{name}" holds {schema.field(name).type}, not text, numbers, '
                "bytes, or lists of them; name the columns to read with "
                f"--config.data.columns={','.join(fine) or 'NAMES'}"
            )
    return wanted


def is_readable(kind: pa.DataType) -> bool:
    """Returns whether values of a type are text, numbers, booleans, bytes, or lists or structs of
    them."""
    if types.is_dictionary(kind):
        return is_readable(kind.value_type)
    if types.is_struct(kind):
        return all(is_readable(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return is_readable(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return bool(text or number or is_bytes(kind) or types.is_null(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Returns whether values of a type are bytes, such as the content of an image file."""
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def is_embedded_file(kind: pa.DataType) -> bool:
    """Returns whether values of a type are files as `datasets` stores images and sounds: the
    bytes, or else a path."""
    return (
        types.is_struct(kind)
        and {field.name for field in kind} == {"bytes", "path"}
        and is_bytes(kind.field("bytes").type)
    )


def decoded(kind: pa.DataType) -> pa.DataType:
    """Returns the type of a column's values, without dictionary encoding."""
    return kind.value_type if types.is_dictionary(kind) else kind


def check_same(
    path: Path | RangedFile,
    schema: pa.Schema,
    first: Path | RangedFile,
    expected: pa.Schema,
    columns: Sequence[str],
) -> None:
    """Raises UserError unless a file has the columns of the first one."""
    for name in columns:
        kinds = [
            str(each.field(name).type) if name in each.names else "missing"
            for each in (schema, expected)
        ]
        if kinds[0] != kinds[1]:
            raise UserError(
                f'{path}: column "{name}" is {kinds[0]}, but that of {first.name} is {kinds[1]}; '
                "use files with the same columns"
            )


def check_values(batch: pa.RecordBatch, place: str, begin: int) -> None:
    """Raises UserError, naming the record, if a value is damaged or not UTF-8;

    `begin` is the index of the batch's first record.
    """
    try:
        batch.validate(full=True)
        return
    except BROKEN as error:
        reason = one_line(error, 200)
    for row in range(batch.num_rows):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.slice(row, 1).validate(full=True)
            except BROKEN as error:
                what = (
                    "is not UTF-8"
                    if "UTF8" in str(error)
                    else f"is damaged ({one_line(error, 200)})"
                )
                raise UserError(
                    f'{place} {begin + row}: column "{name}" {what}; write the file again'
                ) from error
    raise UserError(
        f"{place}s {begin} to {begin + batch.num_rows - 1}: are damaged ({reason}); "
        "fetch the file again"
    )
