"""Batches depend on the seed and the step alone: resumed, threaded, epoch after epoch, and once each in evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.sources import Numbers

from fmjax.data.stream.batches import Reading, TrainBatches, eval_batches


def take(batches: TrainBatches, count: int) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> bool:
    assert len(first) == len(second)
    return all(a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(first, second, strict=True))


def train(count: int = 10, batch_size: int = 4, seed: int = 3, **options: int) -> TrainBatches:
    return TrainBatches(Numbers(count), batch_size=batch_size, seed=seed, reading=Reading(**options))


def test_batches_follow_from_the_seed():
    batches = take(train(), 8)
    assert batches[0]["number"].shape == (4,) and batches[0]["noise"].shape == (4, 3)
    assert same(batches, take(train(), 8))
    assert not same(batches, take(train(seed=4), 8))


@pytest.mark.parametrize("at", [0, 1, 2, 6])
def test_a_restored_state_is_followed_by_the_same_batches(at):
    running = train()
    take(running, at)
    state = json.loads(json.dumps(running.state()))
    expected = take(running, 5)
    fresh = train()
    fresh.restore(state)
    assert same(expected, take(fresh, 5))
    # Also back in time, in an iterator that has read ahead.
    running.restore(state)
    assert same(expected, take(running, 5))


def test_each_epoch_has_each_example_once_in_another_order():
    # 10 examples in batches of 4: two epochs are 5 batches, and the third batch spans the end of the first epoch.
    numbers = np.concatenate([batch["number"] for batch in take(train(), 10)]).reshape(4, 10)
    for epoch in numbers:
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(epoch.tolist()) for epoch in numbers}) == 4
    other = np.concatenate([batch["number"] for batch in take(train(seed=4), 10)]).reshape(4, 10)
    assert not any((numbers == other).all(axis=1))


def test_what_is_drawn_is_new_each_epoch():
    epochs = take(train(count=4), 3)
    noise = [batch["noise"][np.argsort(batch["number"])] for batch in epochs]
    assert not np.isclose(noise[0], noise[1]).any() and not np.isclose(noise[1], noise[2]).any()
    # Within a batch no two rows are alike.
    assert len(np.unique(noise[0])) == noise[0].size


def test_threads_do_not_matter():
    assert same(take(train(threads=1), 9), take(train(threads=4), 9))
    assert same(take(train(threads=1), 9), take(train(threads=0), 9))


@pytest.mark.parametrize(("count", "last"), [(8, [1, 1, 1, 1]), (9, [1, 0, 0, 0]), (3, [1, 1, 1, 0])])
def test_evaluation_has_every_example_once_in_order(count, last):
    batches = list(eval_batches(Numbers(count), batch_size=4, seed=0))
    assert all(batch["number"].shape == (4,) and batch["valid"].dtype == np.float32 for batch in batches)
    numbers = np.concatenate([batch["number"] for batch in batches])
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert numbers[valid == 1].tolist() == list(range(count))
    assert batches[-1]["valid"].tolist() == last


def test_evaluation_draws_the_same_every_time():
    first, second, other = (list(eval_batches(Numbers(6), batch_size=4, seed=seed)) for seed in (1, 1, 2))
    assert same(first, second) and not same(first, other)
    # The draws are those of the examples, not of the batches they happen to be in.
    single = list(eval_batches(Numbers(6), batch_size=1, seed=1))
    assert np.array_equal(np.concatenate([batch["noise"] for batch in single])[:4], first[0]["noise"])
