"""Simple baselines, on data for which their result is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from support.sources import MemoryRecords

from fmjax import tasks
from fmjax.errors import UserError
from fmjax.experiments.floors import FLOORS, Sight, sentences


def measured(name, task, train, test, **settings):
    run = SimpleNamespace(task=tasks.make({"name": task, **settings}))
    return FLOORS[name][1](Sight(run, MemoryRecords(train), MemoryRecords(test)))


def texts(*pairs):
    return [{"text": text, "label": label} for text, label in pairs]


TRAIN = texts(*[("a good film", "1"), ("good fun", "1"), ("a bad film", "0"), ("bad and bad", "0")] * 3, ("good", "1"))
TEST = texts(("good", "1"), ("bad", "0"), ("so bad", "0"))


@pytest.mark.parametrize(("name", "accuracy"), [("majority", 1 / 3), ("tfidf", 1.0), ("tfidf_characters", 1.0)])
def test_classification(name, accuracy):
    assert measured(name, "classify", TRAIN, TEST)["accuracy"] == pytest.approx(accuracy)


def test_similarity():
    rows = [
        {"a": "a red car", "b": "a red car", "score": "5"},
        {"a": "a red car", "b": "a blue car", "score": "3"},
        {"a": "a red car", "b": "two dogs", "score": "0"},
    ]
    found = measured("tfidf_similarity", "classify", rows, rows, kind="regression", text="a", text_pair="b", label="score")
    assert found["spearman"] == pytest.approx(1.0)


def test_bigrams():
    found = measured("bigrams", "clm", [{"text": "abababab"}], [{"text": "aba"}])
    # a b: 4 + 1 of 4 + 2; b a: 3 + 1 of 3 + 2
    assert found["loss"] == pytest.approx(-(math.log(5 / 6) + math.log(4 / 5)) / 2)


def test_tags():
    def row(*pairs):
        return {"tokens": [token for token, _ in pairs], "tags": [tag for _, tag in pairs]}

    train = [row(("Ada", "B-PER"), ("sings", "O"), ("on", "O")), row(("Ada", "B-PER"), ("in", "O"))]
    test = [row(("Ada", "B-PER"), ("meets", "O"), ("Bob", "B-PER"))]
    found = measured("frequent_tags", "tag", train, test, split="words")
    assert found["precision"] == 1.0 and found["recall"] == 0.5


def test_answers():
    context = "Ada wrote it. Bob read it in May."
    row = {"context": context, "question": "Who read it?", "answers": {"text": ["Bob read it in May."], "answer_start": [14]}}
    assert measured("similar_sentence", "qa", [row], [row])["exact_match"] == 100
    assert sentences(context) == ["Ada wrote it.", "Bob read it in May."]
    assert sentences("") == [""]


def test_translation():
    train = [{"en": "a small dog", "de": "ein kleiner Hund"}, {"en": "two red cars", "de": "zwei rote Autos"}]
    test = [{"en": "the small dog", "de": "ein kleiner Hund"}]
    assert measured("neighbor", "seq2seq", train, test, source="en", target="de")["chrf"] == pytest.approx(100)


def test_a_floor_of_another_task():
    with pytest.raises(UserError, match="a floor of a claim is not for the task classify"):
        measured("frequent_tags", "classify", TRAIN, TEST)
