"""Tables in columns: Arrow files, Parquet files, and folders that Hugging Face's `datasets` saved.

Arrow files are mapped into memory. Parquet is rewritten once as Arrow in the cache and mapped there: its row groups can only be
decoded whole, so that reading records at random would decode up to a million of them for each, and hold as many.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import parquet, types

from fmjax.data.records import Record, locate
from fmjax.data.sources.features import decode, features_of, has_labels
from fmjax.data.storage import cache
from fmjax.data.storage.mapped import unpacked
from fmjax.errors import UserError, nearest, one_line

BATCH = 1024  # records of a batch of what is rewritten
FILE_MAGIC = b"ARROW1"  # begins a file of the IPC file format; what does not is a stream
END = b"\xff\xff\xff\xff\0\0\0\0"  # ends a whole stream
BROKEN = (pa.ArrowException, OSError, ValueError)


class Columnar:
    """Records of Arrow or Parquet files: texts, numbers, truth values, lists and structures of them, class labels by name.

    `columns` are those that are read, by default all; `features` are what `datasets` says of them, by default in the file.
    Raises UserError, naming the file, the row group or the record, for what is malformed or empty, for columns that hold
    something else, and for files whose columns differ.
    """

    def __init__(
        self, paths: Sequence[Path], split: str, kind: str, columns: Sequence[str] = (), features: Record | None = None
    ):
        self.split, self.kind, self.named = split, kind, tuple(columns)
        schemas = [schema_of(path, kind == "parquet") for path in paths]
        self.columns = readable_columns(paths[0], schemas[0], self.named)
        for path, schema in zip(paths, schemas, strict=True):
            check_same(path, schema, paths[0], schemas[0], self.columns)
        self.features = features_of(schemas[0].metadata) if features is None else features
        self.labels = tuple(name for name in self.columns if has_labels(self.features.get(name)))
        self.files = [opened(path, self.columns, kind == "parquet") for path in paths]
        for file in self.files:
            if not len(file):
                raise UserError(f"{file.path}: no records for {split}; give a file that is not empty")
        self.bounds = np.concatenate([[0], np.cumsum([len(file) for file in self.files])])
        self.fingerprint()  # before anything can change

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: int) -> Record:
        number, row = locate(self.bounds, index)
        record = self.files[number].row(row)
        for name in self.labels:
            try:
                record[name] = decode(self.features[name], record[name])
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f'{self.where(index)}: column "{name}": {error}; correct the record') from error
        return record

    def where(self, index: int) -> str:
        number, row = locate(self.bounds, index)
        return f"{self.files[number].path.name} record {row}"

    def fingerprint(self) -> Record:
        options: Record = {"columns": list(self.named)} if self.named else {}
        if self.labels:
            content = json.dumps([self.features[name] for name in self.labels], sort_keys=True)
            options["labels"] = hashlib.sha256(content.encode()).hexdigest()
        files = [{"name": file.path.name} | cache.digest(file.path) for file in self.files]
        return {"source": self.kind, "split": self.split, **options, "files": files}


class ArrowFile:
    """The batches of a file, mapped, and pickled by its name. `path` is what the user named, `local` what is mapped."""

    def __init__(self, path: Path, local: Path, columns: tuple[str, ...]):
        self.path, self.local, self.columns = path, local, columns
        self.batches = [batch.select(list(columns)) for batch in batches(path, local)]
        self.bounds = np.concatenate([[0], np.cumsum([batch.num_rows for batch in self.batches], dtype=np.int64)])

    def __reduce__(self) -> tuple[type[ArrowFile], tuple[Path, Path, tuple[str, ...]]]:
        return ArrowFile, (self.path, self.local, self.columns)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def row(self, index: int) -> Record:
        number, row = locate(self.bounds, index)
        return {name: column[row].as_py() for name, column in zip(self.columns, self.batches[number].columns, strict=True)}

    def is_mapped(self) -> bool:
        """Returns whether the values lie in the file, as they do unless it is compressed or not aligned."""
        whole = pa.memory_map(str(self.local)).read_buffer()
        first = next(batches(self.path, self.local, whole), None)
        kept = [part for column in first.columns for part in column.buffers() if part and part.size] if first else []
        return all(whole.address <= part.address < whole.address + whole.size for part in kept)


def opened(path: Path, columns: tuple[str, ...], is_parquet: bool) -> ArrowFile:
    """Returns an Arrow file, checked, or what a Parquet or compressed Arrow file is rewritten to."""
    if not is_parquet:
        file = ArrowFile(path, unpacked(path), columns)
        if file.is_mapped():
            for begin, batch in zip(file.bounds.tolist(), file.batches, strict=False):
                check_values(batch, f"{path} record", begin)
            return file
    key = hashlib.sha256(json.dumps([cache.digest(path)["sha256"], columns]).encode()).hexdigest()[:32]
    return ArrowFile(path, cache.made(Path("arrow", key, f"{path.stem}.arrow"), rewriting(path, columns, is_parquet)), columns)


def rewriting(path: Path, columns: tuple[str, ...], is_parquet: bool) -> Callable[[BinaryIO], None]:
    """Returns what writes the columns of a file into a stream of small batches that can be mapped, checking each."""

    def write(stream: BinaryIO) -> None:
        source = schema_of(path, is_parquet)
        schema = pa.schema([(name, decoded(source.field(name).type)) for name in columns])
        parts = row_groups(path, columns) if is_parquet else ((batch, "") for batch in batches(path, unpacked(path)))
        done = 0
        with pa.ipc.new_stream(stream, schema) as writer:
            for batch, place in parts:
                batch = batch.select(list(columns))
                check_values(batch, f"{path}{place} record", done)
                done += batch.num_rows
                arrays = [column.cast(kind) for column, kind in zip(batch.columns, schema.types, strict=True)]
                for part in pa.Table.from_arrays(arrays, schema=schema).to_batches(max_chunksize=BATCH):
                    writer.write_batch(part)

    return write


def row_groups(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[pa.RecordBatch, str]]:
    """Yields batches of the records of a Parquet file, each with its row group for messages. Raises UserError, naming the row
    group, for one that cannot be read."""
    file = parquet.ParquetFile(unpacked(path), memory_map=True, page_checksum_verification=True)
    for group in range(file.num_row_groups):
        place = f" row group {group}"
        read = file.iter_batches(BATCH, row_groups=[group], columns=list(columns), use_threads=False)
        while True:
            try:
                batch = next(read, None)
            except BROKEN as error:
                raise UserError(f"{path}{place}: cannot be read ({one_line(error, 200)}); fetch the file again") from error
            if batch is None:
                break
            yield batch, place


def batches(path: Path, local: Path, whole: pa.Buffer | None = None) -> Iterator[pa.RecordBatch]:
    """Yields the batches of an Arrow file, a stream or of the file format. Raises UserError if it is not whole."""
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
        # A stream that is cut between two batches reads as one that ends there.
        if whole.slice(max(whole.size - len(END), 0)).to_pybytes() != END:
            raise pa.ArrowInvalid("its end is missing")
    except BROKEN as error:
        raise UserError(
            f"{path}: is not a whole Arrow file (batch {count}: {one_line(error, 200)}); fetch it again, or say what it is with "
            "--config.data.source"
        ) from error


def schema_of(path: Path, is_parquet: bool) -> pa.Schema:
    """Returns the names and types of a file's columns. Raises UserError if it has not got any that can be read."""
    try:
        local = unpacked(path)
        if is_parquet:
            return parquet.ParquetFile(local, memory_map=True).schema_arrow
        with pa.memory_map(str(local)) as stream:
            whole = stream.read_buffer()
        is_file = whole.slice(0, len(FILE_MAGIC)).to_pybytes() == FILE_MAGIC
        return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(whole).schema
    except BROKEN as error:
        kind = "Parquet" if is_parquet else "Arrow"
        raise UserError(
            f"{path}: is not a whole {kind} file ({one_line(error, 200)}); fetch it again, or say what it is with "
            "--config.data.source"
        ) from error


def readable_columns(path: Path, schema: pa.Schema, named: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the columns to be read. Raises UserError if one is not there, there twice, or of a kind that tasks cannot read."""
    for name in named:
        if name not in schema.names:
            raise UserError(
                f'data.columns: {path} has no column "{name}"{nearest(name, schema.names)}; it has {", ".join(schema.names)}'
            )
    wanted = named or tuple(schema.names)
    fine = [field.name for field in schema if is_readable(field.type)]
    for name in wanted:
        if schema.names.count(name) > 1:
            raise UserError(f'{path}: two columns have the name "{name}"; rename one')
        if name not in fine:
            raise UserError(
                f'{path}: column "{name}" holds {schema.field(name).type}, not text, numbers or lists of them; name the columns '
                f"that are to be read with --config.data.columns={','.join(fine) or 'NAMES'}"
            )
    return wanted


def is_readable(kind: pa.DataType) -> bool:
    """Returns whether values of a type are text, numbers, truth values, or lists or structures of them."""
    if types.is_dictionary(kind):
        return is_readable(kind.value_type)
    if types.is_struct(kind):
        return all(is_readable(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return is_readable(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return text or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)


def decoded(kind: pa.DataType) -> pa.DataType:
    """Returns the type of a column whose values stand for themselves."""
    return kind.value_type if types.is_dictionary(kind) else kind


def check_same(path: Path, schema: pa.Schema, first: Path, expected: pa.Schema, columns: Sequence[str]) -> None:
    """Raises UserError unless a file has the columns of the first one."""
    for name in columns:
        kinds = [str(each.field(name).type) if name in each.names else "missing" for each in (schema, expected)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f'{path}: column "{name}" is {kinds[0]}, but that of {first.name} is {kinds[1]}; give files of the same columns'
            )


def check_values(batch: pa.RecordBatch, place: str, begin: int) -> None:
    """Raises UserError, naming the record, if a value is damaged or not UTF-8; `begin` is that of the batch's first."""
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
                what = "is not UTF-8" if "UTF8" in str(error) else f"is damaged ({one_line(error, 200)})"
                raise UserError(f'{place} {begin + row}: column "{name}" {what}; write the file again') from error
    raise UserError(f"{place}s {begin} to {begin + batch.num_rows - 1}: are damaged ({reason}); fetch the file again")


def open_saved_folder(paths: Sequence[Path], split: str, columns: Sequence[str] = ()) -> Columnar:
    """Returns a split of the one folder, which `datasets` saved; one that holds a single split is it, whatever it is called.

    Raises UserError if it is none, the split or one of its files is not there.
    """
    (path,) = paths
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise UserError(
                f'{path}: has no split "{split}"{nearest(split, splits)}, only {", ".join(splits)}; name the folder of one with '
                f"--config.data.files.{split}={path}/SPLIT"
            )
        path = path / split
    if not (path / "state.json").is_file():
        raise UserError(f"{path}: has no state.json, as a folder that datasets' save_to_disk wrote; name such a folder")
    state, info = read_json(path / "state.json"), read_json(path / "dataset_info.json")
    if state.get("_indices_data_files"):
        raise UserError(f"{path}: an old version of datasets saved a selection there; save it again with a newer one")
    names = [str(part.get("filename")) for part in state.get("_data_files", [])]
    for name in names:
        if not (path / name).is_file() or Path(name).name != name:
            raise UserError(f"{path / name}: state.json names it and it is not there; fetch the folder again")
    if not names:
        raise UserError(f"{path}: no records for {split}; give a folder that is not empty")
    features = info["features"] if isinstance(info.get("features"), dict) else {}
    return Columnar([path / name for name in names], split, "huggingface", columns, features)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file. Raises UserError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({one_line(error, 200)}); fetch the folder again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; fetch the folder again")
    return content
