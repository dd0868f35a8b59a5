"""Several labels in one string: the separator is found, given, or asked for; 0 and 1 in columns of their own."""

from __future__ import annotations

import numpy as np
import pytest
from support.sources import MemoryRecords

from fmjax.data.kinds.label import flag, names_of
from fmjax.data.kinds.separators import find
from fmjax.errors import RecordError, UserError
from fmjax.tasks.classify import Task


def found(*values: str, labels: tuple[str, ...] = ()) -> str:
    return find({value: index for index, value in enumerate(values)}, "line {}".format, "label", labels)


@pytest.mark.parametrize(
    ("values", "separator"),
    [
        (("red,blue", "green", "red"), ","),  # one part recurs
        (("red, blue", "green", "blue"), ","),
        (("a;b", "b;c"), ";"),
        (("a b", "b c", "a", "c"), " "),
        (("a", "b"), "|"),
        (("a|b,c", "b,c", "b"), "|"),  # as ever, wherever it occurs
        (("Doe, J; Roe, R", "Doe, J", "Roe, R"), ";"),  # all parts recur, of "," only some
        (("New York", "Boston", "New Haven"), "|"),  # few parts recur
    ],
)
def test_the_separator_is_the_one_whose_parts_recur(values, separator):
    assert found(*values) == separator


def test_labels_that_are_given_are_not_split():
    assert found("red,blue", "x,y", labels=("red,blue", "x", "y")) == ","
    assert found("red,blue", labels=("red,blue",)) == "|"


@pytest.mark.parametrize(
    ("values", "choices"),
    [
        (("red,blue", "green"), '"," or "none"'),
        (("a,b", "c;d"), '"," or ";" or "none"'),
        (("red blue", "red", "blue gold"), '" " or "none"'),
    ],
)
def test_what_cannot_be_told_is_asked(values, choices):
    with pytest.raises(UserError) as error:
        found(*values)
    assert f'line 0: column "label" holds "{values[0]}", which may be one label or several' in str(error.value)
    assert str(error.value).endswith(f"task.separator={choices}")


def rows(*labels: str) -> MemoryRecords:
    return MemoryRecords({"text": "words", "label": label} for label in labels)


def test_a_csv_with_commas_has_three_labels():
    source = rows("red,blue", "green", "red")
    settings = Task(kind="multi").resolve(source)
    assert settings == {"separator": ",", "labels": ("blue", "green", "red")}
    targets = Task(kind="multi", **settings).targets(source, range(3))
    assert targets.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert Task(kind="multi", labels=("red", "blue", "green")).resolve(source) == {"separator": ","}
    whole = Task(kind="multi", separator="none").resolve(source)
    assert whole == {"labels": ("green", "red", "red,blue")}
    weighed = Task(kind="multi", weighting="balanced").resolve(rows("red,blue", "green", "red", "green"))
    assert weighed["class_weights"] == (3.0, 1.0, 1.0)  # absent over present
    # One label per record may hold any mark.
    assert Task().resolve(source) == {"labels": ("green", "red", "red,blue")}


def test_a_run_that_was_trained_with_whole_strings_goes_on_with_them():
    old = Task(kind="multi", labels=("green", "red", "red,blue"))  # as stored: without a separator
    assert old.resolve(rows("red,blue", "green")) == {}
    assert old.targets(rows("red,blue"), range(1)).tolist() == [[0, 0, 1]]


def test_columns_of_0_and_1():
    source = MemoryRecords([{"text": "a", "toxic": "1", "rude": "0"}, {"text": "b", "toxic": 1.0, "rude": True}])
    task = Task(kind="multi", label_columns=("toxic", "rude"))
    assert task.columns == ("text", "toxic", "rude") and task.resolve(source) == {"labels": ("toxic", "rude")}
    resolved = Task(kind="multi", label_columns=("toxic", "rude"), labels=("toxic", "rude"))
    assert np.array_equal(resolved.targets(source, range(2)), [[1, 0], [1, 1]])
    balanced = Task(kind="multi", label_columns=("toxic", "rude"), weighting="balanced")
    with pytest.raises(UserError, match='every example of the training data has the label "toxic"'):
        balanced.resolve(source)


@pytest.mark.parametrize("value", ["2", "yes", "", None, 0.5, "１"])
def test_other_values_in_columns_of_labels_are_refused(value):
    with pytest.raises(RecordError, match='line 3: column "toxic" holds .*, not 0 or 1; correct the record'):
        flag(value, "line 3", "toxic")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"separator": ","}, "task.separator is for several labels per record; set task.kind=multi"),
        ({"label_columns": ("a", "b")}, "task.label_columns is for several labels per record"),
        ({"kind": "multi", "separator": ",", "label_columns": ("a", "b")}, "two layouts of labels"),
        ({"kind": "multi", "label_columns": ("a", "a")}, 'task.label_columns: "a" occurs twice'),
        ({"kind": "multi", "label_columns": ("a", "b"), "labels": ("a", "c")}, "task.labels=a,c are not"),
    ],
)
def test_layouts_that_do_not_fit(settings, message):
    with pytest.raises(UserError, match=message):
        Task(**settings)


def test_names_in_a_string_with_any_separator():
    assert names_of("a, b,", "here", "label", several=True, separator=",") == ["a", "b"]
    assert names_of("a b", "here", "label", several=True, separator="none") == ["a b"]
    assert names_of("a::b", "here", "label", several=True, separator="::") == ["a", "b"]
