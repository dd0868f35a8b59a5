"""Data sets of TensorFlow Datasets (TFDS), read without TensorFlow: stored as ArrayRecord, with
random access.

Class labels become names, as for Hugging Face (`features.py`), so a benchmark has one label set.
The label -1, which marks missing labels in test sets, becomes None."""

from __future__ import annotations

import importlib
import operator
from typing import Any

import numpy as np

from fmjax.contracts import Record, Value
from fmjax.data.kinds.label import ClassName
from fmjax.data.records import RecordSource
from fmjax.data.sources.kinds import Files, SourceKind
from fmjax.errors import RecordError, UserError, nearest

# TFDS only knows the data sets in these packages after the packages are imported.
LEGACY = ("text", "question_answering", "summarization", "text_simplification", "translate")


class Tfds(RecordSource):
    """A split of a TFDS data set. Bytes are decoded to str.

    Args:
      files: the split or splits, such as "train[:90%]"; None: `split`.
      split: the name of the split.
      name: the name of the data set, such as "glue/sst2".
      data_dir: the folder where it is prepared; empty: TFDS's default folder.
      download: whether to download and prepare it if it is missing.

    Raises UserError for an unknown data set or split, and for a data set that is not prepared
    unless `download` is set.
    """

    def __init__(
        self,
        files: Files | None,
        split: str,
        name: str = "",
        data_dir: str = "",
        download: bool = False,
    ):
        split = files if isinstance(files, str) else "+".join(files or [split])
        builder = prepared(name, data_dir, download)
        self.split, self.name = split, builder.info.full_name
        try:
            self.source = builder.as_data_source(split=split)
        except ValueError as error:
            splits = ", ".join(builder.info.splits)
            raise UserError(
                f'{self.name} has no split "{split}"; choose from {splits}, or a part such as '
                "train[:90%]"
            ) from error
        except NotImplementedError as error:
            raise UserError(
                f"{self.name} in {builder.data_dir} is stored as {builder.info.file_format}, which "
                "cannot be read "
                "without TensorFlow; prepare it in another data.data_dir with "
                "--config.data.download=true"
            ) from error
        if not len(self.source):
            raise UserError(
                f'{self.name} split "{split}" is empty; '
                f"choose another of {', '.join(builder.info.splits)}"
            )
        self.columns = tuple(builder.info.features)
        self.names = class_names(builder.info.features) or {}
        sizes = {
            key: [info.num_examples, info.num_bytes] for key, info in builder.info.splits.items()
        }
        self.mark = {
            "source": "tfds",
            "name": self.name,
            "split": split,
            "examples": len(self.source),
            "splits": sizes,
        }

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= operator.index(index) < len(self.source):
            raise IndexError(f"record {index} of {len(self.source)}")
        record = self.source[operator.index(index)]
        try:
            return {key: named(plain(record[key]), self.names.get(key)) for key in self.columns}
        except UnicodeDecodeError as error:
            problem = "holds bytes that are not UTF-8 text; choose a data set of texts"
            raise RecordError(self.where(index), problem, index) from error

    def where(self, index: int) -> str:
        return f"{self.name} {self.split} record {index}"

    def fingerprint(self) -> Record:
        return self.mark


def prepared(name: str, data_dir: str, download: bool) -> Any:
    """Returns the builder of a data set that is prepared in the folder of TFDS, after downloading
    it if requested."""
    if not name:
        raise UserError(
            "data.source=tfds needs the name of a data set; set --config.data.name, such as "
            "glue/sst2"
        )
    builder = find_builder(name, data_dir)
    if builder.is_prepared():
        return builder
    if not download:
        raise UserError(
            f"{name} is not prepared in {builder.data_dir}; "
            "download it with --config.data.download=true, "
            "or name its folder with --config.data.data_dir=DIR"
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # any error of the network, the disk or the builder's own code
        raise UserError(
            f"{name} could not be downloaded and prepared in {builder.data_dir}: {line(error)}"
        ) from error
    return builder


def find_builder(name: str, data_dir: str) -> Any:
    """Returns the builder of a data set. Raises UserError, with suggestions, if there is none."""
    import tensorflow_datasets as tfds  # imported here because the import takes a second

    for package in LEGACY:
        importlib.import_module(f"tensorflow_datasets.{package}")
    where = {"data_dir": data_dir} if data_dir else {}
    try:
        try:
            # A prepared data set is read in its stored format; a new one is stored as ArrayRecord.
            builder = tfds.builder(name, **where)
            return (
                builder
                if builder.is_prepared()
                else tfds.builder(name, **where, file_format="array_record")
            )
        except tfds.core.registered.DatasetNotFoundError as error:
            base = name.split("/")[0]
            known = tfds.list_builders(with_community_datasets=False)
            close = (
                nearest(base, known)
                or f"; TFDS has {len(known)}, see tensorflow.org/datasets/catalog"
            )
            raise UserError(
                f'TFDS has no data set "{base}"{close}, and none is in '
                f"{data_dir or 'its own folder'}"
            ) from error
    except ImportError as error:
        raise UserError(
            f"{name} cannot be prepared without a package that is not installed ({line(error)}); "
            "prepare it elsewhere with "
            'file_format="array_record" and name its folder with --config.data.data_dir=DIR'
        ) from error
    except (ValueError, RuntimeError) as error:
        configs = tfds.builder_cls(name.split("/")[0]).builder_configs
        listed = f"; {name.split('/')[0]} has {', '.join(configs)}" if configs else ""
        raise UserError(f'TFDS cannot make "{name}": {line(error)}{listed}') from error


def line(error: Exception) -> str:
    """Returns the first non-empty line of an error."""
    return next(
        (text.strip(" *") for text in str(error).splitlines() if text.strip(" *")),
        type(error).__name__,
    )


def plain(value: Value) -> Value:
    """Returns a value of TFDS as a Python value: bytes as str, numbers as int and float, arrays as
    lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray) and value.ndim > 1:
        return value  # an image, for example
    if isinstance(value, np.ndarray | list):
        return [plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def class_names(feature: Any) -> Any:
    """Returns the names of a feature's class labels as a tuple; for nested features, a dictionary;
    None if it has none.
    """
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.ClassLabel):
        return tuple(feature.names)
    if isinstance(feature, tfds.features.FeaturesDict):
        found = {
            key: names
            for key, inner in feature.items()
            if (names := class_names(inner)) is not None
        }
        return found or None
    return class_names(feature.feature) if isinstance(feature, tfds.features.Sequence) else None


def named(value: Value, names: Any) -> Value:
    """Returns a value in which the numbers of class labels are replaced by names from
    `class_names`.
    """
    if names is None:
        return value
    if isinstance(value, list):
        return [named(part, names) for part in value]
    if isinstance(names, dict):
        return {key: named(part, names.get(key)) for key, part in value.items()}
    return None if value < 0 else ClassName(names[value], value)


SOURCES = (SourceKind("tfds", Tfds, reads="split", options=("name", "data_dir", "download")),)
