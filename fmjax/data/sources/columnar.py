"""Tables in columns:

Arrow files, Parquet files, and folders that Hugging Face's `datasets` saved. Remote files are read
by range (`storage/ranged_arrow.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fmjax.config.json_files import parse_json
from fmjax.contracts import Record, Value
from fmjax.data.records import RecordSource, locate
from fmjax.data.sources.features import decode, features_of, has_labels
from fmjax.data.sources.kinds import BY_CONTENT, NO, Files, SourceKind, first_path
from fmjax.data.storage import cache
from fmjax.data.storage.ranged import RangedFile, fingerprint_of
from fmjax.errors import RecordError, UserError, nearest, one_line


class Columnar(RecordSource):
    """Records of Arrow or Parquet files: text, numbers, booleans, bytes, lists and structs of them,
    class labels by name; files embedded by `datasets` as their bytes, or else their path.

    Args:
      paths: the files.
      split: the name of the split.
      kind: "parquet", "arrow" or "huggingface".
      columns: the columns to read; empty: all.
      features: the description of the columns by `datasets`; None: that of the first file.

    Raises UserError, naming the file, the row group or the record, for malformed or empty files,
    for columns of other types, and if the columns of files differ.
    """

    def __init__(
        self,
        paths: Sequence[Path | RangedFile],
        split: str,
        kind: str,
        columns: Sequence[str] = (),
        features: Record | None = None,
    ):
        # Imported here because importing pyarrow takes a moment.
        from fmjax.data.storage import arrow_files, ranged_arrow

        self.split, self.kind, self.named = split, kind, tuple(columns)
        is_parquet = kind == "parquet"
        cache.read_digests([path for path in paths if isinstance(path, Path)])
        schemas = [
            arrow_files.schema_of(path, is_parquet)
            if isinstance(path, Path)
            else ranged_arrow.schema_of(path, is_parquet)
            for path in paths
        ]
        self.columns = arrow_files.readable_columns(paths[0], schemas[0], self.named)
        for path, schema in zip(paths, schemas, strict=True):
            arrow_files.check_same(path, schema, paths[0], schemas[0], self.columns)
        self.features = features_of(schemas[0].metadata) if features is None else features
        self.labels = tuple(name for name in self.columns if has_labels(self.features.get(name)))
        self.embedded = tuple(
            name
            for name in self.columns
            if arrow_files.is_embedded_file(schemas[0].field(name).type)
        )
        self.files = [
            arrow_files.opened(path, self.columns, is_parquet)
            if isinstance(path, Path)
            else ranged_arrow.RangedArrowFile(path, self.columns, is_parquet)
            for path in paths
        ]
        for file in self.files:
            if not len(file):
                raise UserError(
                    f"{file.path}: no records for {split}; use a file that is not empty"
                )
        self.bounds = np.concatenate([[0], np.cumsum([len(file) for file in self.files])])
        self.fingerprint()  # computed now, before the files can change

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: int) -> Record:
        number, row = locate(self.bounds, index)
        record = self.files[number].row(row)
        return {name: self.converted(name, value, index) for name, value in record.items()}

    def value(self, index: int, name: str) -> Value:
        """Returns one value of a record: the label without the bytes of the image."""
        number, row = locate(self.bounds, index)
        return self.converted(name, self.files[number].value(row, name), index)

    def converted(self, name: str, value: Value, index: int) -> Value:
        """Returns a value with names of class labels; of an embedded file, its bytes or its path,
        which is relative to the file's folder if it is there."""
        if name in self.labels:
            try:
                return decode(self.features[name], value)
            except (ValueError, TypeError, KeyError) as error:
                problem = f'column "{name}": {error}; correct the record'
                raise RecordError(self.where(index), problem, index) from error
        if name not in self.embedded or value is None:
            return value
        if value["bytes"] is not None or value["path"] is None:
            return value["bytes"]
        path = self.files[locate(self.bounds, index)[0]].path
        beside = path.parent / value["path"] if isinstance(path, Path) else None
        return str(beside) if beside and beside.is_file() else value["path"]

    def where(self, index: int) -> str:
        number, row = locate(self.bounds, index)
        return f"{self.files[number].path.name} record {row}"

    def fingerprint(self) -> Record:
        options: Record = {"columns": list(self.named)} if self.named else {}
        if self.labels:
            content = json.dumps([self.features[name] for name in self.labels], sort_keys=True)
            options["labels"] = hashlib.sha256(content.encode()).hexdigest()
        files = [fingerprint_of(file.path) for file in self.files]
        return {"source": self.kind, "split": self.split, **options, "files": files}


def one_folder(files: Files, split: str) -> Path:
    """Returns the named folder. Raises UserError if it is not a folder, or several are named."""
    names = [files] if isinstance(files, str) else list(files)
    if len(names) != 1 or not Path(names[0]).expanduser().is_dir():
        raise UserError(
            f"data.files.{split}={','.join(names)}: data.source=huggingface reads one folder, "
            "written by save_to_disk of datasets; correct the path"
        )
    return Path(names[0]).expanduser()


def open_saved_folder(files: Files, split: str, columns: Sequence[str] = ()) -> Columnar:
    """Returns a split of a folder that `datasets` saved; if the folder has only one split, that
    one, whatever its name.

    Raises UserError if there is no such folder, or the split or one of its files is missing.
    """
    path = one_folder(files, split)
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise UserError(
                f'{path}: has no split "{split}"{nearest(split, splits)}, only '
                f"{', '.join(splits)}; name the folder of one with "
                f"--config.data.files.{split}={path}/SPLIT"
            )
        path = path / split
    if not (path / "state.json").is_file():
        raise UserError(
            f"{path}: has no state.json, so save_to_disk of datasets did not write it; name a "
            "folder that it wrote"
        )
    state, info = read_json(path / "state.json"), read_json(path / "dataset_info.json")
    if state.get("_indices_data_files"):
        raise UserError(
            f"{path}: contains a selection of rows, saved by an old version of datasets; save it "
            "again with a newer version"
        )
    names = [str(part.get("filename")) for part in state.get("_data_files", [])]
    for name in names:
        if not (path / name).is_file() or Path(name).name != name:
            raise UserError(
                f"{path / name}: is named in state.json but missing; fetch the folder again"
            )
    if not names:
        raise UserError(f"{path}: no records for {split}; use a folder that is not empty")
    features = info["features"] if isinstance(info.get("features"), dict) else {}
    return Columnar([path / name for name in names], split, "huggingface", columns, features)


def read_json(path: Path) -> Record:
    """Returns the JSON object in a file. Raises UserError if it is not one."""
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON ({one_line(error, 200)}); fetch the folder again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; fetch the folder again")
    return content


def is_saved_folder(files: Files) -> int:
    """Returns the certainty that a folder was saved by `datasets`."""
    folder = first_path(files)
    return (
        BY_CONTENT
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
        else NO
    )


SOURCES = (
    SourceKind(
        "parquet",
        partial(Columnar, kind="parquet"),
        options=("columns",),
        extensions=(".parquet",),
        ranged=True,
    ),
    SourceKind(
        "arrow",
        partial(Columnar, kind="arrow"),
        options=("columns",),
        extensions=(".arrow",),
        ranged=True,
    ),
    SourceKind(
        "huggingface",
        open_saved_folder,
        reads="folder",
        options=("columns",),
        recognizes=is_saved_folder,
    ),
)
