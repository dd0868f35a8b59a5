"""ArrayRecord files whose records are JSON objects or texts in UTF-8, as `scripts/prepare_data.py`
writes them.

Records are read by index; only the index of a file is in memory. Remote files are read by range
(`storage/record_ranges.py`). To read data sets that TFDS stores in such files, use
`data.source=tfds`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np

from fmjax.contracts import Record
from fmjax.data.records import RecordSource, columns_of, fill_columns, json_object, locate
from fmjax.data.sources.kinds import SourceKind
from fmjax.data.storage import cache
from fmjax.data.storage.mapped import decompressed
from fmjax.data.storage.ranged import RangedFile, fingerprint_of
from fmjax.errors import RecordError, UserError, one_line

THREADS = 8  # files that are opened at a time
PEEK = 100  # records whose keys become columns
# characters that do not occur in text
CONTROL = frozenset(range(32)) - frozenset(b"\t\n\v\f\r\x1b")


class ArrayRecordFile:
    """The records of a file as bytes, pickled by its path.

    Raises UserError if the file is not whole.
    """

    def __init__(self, path: Path, local: Path):
        # Imported here because the import takes a moment.
        from array_record.python.array_record_module import ArrayRecordReader

        self.path, self.local = path, local
        # Reading ahead does not help random access.
        self.reader = ArrayRecordReader(str(local), "readahead_buffer_size:0")
        if not self.reader.ok():
            raise UserError(
                f"{path}: is not a complete ArrayRecord file ({self.fault()}); fetch it again"
            )

    def __reduce__(self) -> tuple[type[ArrayRecordFile], tuple[Path, Path]]:
        return ArrayRecordFile, (self.path, self.local)

    def __len__(self) -> int:
        return int(self.reader.num_records())

    def fault(self) -> str:
        """Returns the reader's message about a file that it could not open."""
        try:
            self.reader.read([0])
        except (RuntimeError, IndexError, ValueError) as error:
            return one_line(error, 200)
        return "no index"

    def read(self, index: int) -> bytes:
        return bytes(self.reader.read([index])[0])


class RangedRecordFile:
    """The records of a remote file as bytes, read by range; pickled by the file.

    Raises UserError if the file is not whole, and CannotRange if its records are transposed.
    """

    def __init__(self, path: RangedFile):
        # Imported here because importing pyarrow takes a moment.
        from fmjax.data.storage.record_ranges import RangedRecords

        self.path, self.records = path, RangedRecords(path)
        self.records.check()

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> bytes:
        return self.records.read(index)


RecordFile: TypeAlias = ArrayRecordFile | RangedRecordFile


def opened(path: Path | RangedFile) -> RecordFile:
    """Returns the records of a file as bytes. Raises UserError if the file is not whole."""
    if isinstance(path, RangedFile):
        return RangedRecordFile(path)
    return ArrayRecordFile(path, decompressed(path))


def text_of(file: RecordFile, index: int) -> str:
    """Returns a record as text. Raises RecordError if it is damaged or not UTF-8."""
    place = f"{file.path} record {index}"
    try:
        return file.read(index).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(
            place,
            f"is not UTF-8 (byte 0x{error.object[error.start]:02x}); records must be JSON "
            "objects or text; to read a TFDS data set, use --config.data.source=tfds",
        ) from error
    except (RuntimeError, IndexError, ValueError) as error:
        raise RecordError(
            place, f"cannot be read ({one_line(error, 200)}); fetch the file again"
        ) from error


class ArrayRecords(RecordSource):
    """Records that are JSON objects, or texts as `{"text": ...}`, all like the first one. The
    columns are the keys of the first `PEEK` objects; missing values are None.

    Raises UserError, naming the file, if one is damaged or empty, and RecordError for a record that
    cannot be read.
    """

    def __init__(self, paths: Sequence[Path | RangedFile], split: str):
        self.split = split
        cache.read_digests([path for path in paths if isinstance(path, Path)])
        with ThreadPoolExecutor(THREADS) as pool:
            self.files = list(pool.map(opened, paths))
        for file in self.files:
            if not len(file):
                raise UserError(
                    f"{file.path}: no records for {split}; use a file that is not empty"
                )
        self.bounds = np.concatenate([[0], np.cumsum([len(file) for file in self.files])])
        first = text_of(self.files[0], 0)
        self.holds = "json" if is_json(first) else "text"
        self.columns = columns_of(self.first_objects()) if self.holds == "json" else ("text",)
        if self.holds == "text" and CONTROL & set(map(ord, first)):
            raise UserError(
                f"{self.files[0].path} record 0: is neither a JSON object nor text (a "
                "tf.train.Example, perhaps); to read a TFDS data set, use "
                "--config.data.source=tfds"
            )
        self.fingerprint()  # computed now, before the files can change

    def first_objects(self) -> Iterator[Record]:
        """Yields the first objects. A record that is not an object is only an error when it is
        read."""
        for index in range(min(len(self), PEEK)):
            number, row = locate(self.bounds, index)
            with contextlib.suppress(ValueError, RecordError):
                yield json_object(text_of(self.files[number], row))

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: int) -> Record:
        number, row = locate(self.bounds, index)
        text = text_of(self.files[number], row)
        if self.holds == "text":
            return {"text": text}
        try:
            return fill_columns(json_object(text), self.columns)
        except ValueError as error:
            place = f"{self.files[number].path} record {row}"
            raise RecordError(
                place, f"{error}, like the first record; correct it", index
            ) from error

    def where(self, index: int) -> str:
        number, row = locate(self.bounds, index)
        return f"{self.files[number].path.name} record {row}"

    def fingerprint(self) -> Record:
        files = [fingerprint_of(file.path) for file in self.files]
        return {"source": "array_record", "split": self.split, "files": files}


def is_json(text: str) -> bool:
    """Returns whether a record is a JSON object."""
    try:
        json_object(text)
    except ValueError:
        return False
    return True


SOURCES = (SourceKind("array_record", ArrayRecords, extensions=(".array_record",), ranged=True),)
