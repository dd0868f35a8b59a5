"""The embedded corpus and the task made from it: what is in it, and that nothing held out is seen in training."""

from __future__ import annotations

import json

import pytest

from fmjax.data.sources import python_docs
from fmjax.data.sources.open import open_source
from fmjax.data.sources.prepositions import LABELS, MASK, preposition_splits, prepositions
from fmjax.data.sources.python_docs import (
    SPLITS,
    Document,
    clean,
    docstrings,
    documents,
    split_of,
    unique,
)
from fmjax.errors import UserError


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def test_docstrings_are_read_in_order_wherever_they_stand():
    source = b'''
"""Module."""
if True:
    try:
        class A:
            """Class."""
            def f(self):
                """Method."""
    except ValueError:
        async def g():
            """Handler."""
else:
    def h():
        """Else \\d."""
'''
    assert list(docstrings(source)) == ["Module.", "Class.", "Method.", "Handler.", "Else \\d."]
    assert list(docstrings(b"def (")) == []


def test_clean_keeps_prose():
    text = """Title of it
***********

Some words, wrapped
here.  And more.

>>> print(1)
1

x ::= "a" y

f(a, b[, c=1]) -> {1: 2}

 * a point of a list
"""
    assert clean(text) == "Title of it\nSome words, wrapped here. And more.\n* a point of a list"


def test_the_corpus_is_real_english():
    corpus = documents()
    words = sum(len(document.text.split()) for document in corpus)
    assert 200_000 < words < 600_000 and len(corpus) > 5000
    assert any(document.file == "topics/with" for document in corpus)
    assert any(document.file == "json/__init__.py" for document in corpus)
    assert not any(">>>" in document.text or "::=" in document.text for document in corpus)
    assert not any(part in python_docs.SKIPPED for document in corpus for part in document.file.split("/"))
    assert list(corpus) == sorted(corpus, key=lambda document: document.file)


def test_no_text_is_on_both_sides():
    parts = {split: documents(split) for split in SPLITS}
    assert sum(map(len, parts.values())) == len(documents()) == len({plain(document.text) for document in documents()})
    held_out = len(parts["validation"]) + len(parts["test"])
    assert 0.1 < held_out / len(documents()) < 0.3
    assert all(split_of(document.file) == split for split in SPLITS for document in parts[split])


def test_a_duplicate_stays_in_training():
    train, test = (next(f"{i}.py" for i in range(100) if split_of(f"{i}.py") == split) for split in ("train", "test"))
    copies = [Document(train, "The same words."), Document(test, "the  same words."), Document(test, "Others.")]
    for found in (copies, copies[::-1]):
        assert set(unique(found)) == {copies[0], copies[2]}


def test_splits_are_frozen():
    """A file must not change sides between versions of fmjax, or a stored model would be judged on what it saw."""
    names = ["json/__init__.py", "topics/with", "abc.py", "os.py", "argparse.py", "gzip.py", "chunk.py"]
    assert [split_of(name) for name in names] == ["train", "train", "train", "train", "train", "test", "test"]


@pytest.mark.parametrize("kind", ["python_docs", "prepositions"])
def test_sources(kind):
    source = open_source(kind, None, "validation")
    assert set(source[0]) == set(source.columns) and source[0]["file"] in source.where(0)
    mark = source.fingerprint()
    assert mark == json.loads(json.dumps(mark)) != open_source(kind, None, "test").fingerprint()
    with pytest.raises(UserError, match=rf'{kind} has no split "valid".*train, validation, test'):
        open_source(kind, None, "valid")


def test_auto_without_files_is_the_corpus():
    assert open_source("auto", None, "validation").fingerprint()["source"] == "python_docs"


def test_prepositions_of_a_text():
    corpus = [Document("a.py", "Reads (from disk) the list OF names, 'in' order; built-in by."), Document("b.py", "One of two")]
    found = prepositions(corpus)
    assert [(example["text"], example["label"]) for example in found] == [
        ("Reads ([MASK] disk) the list OF names, 'in' order; built-in by.", "from"),
        ("Reads (from disk) the list [MASK] names, 'in' order; built-in by.", "of"),
        ("Reads (from disk) the list OF names, 'in' order; built-in [MASK].", "by"),
    ]


def test_windows_stay_inside_their_document():
    words = [f"w{i}" for i in range(30)]
    for place in range(30):
        (example,) = prepositions([Document("a.py", " ".join([*words[:place], "of", *words[place:]]))], max_words=8)
        window = example["text"].split()
        assert len(window) == 8 and window.count(MASK) == 1
        before, after = (part.split() for part in example["text"].split(MASK))
        assert before == words[place - len(before) : place] and after == words[place : place + len(after)]


def test_preposition_splits():
    splits = preposition_splits(train=300, validation=50, test=300)
    assert {split: len(examples) for split, examples in splits.examples.items()} == {"train": 300, "validation": 50, "test": 300}
    assert splits.free["train"] > 15_000 and splits.free["test"] > 3500
    seen = {example["text"] for example in prepositions(documents("train"))}
    for split, examples in splits.examples.items():
        assert all(split_of(example["file"]) == split and example["text"].count(MASK) == 1 for example in examples)
        assert len({example["text"] for example in examples}) == len(examples)
        if split != "train":
            assert not seen & {example["text"] for example in examples}
    assert {example["label"] for example in splits.examples["train"]} == set(LABELS)
    assert preposition_splits(train=300, validation=50, test=300, seed=1).examples != splits.examples


def test_the_label_is_what_stood_at_the_mask():
    texts: dict[str, list[str]] = {}
    for document in documents("test"):
        texts.setdefault(document.file, []).append(plain(document.text))
    for example in preposition_splits(train=300, validation=50, test=300).examples["test"]:
        filled = plain(example["text"].replace(MASK, example["label"]))
        assert any(filled in text for text in texts[example["file"]]), example


def test_too_many_prepositions_are_refused():
    with pytest.raises(UserError, match="validation=100000 examples are more than the"):
        preposition_splits(validation=100_000)
