"""The kind of texts: what a tokenizer that is fitted here has seen, digests, and lengths of batches for prediction."""

from __future__ import annotations

import numpy as np
import pytest
from support.sources import MemoryRecords

from fmjax.contracts import Column
from fmjax.data.kinds import lifecycle, text
from fmjax.data.records import Bundle
from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.errors import RecordError
from fmjax.tasks import make

DATA = {"tokenizer_kind": "word", "vocab_size": 100, "lowercase": True}


def pieces(settings: dict, source: MemoryRecords | Bundle) -> set[str]:
    """Returns the words of the tokenizer that is trained in a run of a task."""
    found = lifecycle.fit_all(make(settings), source, DATA)
    assert list(found) == ["text"]
    return set(found.of(text.Processor).tokenizer.pieces.tokens)


# Task -> a record, of which every word in capitals has to be known to the tokenizer.
READ = {
    "classify": ({}, {"text": "ONE", "label": "no"}),
    "pairs": ({"name": "classify", "text_pair": "other"}, {"text": "ONE", "other": "TWO", "label": "no"}),
    "mlm": ({}, {"text": "ONE"}),
    "clm": ({"column": "body"}, {"body": "ONE", "text": "no"}),
    "denoise": ({}, {"text": "ONE"}),
    "tag": ({}, {"tokens": ["ONE", "TWO"], "tags": ["no", "no"]}),
    "choice": ({"start": "start"}, {"context": "ONE", "start": "TWO", "endings": ["THREE", "FOUR"], "label": 0}),
    "columns": (
        {"name": "choice", "endings": ("a", "b")},
        {"context": "ONE", "a": "TWO", "b": "THREE", "label": 0},
    ),
    "qa": ({}, {"context": "ONE", "question": "TWO", "answers": {"text": ["no"], "answer_start": [0]}}),
    "seq2seq": ({"prefix": "THREE: "}, {"source": "ONE", "target": "TWO"}),
    "span_corruption": (
        {"mode_text": "TWO {mode}", "denoisers": ("R:3:0.15", "S:0.25")},
        {"text": "ONE s r"},
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_tokenizer_sees_every_text_that_a_task_reads_or_adds(case):
    settings, record = READ[case]
    known = pieces({"name": case} | settings, MemoryRecords([record] * 3))
    words = {word.lower() for word in ("ONE", "TWO", "THREE", "FOUR") if word in str(record) + str(settings)}
    assert words and words <= known and "no" not in known


def test_a_tokenizer_sees_the_texts_of_all_parts_of_a_mixture():
    settings = {"name": "mixture", "parts": {"a": {"name": "classify", "text_pair": "other"}, "b": {"name": "mlm"}}}
    labeled = MemoryRecords([{"text": "one", "other": "two", "label": "x"}] * 2)
    assert {"one", "two", "three"} <= pieces(settings, Bundle({"a": labeled, "b": MemoryRecords([{"text": "three"}] * 2)}))


def test_what_is_not_text_is_named():
    column = Column(MemoryRecords([{"text": "a"}, {"text": 3}]), "text")
    with pytest.raises(RecordError, match='line 2: column "text" holds 3, not text; correct the record'):
        text.Processor.fit([column], DATA)
    processor = text.Processor(train_tokenizer(["a b c"] * 3, "word", 50))
    assert processor.load(["a", "b"], "here") == "a b"
    with pytest.raises(RecordError, match="here: holds None, not text"):
        processor.load(None, "here")


def test_digests_and_sizes():
    processor = text.Processor(train_tokenizer(["a b c"] * 3, "word", 50))
    assert processor.digest(" A\tb\n c") == processor.digest("a b C") == processor.digest(["a", "b c"]) == b"a b c"
    assert processor.digest(3) == processor.digest(None) == b""
    assert processor.sizes() == {"vocab_size": processor.tokenizer.vocab_size} and processor.unit == "tokens"


def test_lengths_for_prediction_are_multiples_and_padding_is_told_apart():
    processor = text.Processor(train_tokenizer(["a b c"] * 3, "word", 50))
    ones = np.ones((2, 35), np.int32)
    batch = {"input_ids": ones, "attention_mask": ones, "masked_positions": ones[:, :3], "images": ones}
    padded = processor.pad(batch, ("input_ids", "attention_mask", "masked_positions", "absent"), most=40)
    assert {name: array.shape for name, array in padded.items()} == {
        "input_ids": (2, 40), "attention_mask": (2, 40), "masked_positions": (2, 32), "images": (2, 35)
    }  # fmt: skip
    assert (padded["input_ids"][:, 35:] == processor.tokenizer.fill_id).all() and not padded["attention_mask"][:, 35:].any()
    assert processor.pad(batch, ("input_ids",), most=0)["input_ids"].shape == (2, 64)
    assert processor.pad({"input_ids": np.ones((1, 50))}, ("input_ids",), most=40)["input_ids"].shape == (1, 50)
