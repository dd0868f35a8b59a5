"""Tasks over the embedded corpus whose labels follow from the text."""

from __future__ import annotations

import pytest

from fmjax.data.sources import python_sentences
from fmjax.data.sources.open import open_source

DOCUMENTS = (
    ("a.py", "The first sentence stands here. It is of some words on paper.\nAnother one begins. Too short."),
    ("b.py", "One more text is read by me. It goes on to the end. Then it stops with a bang."),
    ("c.py", "The first sentence stands here. Something else follows from that."),
)


@pytest.fixture
def corpus(monkeypatch):
    for cached in (python_sentences.neighbors, python_sentences.labeled, python_sentences.choices):
        cached.cache_clear()
    monkeypatch.setattr(python_sentences, "documents", lambda split: DOCUMENTS)
    yield
    for cached in (python_sentences.neighbors, python_sentences.labeled, python_sentences.choices):
        cached.cache_clear()


def test_sentences_have_their_prepositions_and_their_length(corpus):
    source = open_source("python_sentences", None, "train")
    records = {source[index]["text"]: source[index] for index in range(len(source))}
    assert len(records) == len(source)  # each sentence once
    assert records["It is of some words on paper."]["labels"] == ["of", "on"]
    assert records["The first sentence stands here."]["labels"] == []
    assert records["It goes on to the end."]["words"] == 6
    assert "Too short." not in records


def test_the_right_choice_is_the_next_sentence(corpus):
    source = open_source("python_choices", None, "validation")
    following = {
        "It goes on to the end.": "Then it stops with a bang.",
        "One more text is read by me.": "It goes on to the end.",
    }
    seen = 0
    for index in range(len(source)):
        record = source[index]
        assert len(record["endings"]) == 4 and 0 <= record["label"] < 4
        if record["context"] in following:
            seen += 1
            assert record["endings"][record["label"]] == following[record["context"]]
    assert seen == 2


def test_a_choice_is_the_same_at_every_reading(corpus):
    first = [dict(record) for record in python_sentences.choices("train")]
    python_sentences.choices.cache_clear()
    assert first == list(python_sentences.choices("train"))
