"""One streaming pass over the records of a task, from which a table of rows is made and kept in the
cache.

Before training, a task has to know the targets, the length of each row, and that no record is bad.
All of this needs the tokens, so the pass stores them (2 bytes each): reading a row from the mapped
file takes less than a microsecond, tokenizing it again 20 to 600. A table belongs to the content of
its records, the tokenizer and the settings that it depends on; another start uses it as it is.
Sources of one chunk are read again at each start, as are those that cannot say what they contain.
"""

from __future__ import annotations

import atexit
import dataclasses
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fmjax.contracts import Config, Record, Source, Value
from fmjax.data.identity import identity
from fmjax.data.ragged import Ragged
from fmjax.data.records import RecordSource, block_of
from fmjax.data.storage import cache
from fmjax.data.storage.tables import RAGGED, Column, Columns, Table, Values, ids, write
from fmjax.data.tokenizers.assembling import Assembled
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.distributed.progress import RecordProgress
from fmjax.errors import RecordError, UserError

FORMAT = 1  # of the tables; raised when records become other rows than before
CHUNK = 4096  # records that are tokenized together
TYPES = Column("uint8", RAGGED)  # of the tokens of a row


class Part(RecordSource):
    """Consecutive records of a source, each read once, at once if the source can."""

    def __init__(self, source: Source, begin: int, end: int):
        self.source, self.begin, self.end = source, begin, end
        self.columns = source.columns
        self.read = dict(enumerate(block_of(source, np.arange(begin, end)) or ()))

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, index: int) -> Record:
        if index not in self.read:
            self.read[index] = self.source[self.begin + index]
        return self.read[index]

    def value(self, index: int, name: str) -> Value:
        if index in self.read:
            return self.read[index][name]
        return self.source.value(self.begin + index, name)

    def where(self, index: int) -> str:
        return self.source.where(self.begin + index)

    def fingerprint(self) -> Record:
        return self.source.fingerprint() | {"begin": self.begin, "end": self.end}


def row_table(
    source: Source, columns: Columns, key: Mapping[str, Value], make: Callable[[Part], Values]
) -> Table:
    """Returns the table of rows that `make` returns for the records, part by part.

    Args:
      source: the records.
      columns: the columns of the table.
      key: JSON values that the rows depend on, besides the records.
      make: returns the rows of some records. A RecordError names a record by its place among these.

    Raises RecordError for the first bad record.
    """
    passed = partial(write_rows, source, columns, make)
    if len(source) <= CHUNK:
        held = io.BytesIO()
        passed(held)
        return Table(held.getvalue())
    name = name_of(source, key)
    if name and cache.is_writable():
        return Table(cache.get_or_make(Path("rows", f"{name}.arrow"), passed))
    folder = Path(tempfile.mkdtemp(prefix="fmjax-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "rows.arrow"
    try:
        cache.replace(path, passed, durable=False)
    except cache.CannotWrite as error:
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"{folder}: the rows of {len(source):,} records cannot be stored "
            f"({error.strerror or error}; {free:,} bytes are free); free disk space, or set the "
            "environment variable TMPDIR to another folder"
        ) from error
    return Table(path)


def write_rows(
    source: Source, columns: Columns, make: Callable[[Part], Values], stream: BinaryIO
) -> None:
    """Writes the rows of all records, and shows how far that is."""
    write(stream, columns, map(partial(made, make), parts(source)))


def made(make: Callable[[Part], Values], part: Part) -> Values:
    """Returns the rows of some records. Raises RecordError with the record's index in the
    source."""
    try:
        return make(part)
    except RecordError as error:
        # Errors of the source itself have the source's own index.
        at = error.index
        if at is not None and at < len(part) and part.where(at) == error.place:
            error.index = part.begin + at
        raise


def parts(source: Source) -> Iterator[Part]:
    """Yields the records in chunks, and shows the progress if that takes long."""
    count = len(source)
    with RecordProgress("read records", count) as progress:
        for begin in range(0, max(count, 1), CHUNK):
            end = min(begin + CHUNK, count)
            yield Part(source, begin, end)
            progress.advance(end)


def remembered(source: Source, key: Mapping[str, Value], find: Callable[[], Config]) -> Config:
    """Returns settings that `find` finds in the records, or found in an earlier start.

    The values are JSON values, except that lists are tuples.
    """
    name = name_of(source, key) if len(source) > CHUNK else ""
    if not name:
        return find()
    found = cache.remembered(Path("found", f"{name}.json"), find)
    return {name: tuple(it) if isinstance(it, list) else it for name, it in found.items()}


def settings(task: Any, ignored: tuple[str, ...] = ()) -> dict[str, Value]:
    """Returns a task's name and settings as JSON values, without the ignored ones."""
    values = dataclasses.asdict(task)
    return {"task": type(task).__module__} | {
        name: value for name, value in values.items() if name not in ignored
    }


def row_key(
    task: Any, tokenizer: Tokenizer, most: int, ignored: tuple[str, ...] = ()
) -> dict[str, Value]:
    """Returns the key of rows of at most `most` tokens, on which the ignored settings have no
    effect."""
    return settings(task, ignored) | {"most": most, "tokenizer": tokenizer.sha256}


def id_columns(tokenizer: Tokenizer, pair: bool = False) -> Columns:
    """Returns the columns of assembled texts, or pairs: `ids`, and `types` unless all are 0."""
    one = np.zeros(1, np.int32)
    _, types = tokenizer.assemble(one, one if pair else None)
    return {"ids": ids(tokenizer.vocab_size)} | ({"types": TYPES} if types.any() else {})


def id_values(rows: Assembled) -> Values:
    """Returns the values of the columns of assembled texts."""
    return {"ids": Ragged(rows.ids, rows.sizes), "types": Ragged(rows.types, rows.sizes)}


def id_rows(table: Table, indices: np.ndarray) -> Assembled:
    """Returns assembled texts of a table."""
    own, sizes = table.rows("ids", indices)
    types = table.rows("types", indices).values if "types" in table else np.zeros_like(own)
    return Assembled(own, types, sizes)


def name_of(source: Source, key: Mapping[str, Value]) -> str:
    """Returns a hash of the content of the records and the key; "" if the content is not known."""
    content = identity(source)
    if content is None:
        return ""
    return cache.name_for([FORMAT, content, key])
