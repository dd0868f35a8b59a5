"""SQuAD's exact match and F1: by hand, and against the figures that were published for two files of predictions."""

from __future__ import annotations

import gzip
import json

import pytest

from fmjax.data.sources.open import open_source
from fmjax.errors import UserError
from fmjax.metrics.answers import answers, exact_match, f1, normalised


def test_answers_are_compared_without_what_does_not_matter():
    assert normalised(" The  Cat's, an A.B. ") == "cats ab"
    assert normalised("theatre and another") == "theatre and another"
    assert normalised("x\u2013y") == "x\u2013y"  # the official script removes ASCII punctuation alone
    assert exact_match("the $12!", "12") == 1.0 and exact_match("13", "12") == 0.0


def test_f1_counts_words_as_often_as_they_occur():
    assert f1("the cat sat", "a cat sat down") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert f1("red red", "red") == pytest.approx(2 / 3)
    assert f1("dog", "cat") == 0.0 == f1("", "cat") == f1("the", "a")


def test_the_best_reference_counts():
    values = answers(["cat", "blue dog", "no"], [["dog", "the cat"], ["dog", "a red dog"], ["yes"]])
    assert values == {"exact_match": pytest.approx(100 / 3), "f1": pytest.approx(100 * (1 + 2 / 3) / 3)}


def test_questions_without_an_answer():
    values = answers(["", "cat", "", "dog"], [[], [], ["cat"], ["dog", "the"]])
    assert values == {
        "exact_match": 50.0,
        "f1": 50.0,
        "has_answer_exact_match": 50.0,
        "has_answer_f1": 50.0,
        "no_answer_exact_match": 50.0,
    }
    assert answers(["", "the"], [[], ["a"]])["exact_match"] == 100.0  # nothing is left of the reference: it is none


@pytest.mark.parametrize(("given", "references"), [([], []), (["a"], []), (["a"], [["a"], ["b"]])])
def test_as_many_answers_as_questions(given, references):
    with pytest.raises(UserError, match="pass one answer per question"):
        answers(given, references)


@pytest.fixture(scope="module")
def squad(shared_data) -> list[dict]:
    source = open_source("squad", str(shared_data / "qa_squad11_dev" / "dev-v1.1.rebuilt.json.gz"), "validation")
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize(
    ("file", "published"), [("logistic_regression_baseline", (40.14, 50.98)), ("bert_large_ensemble_triviaqa", (86.21, 92.20))]
)
def test_published_predictions_score_as_published(shared_data, squad, file, published):
    folder = shared_data / "qa_squad11_dev" / "published_predictions"
    predictions = json.loads(gzip.decompress((folder / f"{file}.json.gz").read_bytes()))
    values = answers([predictions.get(r["id"], "") for r in squad], [r["answers"]["text"] for r in squad])
    assert (round(values["exact_match"], 2), round(values["f1"], 2)) == published


def test_answers_that_are_right_score_100(squad):
    """By the official F1, an answer of which nothing is left to compare has 0 even against itself."""
    chosen = [max(record["answers"]["text"], key=lambda text: len(normalised(text))) for record in squad]
    perfect = answers(chosen, [record["answers"]["text"] for record in squad])
    assert perfect == {"exact_match": 100.0, "f1": 100.0}
