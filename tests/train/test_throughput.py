"""What a step reads: tokens that are no padding, on both sides, in all parts; or images."""

from __future__ import annotations

import numpy as np

from fmjax.tasks import classify, make
from fmjax.tasks.token_rows import packed_pairs, packed_row
from fmjax.train.throughput import count_read


def stacked(*rows: dict) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_tokens_that_are_no_padding_are_counted_once():
    texts = [np.arange(5), np.arange(3)]
    row = packed_row(texts, 12, 0)
    assert count_read(stacked(row, row), make({"name": "clm"})) == 16
    both = stacked(packed_pairs(texts, [np.arange(2), np.arange(4)], (12, 9), 0))
    assert count_read(both, make({"name": "seq2seq"})) == count_read(both, make({"name": "span_corruption"})) == 8 + 6
    padded = {"input_ids": np.ones((2, 4)), "attention_mask": np.array([[1, 1, 0, 0], [1, 1, 1, 0]])}
    assert count_read(padded, classify.Task(labels=("a", "b"))) == 5
    images = make({"name": "image_classify", "labels": ("a", "b")})
    assert count_read({"images": np.zeros((3, 2, 2, 1))}, images) == 3
    mixture = make({"name": "mixture", "parts": {"a": {"name": "clm"}, "b": {"name": "mlm"}}})
    nested = {f"{part}/{name}": array for part in "ab" for name, array in stacked(row).items()}
    assert count_read(nested, mixture) == 16
