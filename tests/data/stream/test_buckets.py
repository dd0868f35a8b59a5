"""Length buckets: each batch of one bucket, each example once an epoch, the same from any number and on any hosts; evaluation in
order; borders that fit the data."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.contracts import Examples
from fmjax.data.stream.balance import Resampled
from fmjax.data.stream.batches import TrainBatches, eval_batches
from fmjax.data.stream.buckets import (
    Bucketed,
    Plan,
    best_borders,
    bucketed,
    fewest_borders,
    read_borders,
)
from fmjax.data.stream.packing import fill_of
from fmjax.distributed.layout import length_parts
from fmjax.errors import UserError

LONGEST = 24
BORDERS = (6, 12, LONGEST)


class Texts(Examples):
    """Examples of given lengths, padded at the end: example i has tokens i + 1."""

    sized = ("input_ids", "attention_mask")
    max_length = LONGEST

    def __init__(self, lengths: list[int] | np.ndarray):
        self.lengths = np.asarray(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict:
        mask = (np.arange(LONGEST) < self.lengths[index]).astype(np.int32)
        return {"input_ids": mask * (index + 1), "attention_mask": mask, "labels": np.int32(index)}

    def draw(self, example: dict, rng: np.random.Generator) -> dict:
        return example | {"noise": rng.random(2)}


def lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, LONGEST + 1, count)


def train(examples: Texts, size: int = 4, seed: int = 3, **options) -> TrainBatches:
    return TrainBatches(Bucketed(examples, BORDERS, size), batch_size=size, seed=seed, **options)


def take(batches: TrainBatches, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(batches, count))


def same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a) for a, b in zip(first, second, strict=True)
    )


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, LONGEST), min_size=7, max_size=60), st.integers(1, 7), st.integers(0, 99))
def test_every_epoch_has_every_example_once(found, size, seed):
    plan, count = Plan(np.array(found), BORDERS, size), len(found)
    epochs = 6
    batches = epochs * count // size
    stream = [[plan.example(batch, row, seed) for row in range(size)] for batch in range(batches)]
    for batch, rows in enumerate(stream):
        assert all(found[row] <= plan.length(batch, seed) for row in rows)
    # By the batches that begin before its end, epoch e has been gone through but for what its last bucket still keeps.
    seen = np.bincount(np.concatenate(stream).astype(int), minlength=count)
    assert seen.sum() == batches * size and seen.min() >= epochs - 1 - plan.size // plan.counts[-1] and seen.max() <= epochs
    if count % size == 0 and all(number % size == 0 for number in plan.counts):
        for epoch in range(epochs):
            rows = np.concatenate(stream[epoch * count // size : (epoch + 1) * count // size])
            assert sorted(rows.tolist()) == list(range(count))


@pytest.mark.parametrize("size", [4, 5, 7])
def test_batches_are_of_one_bucket(size):
    # Each bucket's length is that of the batches, and what goes up to a longer one is less than a batch an epoch.
    examples = Texts(lengths(53))
    shapes, up = set(), 0
    for batch in take(train(examples, size), 10 * 53 // size):
        width = batch["input_ids"].shape[1]
        shapes.add(width)
        own = examples.lengths[batch["labels"]]
        assert width in BORDERS and batch["attention_mask"].shape == (size, width) and batch["noise"].shape == (size, 2)
        assert np.array_equal(batch["attention_mask"].sum(axis=1), own)
        assert np.array_equal(batch["input_ids"][:, 0], batch["labels"] + 1)
        up += int((np.searchsorted(BORDERS, own) < BORDERS.index(width)).sum())
    assert shapes == set(BORDERS) and up <= 11 * 2 * (size - 1)


def test_epochs_and_seeds_differ():
    examples = Texts(lengths(48))
    first, second, other = take(train(examples), 12), take(train(examples), 24)[12:], take(train(examples, seed=4), 12)
    orders = [np.concatenate([batch["labels"] for batch in batches]).tolist() for batches in (first, second, other)]
    assert len({tuple(order) for order in orders}) == 3
    widths = [[batch["input_ids"].shape[1] for batch in batches] for batches in (first, second, other)]
    assert widths[0] != sorted(widths[0]) and widths[0] != widths[1]
    noise = np.concatenate([batch["noise"] for batch in (*first, *second)])
    assert len(np.unique(noise)) == noise.size


@pytest.mark.parametrize("at", [0, 3, 17])
def test_a_restored_state_is_followed_by_the_same_batches(at):
    examples = Texts(lengths(29))
    running = train(examples)
    take(running, at)
    state = json.loads(json.dumps(running.state()))
    expected = take(running, 9)
    fresh = train(examples)
    fresh.restore(state)
    assert same(expected, take(fresh, 9))


def test_hosts_read_their_rows_of_the_same_batches():
    examples = Texts(lengths(29))
    whole = take(train(examples), 15)
    parts = [take(train(examples, rows=rows), 15) for rows in (np.array([0, 1]), np.array([2, 3]))]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)]
    assert same(whole, joined)


def test_a_far_batch_is_reached_at_once():
    many = np.tile(np.arange(1, LONGEST + 1), 50_000)
    plan = Plan(many, BORDERS, 32)
    far = 10**9
    assert [plan.example(far, row, 1) for row in range(32)] == [plan.example(far, row, 1) for row in range(32)]
    assert many[[plan.example(far, row, 1) for row in range(32)]].max() <= plan.length(far, 1)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_evaluation_has_every_example_once_and_gives_results_in_order(size):
    examples = Bucketed(Texts(lengths(23)), BORDERS, 4)
    batches = list(eval_batches(examples, batch_size=size, seed=0))
    assert all(batch["input_ids"].shape[0] == size == len(batch["valid"]) for batch in batches)
    assert [batch["input_ids"].shape[1] for batch in batches] == sorted(batch["input_ids"].shape[1] for batch in batches)
    arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in ("labels", "noise")}
    valid = np.concatenate([batch["valid"] for batch in batches])
    restored = examples.restored(arrays, valid)
    assert restored["labels"].tolist() == list(range(23))
    # What is drawn is an example's, in buckets or not.
    plain = np.concatenate([batch["noise"] for batch in eval_batches(examples.examples, batch_size=1, seed=0)])
    assert np.array_equal(restored["noise"], plain)
    # A host reads its rows of every batch.
    if size == 4:
        part = list(eval_batches(examples, batch_size=4, seed=0, rows=np.array([1, 3])))
        assert all(np.array_equal(a["labels"][[1, 3]], b["labels"]) for a, b in zip(batches, part, strict=True))


def test_no_token_is_ever_cut_off():
    examples = Bucketed(Texts([3, 9, 20]), BORDERS, 2)
    with pytest.raises(UserError, match="more than the 6 tokens of its batch"):
        examples.trim({"attention_mask": np.ones((2, 9), np.int32)}, 6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=50), st.integers(1, 4))
def test_borders_that_are_found_are_the_best(found, count):
    lengths = np.array(found)
    borders = best_borders(lengths, count, 64)
    possible = range(8, 65, 8)
    top = -(-lengths.max() // 8) * 8
    ways = [sorted({*chosen, top}) for number in range(count) for chosen in itertools.combinations(possible, number)]
    padded = [np.array(way)[np.searchsorted(way, lengths)].sum() for way in ways if max(way) == top]
    assert len(borders) <= count and borders[-1] == top
    assert np.array(borders)[np.searchsorted(borders, lengths)].sum() == min(padded)


def test_what_a_config_may_say():
    examples = Texts(lengths(200))
    assert bucketed(examples, (), LONGEST, 4) is examples
    assert bucketed(examples, ("6", 12), LONGEST, 4).borders == [6, 12, LONGEST]  # the longest have a place too
    assert bucketed(Texts([5, 7]), (12, 8), LONGEST, 2).borders == [8, 12]
    assert bucketed(examples, ("auto:3",), LONGEST, 4).borders == [8, 16, 24] == read_borders(["auto:4"], 24, examples.lengths)
    assert read_borders(["auto:4"], 20, np.array([19, 3])) == [8, 20]
    assert bucketed(examples, ("none",), LONGEST, 4) is examples
    packed = Examples()  # have no lengths
    assert bucketed(packed, ("auto",), LONGEST, 4) is packed
    for given_, message in (
        ((0, 4), "1 to data.max_length=24"),
        ((32,), "1 to"),
        (("auto:0",), "write auto"),
        (("x",), "write"),
        (("auto", "none"), "write"),
    ):
        with pytest.raises(UserError, match=f"data.buckets=.*{message}"):
            bucketed(examples, given_, LONGEST, 4)
    with pytest.raises(UserError, match="data.buckets: all examples have one length"):
        bucketed(Examples(), (8,), LONGEST, 2)


@pytest.mark.parametrize(
    ("found", "borders"),
    [
        (np.full(40, 5), [8]),  # one length
        (np.repeat([7, 64], [2, 98]), [64]),  # 2 of 100 are short: a second program would save less than 5 %
        (np.repeat([7, 64], [50, 50]), [8, 64]),
        (np.repeat([7, 64], [3, 3]), [64]),  # fewer than a batch are short, so they go to the longer ones
        (np.arange(1, 129).repeat(3), [32, 64, 96, 128]),
        (np.array([70, 3]), [100]),  # as data.max_length
    ],
)
def test_auto_finds_the_fewest_lengths_that_are_worth_a_program(found, borders):
    assert fewest_borders(found, 100 if 100 in borders else 128, 4, 100 if 100 in borders else 8) == borders


def test_lengths_that_are_found_divide_over_the_mesh():
    config = {"mesh": {"axes": {"context": 4, "data": -1}, "rules": "fsdp_context"}}
    assert length_parts(config) == 4 and length_parts({"mesh": {"axes": {"data": -1}, "rules": "dp"}}) == 1
    assert bucketed(Texts(lengths(200)), ("auto",), LONGEST, 4, 12).borders == [12, 24]


def test_what_stands_in_for_a_bad_example_fits_in_its_batch():
    examples = Bucketed(Texts([20, 3, 9, 5, 20, 2]), BORDERS, 2)
    found = [examples.stand_in(index) for index in range(6)]
    assert found == [1, 3, 3, 5, 5, 1]
    assert all(examples.lengths[one] <= BORDERS[examples.bucket[index]] for index, one in enumerate(found))


def test_fill_is_that_of_the_batches():
    examples = Bucketed(Texts(lengths(64)), BORDERS, 4)
    batches = take(TrainBatches(examples, batch_size=4, seed=0), 16 * 40)
    filled = sum(batch["attention_mask"].sum() for batch in batches) / sum(batch["attention_mask"].size for batch in batches)
    assert fill_of(examples)["input_ids"] == pytest.approx(filled, rel=0.02)
    assert fill_of(examples.examples)["input_ids"] == pytest.approx(examples.lengths.mean() / LONGEST)


def test_resampled_examples_keep_their_lengths():
    examples = Bucketed(Resampled(Texts([3, 9, 20, 2]), np.array([2, 2, 1, 0])), BORDERS, 2)
    assert examples.lengths.tolist() == [20, 20, 9, 3] and {b["input_ids"].shape[1] for b in take(train(examples.examples, 2), 9)}
