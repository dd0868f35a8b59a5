"""Predicting rows of similar length together: the answers are in the order of the rows, batches as long as those of training."""

from __future__ import annotations

import numpy as np
import pytest
from support.processors import using

from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.inference.predicting import CHUNK, WINDOW, chunk_of, head_outputs, row_lengths

SIZED = ("input_ids", "attention_mask")


@pytest.fixture(scope="module")
def processors():
    return using(train_tokenizer(["a b"], "word", 20))


def outputs(lengths: np.ndarray, processors, borders: tuple[int, ...], most: int) -> tuple[dict, list[tuple[int, ...]]]:
    """Returns the outputs of rows whose ids are 1, 2, ... and the shapes in which they were computed."""
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int32)
    batch = {"input_ids": mask * (1 + np.arange(lengths.max())), "attention_mask": mask, "_texts": list(lengths)}
    shapes = []

    def features(part: dict) -> dict:
        assert set(part) == set(SIZED)
        shapes.append(part["input_ids"].shape)
        tokens = part["input_ids"] * part["attention_mask"]
        return {"classify": tokens.sum(axis=1, keepdims=True), "tag": tokens[..., None]}

    return head_outputs(features, ("classify", "tag"), processors, SIZED, most, borders, batch, 0), shapes


def test_rows_of_similar_length_are_computed_together_and_come_back_in_order(processors):
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    found, shapes = outputs(lengths, processors, (16, 24, 64), 128)
    assert found["classify"][:, 0].tolist() == (lengths * (lengths + 1) // 2).tolist()
    assert (np.count_nonzero(found["tag"][..., 0], axis=1) == lengths).all() and found["tag"].shape[1] >= lengths.max()
    assert [rows for rows, _ in shapes] == [CHUNK] * 4
    assert [length for _, length in shapes] == sorted(length for _, length in shapes)
    assert {length for _, length in shapes} <= {16, 24, 64} and shapes[0][1] < 64


def test_without_lengths_of_a_run_they_are_multiples(processors):
    found, shapes = outputs(np.array([5, 40, 3]), processors, (), 0)
    assert shapes == [(3, 64)] and found["classify"][:, 0].tolist() == [15, 820, 6]
    assert outputs(np.array([70, 3]), processors, (16, 24), 72)[1] == [(2, 72)]  # longer than those of the run


def test_rows_without_tokens_have_no_length():
    assert row_lengths({"images": np.zeros((2, 4, 4, 3))}, (), 2).tolist() == [0, 0]
    choices = np.array([[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [0, 0, 0]]])
    assert row_lengths({"attention_mask": choices}, SIZED, 2).tolist() == [2, 1]
    assert row_lengths({"attention_mask": np.array([[0, 1, 0]])}, SIZED, 1).tolist() == [2]  # padding may be in front


def test_large_outputs_are_computed_a_few_at_a_time():
    assert chunk_of({"classify": {}}, SIZED) == WINDOW
    assert chunk_of({"mlm": {}}, SIZED) == chunk_of({"classify": {}}, ()) == CHUNK
