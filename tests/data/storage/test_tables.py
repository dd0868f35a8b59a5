"""Tables of numbers: written in parts, read as they were, pickled by path."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fmjax.data.storage.tables import RAGGED, Column, Table, ids, write

COLUMNS = {"ids": ids(70_000), "small": ids(2**16), "label": Column("int32"), "flags": Column("float32", 3)}


def rows(count: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "ids": [rng.integers(0, 70_000, size) for size in rng.integers(0, 5, count)],
        "small": [rng.integers(0, 2**16, size) for size in rng.integers(0, 5, count)],
        "label": rng.integers(0, 9, count),
        "flags": rng.random((count, 3), np.float32),
    }


@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_are_read_as_they_were_written(tmp_path, in_memory):
    parts, path = [rows(count, count) for count in (3, 0, 5, 1)], tmp_path / "a.arrow"
    with path.open("wb") as stream:
        write(stream, COLUMNS, parts)
    table = Table(path.read_bytes() if in_memory else path)
    for copy in (table, pickle.loads(pickle.dumps(table))):
        assert len(copy) == 9 and "ids" in copy and "types" not in copy
        for name, column in COLUMNS.items():
            expected = [value for part in parts for value in part[name]]
            assert all(np.array_equal(copy.value(name, index), value) for index, value in enumerate(expected))
            assert all(copy.value(name, index).dtype == column.dtype for index in range(9))
            if column.width == RAGGED:
                assert copy.sizes(name).tolist() == [value.size for value in expected]
            else:
                assert np.array_equal(copy.numbers(name), np.array(expected))
    assert table.value("ids", 0).dtype == np.uint32 and table.value("small", 0).dtype == np.uint16
    assert in_memory or len(pickle.dumps(table)) < 300


def test_a_file_that_was_cut_off_is_no_table(tmp_path):
    path = tmp_path / "a.arrow"
    with path.open("wb") as stream:
        write(stream, COLUMNS, [rows(50, 0)])
    whole = path.read_bytes()
    for size in (0, 8, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError):
            Table(whole[:size])


def test_a_number_that_does_not_fit_is_not_wrapped(tmp_path):
    with (tmp_path / "a.arrow").open("wb") as stream, pytest.raises(OverflowError, match="65536 do not fit into uint16"):
        write(stream, {"ids": ids(2**16)}, [{"ids": [np.array([1]), np.array([65536])]}])
