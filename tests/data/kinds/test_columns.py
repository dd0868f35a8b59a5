"""Kinds of numbers and categories: fitted to columns, arrays by hand, errors, stored and restored."""

from __future__ import annotations

import numpy as np
import pytest
from support.sources import MemoryRecords

from fmjax.contracts import Column, Processors
from fmjax.data.kinds import category, number
from fmjax.errors import RecordError, UserError

ROWS = MemoryRecords(
    [
        {"age": 20, "height": "1.5", "city": "Rome"},
        {"age": 40.0, "height": "1.5", "city": "Oslo"},
        {"age": "60", "height": 1.5, "city": 7},
    ]
)
NUMBERS, CATEGORIES = [Column(ROWS, "age"), Column(ROWS, "height")], [Column(ROWS, "city")]
line = "line {}".format


def test_numbers_are_scaled_to_mean_0_and_deviation_1():
    fitted = number.Processor.fit(NUMBERS, {})
    assert fitted.scales == {"age": (40.0, pytest.approx(np.std([20, 40, 60]))), "height": (1.5, 1.0)}
    arrays = fitted.arrays(ROWS, line)
    assert arrays.dtype == np.float32 and arrays.shape == (3, 2)
    np.testing.assert_allclose(arrays[:, 0], np.array([-1, 0, 1]) * 1.2247449, rtol=1e-6)
    assert not arrays[:, 1].any()  # one value alone: nothing to divide by
    assert fitted.sizes() == {"numbers": 2} and fitted.unit == "rows" and fitted.digest(" 3 ") == fitted.digest("3") == b"3"
    assert fitted.load("2.5", "here") == 2.5


@pytest.mark.parametrize("value", [None, "", "many", True, float("nan"), float("inf"), [1]], ids=repr)
def test_what_is_not_a_number_is_named(value):
    rows = MemoryRecords([{"age": 1}, {"age": value}])
    with pytest.raises(RecordError, match='line 2: column "age" holds .*, not a number; correct the record'):
        number.Processor.fit([Column(rows, "age")], {})
    fitted = number.Processor({"age": (0.0, 1.0)})
    with pytest.raises(RecordError, match='line 1: column "age" holds'):
        fitted.arrays(rows, line)
    with pytest.raises(RecordError, match='line 0: lacks "age", which the task reads; add it'):
        fitted.arrays([{"other": 1}], line)


def test_category_names_are_those_of_the_data():
    fitted = category.Processor.fit(CATEGORIES, {})
    assert fitted.names == {"city": ("7", "Oslo", "Rome")} and fitted.digest(7) == b"7"


def test_categories_have_ids_of_their_own_and_one_per_column_for_unknown_names():
    fitted = category.Processor({"city": ("Oslo", "Rome"), "color": ("red",)})
    records = [{"city": " Rome ", "color": "red"}, {"city": "Bonn", "color": "blue"}, {"city": "Oslo", "color": "red"}]
    ids = fitted.arrays(records, line)
    assert ids.dtype == np.int32 and ids.tolist() == [[2, 4], [0, 3], [1, 4]]
    assert fitted.sizes() == {"categories": 5} and fitted.load(3, "here") == "3"
    with pytest.raises(RecordError, match='line 1: column "city" holds None, not the name of a category'):
        fitted.arrays([records[0], {"city": None, "color": "red"}], line)


@pytest.mark.parametrize("value", [None, "", " ", True, 1.5, ["a"]], ids=repr)
def test_what_is_no_category_is_named(value):
    with pytest.raises(RecordError, match='line 1: column "city" holds .*, not the name of a category; correct the record'):
        category.Processor.fit([Column(MemoryRecords([{"city": value}]), "city")], {})


@pytest.mark.parametrize("kind", [number, category])
def test_columns_are_stored_and_restored(kind, tmp_path):
    fitted = kind.Processor.fit(NUMBERS if kind is number else CATEGORIES, {})
    fitted.save(tmp_path / "new" / "folder")
    restored = kind.Processor.restore(tmp_path / "new" / "folder")
    assert restored == fitted and restored.sha256 == fitted.sha256 and len(fitted.sha256) == 64
    assert np.array_equal(restored.arrays(ROWS, line), fitted.arrays(ROWS, line))
    other = kind.Processor.fit([Column(MemoryRecords(ROWS[:2]), "age" if kind is number else "city")], {})
    assert other.sha256 != fitted.sha256
    with pytest.raises(UserError, match="columns.json: no such file"):
        kind.Processor.restore(tmp_path)
    with pytest.raises(UserError, match="columns.json: cannot be written"):
        (tmp_path / "file").write_text("")
        fitted.save(tmp_path / "file" / "below")


def test_processors_have_sizes_and_a_unit_together():
    both = Processors(number.Processor({"a": (0.0, 1.0)}), category.Processor({"b": ("x",)}))
    assert both.sizes() == {"numbers": 1, "categories": 2} and both.unit == "rows" and list(both) == ["number", "category"]
    assert both.of(number.Processor).scales == {"a": (0.0, 1.0)} and Processors().unit == "rows"
    with pytest.raises(TypeError, match="no processor of the kind number; the kinds here: category"):
        Processors(both["category"]).of(number.Processor)
