"""Entities by the scheme of their tags: which one it is, what it marks, what is refused by name."""

from __future__ import annotations

import pytest

from fmjax.errors import UserError
from fmjax.metrics.entities import (
    entities,
    find_scheme,
    mark_entities,
    prefixes_of,
    scores,
    usual_scheme,
)

# The same five words by several schemes: a place of two words, a person of one, another next to it.
SENTENCES = {
    "IOB2": ["B-LOC", "I-LOC", "O", "B-PER", "B-PER"],
    "IOB1": ["I-LOC", "I-LOC", "O", "I-PER", "B-PER"],
    "IOE2": ["I-LOC", "E-LOC", "O", "E-PER", "E-PER"],
    "IOE1": ["I-LOC", "I-LOC", "O", "E-PER", "I-PER"],
    "BIOES": ["B-LOC", "E-LOC", "O", "S-PER", "S-PER"],
    "BMES": ["B_LOC", "E_LOC", "O", "S_PER", "S_PER"],
    "BILOU": ["B-LOC", "L-LOC", "O", "U-PER", "U-PER"],
}
FOUND = [("LOC", 0, 2), ("PER", 3, 4), ("PER", 4, 5)]


@pytest.mark.parametrize("name", SENTENCES)
def test_schemes_are_recognized_and_mark_the_same(name):
    tags = SENTENCES[name]
    labels = sorted({*tags, *(["M_LOC"] if name == "BMES" else [])})
    assert mark_entities(labels)
    if name == "IOE1":
        assert entities(tags) == FOUND
        with pytest.raises(UserError, match="task.mode=strict does not support the scheme IOE1"):
            find_scheme(labels, [tags, tags])
        return
    scheme = find_scheme(labels, [tags, tags])
    assert scheme == (name if name.startswith("IO") else "IOBES")
    assert entities(tags) == entities(tags, scheme) == FOUND
    for mode in ("", scheme):
        assert scores([tags], [tags], mode) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
        assert scores([tags], [["O"] * 5], mode) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_perfect_predictions_without_a_b_score_all():
    tags = ["I-PER", "I-PER", "O"]
    assert find_scheme(["O", "I-PER", "B-PER"], [tags]) == "IOB1"
    assert scores([tags], [tags], "IOB1")["f1"] == 1.0 and scores([tags], [tags], "IOB2")["f1"] == 0.0


def test_tags_that_mark_no_entities():
    for labels in (("NN", "VB", "O"), ("N-sg", "N-pl"), ("PER", "O"), ("B", "M", "E", "S")):
        assert not mark_entities(labels)
    assert prefixes_of(["O", "NN"]) is None and mark_entities(["O"]) and mark_entities([])


def test_prefixes_of_no_scheme_are_refused_by_name():
    with pytest.raises(UserError, match="the tags begin with B, L, S, which is not a known tagging scheme; convert them to BIO"):
        mark_entities(["O", "B-PER", "L-PER", "S-PER"])


def test_labels_alone_tell_the_usual_scheme():
    assert usual_scheme(["O", "B-X", "I-X"]) == usual_scheme(["O", "I-X"]) == usual_scheme([]) == "IOB2"
    assert usual_scheme(["O", "I-X", "E-X"]) == "IOE2" and usual_scheme(["O", "B-X", "L-X"]) == "IOBES"
