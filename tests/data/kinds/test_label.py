"""Labels: the names of a value, a source's numbers and names as one label, and the order of labels."""

from __future__ import annotations

import copy
import pickle

import pytest
from support.sources import MemoryRecords

from fmjax.data.kinds.label import ClassName, known_name, names_of, ordered
from fmjax.errors import RecordError
from fmjax.tasks.classify import Task
from fmjax.tasks.tag import Task as Tag


def test_a_class_name_is_its_name_and_keeps_its_number():
    name = ClassName("positive", 1)
    assert name == "positive" and name.number == 1 and {name: 0} == {"positive": 0}
    for again in (pickle.loads(pickle.dumps(name)), copy.deepcopy(name)):
        assert again == "positive" and again.number == 1
    assert known_name(name, ("negative", "positive")) == "positive"
    assert known_name(name, ("0", "1")) == "1" and known_name(name, ("a",)) == "positive" and known_name("1", ("a",)) == "1"


def test_names_of_values():
    assert names_of(" pos ", "here", "label") == ["pos"] and names_of(3, "here", "label") == ["3"]
    assert names_of("a|b", "here", "label", several=True) == names_of(["a", "b"], "here", "label", several=True) == ["a", "b"]
    assert names_of("", "here", "label", several=True) == []
    for value in (None, True, 1.5, "", ["a"]):
        with pytest.raises(RecordError, match='here: column "label" holds .*, not a label; correct the record'):
            names_of(value, "here", "label")


def test_order_of_labels():
    assert ordered({"b": 0, "a": 1}, str) == ("a", "b") and ordered({"10": 0} | {str(n): n for n in range(10)}, str)[10] == "10"
    assert ordered({"②": 0, "①": 1, "²": 2, "١": 3}, str) == ("²", "١", "①", "②")  # digits to Python, and names
    with pytest.raises(RecordError, match='7: label "3" does not fit; whole-number labels run from 0'):
        ordered({"0": 0, "3": 7}, str)


def numbered(*pairs: tuple[str, int]) -> MemoryRecords:
    return MemoryRecords({"text": "words", "label": ClassName(*pair)} for pair in pairs)


def test_a_benchmark_has_one_label_set_by_number_and_by_name():
    by_number = numbered(("not_entailment", 1), ("entailment", 0), ("entailment", 0))
    by_name = MemoryRecords({"text": "words", "label": name} for name in ("not_entailment", "entailment", "entailment"))
    assert Task().resolve(by_number) == Task().resolve(by_name) == {"labels": ("entailment", "not_entailment")}
    assert all(type(label) is str for label in Task().resolve(by_number)["labels"])
    task = Task(labels=("entailment", "not_entailment"))
    assert task.targets(by_number, range(3)).tolist() == task.targets(by_name, range(3)).tolist() == [1, 0, 0]


def test_a_run_that_has_numbers_for_labels_goes_on_reading_them():
    records = numbered(("worse", 1), ("better", 0))
    assert Task(labels=("0", "1")).targets(records, range(2)).tolist() == [1, 0]
    assert Task(kind="regression").targets(records, range(2)).tolist() == [1.0, 0.0]
    tags = {"tokens": ["ann", "is"], "tags": [ClassName("B-PER", 1), ClassName("O", 0)]}
    assert Tag(labels=("O", "B-PER")).read(tags, "here")[1] == ["B-PER", "O"]
    assert Tag(labels=("0", "1")).read(tags, "here")[1] == ["1", "0"]
