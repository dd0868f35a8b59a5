"""Tables of numbers in Arrow files: a row per example, memory-mapped, pickled by path.

A column has one number per row, a vector of one size, or, in a ragged column, an array of any size.
Arrow's file format ends in a directory of its batches, so a table can be written as a stream, and a
file that was cut off is not taken for whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from fmjax.data.ragged import Ragged, ragged, spread

# Of a column, in some rows.
Cells: TypeAlias = np.ndarray | Sequence[np.ndarray | np.generic] | Ragged
Values: TypeAlias = Mapping[str, Cells]


class Column(NamedTuple):
    """The type of a column. `width` is the size of its vectors: 0 for one number per row, RAGGED
    for arrays of any size."""

    dtype: str
    width: int = 0

    @property
    def kind(self) -> pa.DataType:
        number = pa.from_numpy_dtype(np.dtype(self.dtype))
        if self.width == RAGGED:
            return pa.list_(number)
        return pa.list_(number, self.width) if self.width else number

    def array(self, values: Cells) -> pa.Array:
        """Returns the Arrow array of some rows. Raises OverflowError if a number does not fit into
        the column's type."""
        if self.width == RAGGED:
            rows = values if isinstance(values, Ragged) else ragged(values)
            ends = fitting(np.concatenate([[0], np.cumsum(rows.sizes)]), "int32")
            joined = fitting(rows.values, self.dtype)
            return pa.ListArray.from_arrays(pa.array(ends), pa.array(joined))
        flat = pa.array(fitting(np.asarray(values), self.dtype).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, self.width) if self.width else flat


def fitting(values: np.ndarray, dtype: str) -> np.ndarray:
    """Returns numbers as another type, contiguous. Raises OverflowError instead of wrapping."""
    if np.issubdtype(dtype, np.integer) and values.size:
        info = np.iinfo(dtype)
        if not info.min <= values.min() <= values.max() <= info.max:
            raise OverflowError(f"{values.min()} to {values.max()} do not fit into {dtype}")
    return np.ascontiguousarray(values, dtype)


RAGGED = -1
Columns: TypeAlias = Mapping[str, Column]


def ids(vocab_size: int) -> Column:
    """Returns a ragged column of ids, in as few bytes as the vocabulary allows."""
    return Column("uint16" if vocab_size <= 2**16 else "uint32", RAGGED)


def write(stream: BinaryIO, columns: Columns, parts: Iterable[Values]) -> None:
    """Writes the rows of a table, part by part."""
    schema = pa.schema([(name, column.kind) for name, column in columns.items()])
    with pa.ipc.new_file(stream, schema) as writer:
        for values in parts:
            arrays = [column.array(values[name]) for name, column in columns.items()]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


class Table:
    """The rows of a file, or of the bytes of one."""

    def __init__(self, content: Path | bytes):
        self.content = content
        buffer = (
            pa.py_buffer(content)
            if isinstance(content, bytes)
            else pa.memory_map(str(content)).read_buffer()
        )
        reader = pa.ipc.open_file(buffer)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._begins = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._views = {
            name: [view(batch.column(name)) for batch in batches] for name in reader.schema.names
        }
        # Of ragged columns, where the values and the bounds of each batch stand in the file.
        self._bytes = np.frombuffer(buffer, np.uint8)
        self._places = {
            name: places(views, self._bytes)
            for name, views in self._views.items()
            if all(bounds is not None for _, bounds in views)
        }

    def __reduce__(self) -> tuple[type[Table], tuple[Path | bytes]]:
        return Table, (self.content,)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __contains__(self, name: str) -> bool:
        return name in self._views

    def value(self, name: str, index: int) -> np.ndarray:
        """Returns a row of a column: a number [], a vector [C], or an array [n] of a ragged column.

        It is a view of the file. Raises IndexError beyond the last row.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = int(np.searchsorted(self._begins, index, side="right")) - 1
        row = index - int(self._begins[batch])
        values, ends = self._views[name][batch]
        return np.asarray(values[row] if ends is None else values[ends[row] : ends[row + 1]])

    def rows(self, name: str, indices: np.ndarray) -> Ragged:
        """Returns some rows of a ragged column. Raises IndexError beyond the last row."""
        if not ((indices >= 0) & (indices < len(self))).all():
            raise IndexError(indices)
        batch = np.searchsorted(self._begins, indices, side="right") - 1
        values, bounds = self._places[name][:, batch]
        at = bounds + indices - self._begins[batch]
        begins, ends = (self._numbers(np.dtype(np.int32))[at + side] for side in (0, 1))
        sizes = (ends - begins).astype(np.int64)
        own = self._numbers(self._views[name][0][0].dtype)
        return Ragged(own[spread(values + begins, sizes)], sizes)

    def _numbers(self, dtype: np.dtype) -> np.ndarray:
        """Returns the bytes of the file as numbers of a type."""
        return self._bytes[: self._bytes.size // dtype.itemsize * dtype.itemsize].view(dtype)

    def numbers(self, name: str) -> np.ndarray:
        """Returns a column of numbers [N] or vectors [N, C], in memory."""
        return np.concatenate([values for values, _ in self._views[name]])

    def sizes(self, name: str) -> np.ndarray:
        """Returns the size of each array of a ragged column, int64 [N], in memory."""
        sizes = [np.diff(ends) for _, ends in self._views[name] if ends is not None]
        return np.concatenate([np.zeros(0, np.int64), *sizes])

    def counts(self, name: str, kinds: int) -> np.ndarray:
        """Returns how often each of the numbers below `kinds` occurs in a column, int64 [kinds]."""
        each = [np.bincount(values, minlength=kinds) for values, _ in self._views[name]]
        return np.asarray(np.sum(each, axis=0))


def view(array: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the values of a column's batch, and for a ragged column the bounds of its arrays."""
    if pa.types.is_list(array.type):
        return array.values.to_numpy(), array.offsets.to_numpy()
    if pa.types.is_fixed_size_list(array.type):
        return array.values.to_numpy().reshape(len(array), array.type.list_size), None
    return array.to_numpy(), None


def places(views: Sequence[tuple[np.ndarray, np.ndarray | None]], file: np.ndarray) -> np.ndarray:
    """Returns where the values and the bounds of each batch of a ragged column stand in the bytes
    of a file, in numbers of their types, int64 [2, batches]."""
    return np.array(
        [
            [(address(own) - address(file)) // own.itemsize for own in side if own is not None]
            for side in zip(*views, strict=True)
        ],
        np.int64,
    ).reshape(2, -1)


def address(array: np.ndarray) -> int:
    """Returns where the values of an array stand in memory."""
    return int(array.__array_interface__["data"][0])
