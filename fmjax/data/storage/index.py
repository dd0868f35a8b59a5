"""Sidecar indexes: what was found by reading a whole file, such as the offsets of its records,
so that it is read only once.

An index is one file in the cache: a table of integers, of the smallest type that holds them, which
is memory-mapped; then JSON with its shape and other findings, the length of that JSON in eight
bytes, and `MAGIC`. It belongs to a content, not to a path. The indexes of small files, and of all
files if the cache cannot be written, are in memory alone.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from fmjax.contracts import Record, Value
from fmjax.data.storage import cache
from fmjax.data.stream.tolerance import tolerates
from fmjax.errors import UserError

VERSION = 1  # raised when a reader of this package finds something else in the same bytes
MAGIC = b"fmjaxidx"
CHUNK = 2**16  # numbers of rows that are gathered one by one
Rows: TypeAlias = Sequence[int] | np.ndarray  # one row, or several, [rows, width]
# Yields the rows of an index, and adds other findings, JSON values, to the record.
Scan: TypeAlias = Callable[[Record], Iterator[Rows]]


class Index:
    """A table [rows, width] and other findings; pickled by its path if it has one."""

    def __init__(self, rows: np.ndarray, facts: Record, path: Path | None = None):
        self.rows, self.facts, self.path = rows, facts, path

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Callable[..., Index], tuple[Value, ...]]:
        return (Index, (self.rows, self.facts)) if self.path is None else (mapped, (self.path,))


def index_of(
    local: Path,
    kind: str,
    options: Value,
    width: int,
    scan: Scan,
    state: tuple[int, ...] | None = None,
) -> Index:
    """Returns the index of a file, by reading it only if there is none.

    Args:
      local: the file.
      kind: the name of the reader, of which there is one in fmjax.
      options: JSON values on which the result depends.
      width: numbers per row.
      scan: reads the file. The numbers are from 0 to the file's size. May be called twice.
      state: that of the file when it was opened, if `scan` reads an open file: another may have
        taken its name since (`cache.state_of`).

    Raises UserError if the file changes meanwhile or cannot be read, and any exception of `scan`;
    then there is no index.
    """
    state = state or cache.state_of(local)
    check_state(local, state)
    size = state[0]
    kept = np.min_scalar_type(size).newbyteorder("<")
    if size < cache.SMALL:
        return in_memory(scan, width, kept)
    # Records that are skipped if bad ones are tolerated are an error otherwise.
    content = [VERSION, kind, options, cache.digest(local)["sha256"], tolerates()]
    key = cache.name_for(content)
    place = Path("index", key[:2], key)

    def make(stream: BinaryIO) -> None:
        write(scan, width, kept, stream)
        check_state(local, state)

    try:
        return mapped(cache.found_or_made(place, make))
    except cache.CannotWrite as error:
        cache.not_kept(size, error)
        return in_memory(scan, width, kept)
    except OSError as error:
        raise UserError(
            f"{local}: cannot be read ({error.strerror or error}); check the disk, or copy the "
            "file again"
        ) from error


def check_state(local: Path, state: tuple[int, ...]) -> None:
    """Raises UserError if a file has changed since it had this state."""
    if cache.state_of(local) != state:
        raise UserError(f"{local}: changed while it was read; start again when it is complete")


def in_memory(scan: Scan, width: int, kept: np.dtype) -> Index:
    """Returns an index that is not stored."""
    facts: Record = {}
    parts = [np.zeros((0, width), kept), *chunks(scan(facts), width, kept)]
    return Index(np.concatenate(parts), facts)


def write(scan: Scan, width: int, kept: np.dtype, stream: BinaryIO) -> None:
    """Writes an index, holding a part of it in memory at a time."""
    facts: Record = {}
    count = 0
    for part in chunks(scan(facts), width, kept):
        count += len(part)
        stream.write(part.tobytes())
    about = json.dumps({"type": kept.str, "shape": [count, width], "facts": facts}).encode()
    stream.write(about + len(about).to_bytes(8, "little") + MAGIC)


def chunks(rows: Iterator[Rows], width: int, kept: np.dtype) -> Iterator[np.ndarray]:
    """Yields the rows in parts of limited size, [rows, width]."""
    found = array("Q")
    for row in rows:
        if not isinstance(row, np.ndarray):
            found.extend(row)
        if found and (isinstance(row, np.ndarray) or len(found) >= CHUNK):
            yield np.array(found, kept).reshape(-1, width)
            found = array("Q")
        if isinstance(row, np.ndarray):
            yield row.astype(kept)
    if found:
        yield np.array(found, kept).reshape(-1, width)


def mapped(path: Path) -> Index:
    """Returns a stored index, memory-mapped."""
    with path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    end = len(data) - len(MAGIC) - 8
    about = json.loads(data[end - int.from_bytes(data[end : end + 8], "little") : end])
    count, width = about["shape"]
    rows = np.frombuffer(data, about["type"], count * width).reshape(count, width)
    return Index(rows, about["facts"], path)
