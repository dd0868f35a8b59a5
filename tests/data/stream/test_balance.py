"""Resampling by class: how many of each class, which, the same for a seed, and none of it after a resumption changed."""

from __future__ import annotations

import numpy as np
import pytest
from support.sources import Numbers

from fmjax.data.stream.balance import Resampled, balance, indices, targets
from fmjax.data.stream.batches import TrainBatches
from fmjax.errors import UserError

CLASSES = np.array([0] * 40 + [1] * 10 + [3] * 5)
COUNTS = np.bincount(CLASSES)


@pytest.mark.parametrize(
    ("kind", "power", "expected"),
    [
        ("oversample", 1.0, [40, 40, 0, 40]),
        ("oversample", 0.0, [40, 10, 0, 5]),
        ("oversample", 0.5, [40, 20, 0, 14]),  # 40 (n / 40)^1/2
        ("undersample", 1.0, [5, 5, 0, 5]),
        ("undersample", 0.0, [40, 10, 0, 5]),
        ("undersample", 0.5, [14, 7, 0, 5]),
    ],
)
def test_classes_have_the_sizes_asked_for_and_all_examples_of_one_the_same_share(kind, power, expected):
    assert targets(COUNTS, kind, power).tolist() == expected
    chosen = indices(CLASSES, kind, power, seed=0)
    assert np.bincount(CLASSES[chosen], minlength=4).tolist() == expected
    times = np.bincount(chosen, minlength=len(CLASSES))
    for number in (0, 1, 3):
        own = times[number == CLASSES]
        assert own.max() - own.min() <= 1
    if power == 0:
        assert chosen.tolist() == list(range(len(CLASSES)))


def test_the_choice_is_the_seeds_alone():
    first, again, other = (indices(CLASSES, "undersample", 1.0, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_batches_of_resampled_examples_are_even_and_resumed_exactly():
    def batches():
        return TrainBatches(balance(Numbers(len(CLASSES), classes=CLASSES), "oversample", 1.0, 0), batch_size=20, seed=0)

    whole = batches()
    epoch = [next(whole) for _ in range(6)]
    drawn = np.concatenate([batch["number"] for batch in epoch])
    assert len(drawn) == 120 and np.bincount(CLASSES[drawn]).tolist() == [40, 40, 0, 40]
    noise = np.concatenate([batch["noise"] for batch in epoch])
    assert len(np.unique(noise[:, 0])) > 110  # a repeated example is drawn anew
    state = whole.state()
    expected = [next(whole) for _ in range(3)]
    resumed = batches()
    resumed.restore(state)
    for batch in expected:
        found = next(resumed)
        assert all(found[name].tobytes() == batch[name].tobytes() for name in batch)


def test_none_leaves_the_examples_as_they_are():
    examples = Numbers(len(CLASSES), classes=CLASSES)
    assert balance(examples, "none", 1.0, 0) is examples
    assert isinstance(balance(examples, "undersample", 1.0, 0), Resampled)


@pytest.mark.parametrize(
    ("kind", "power", "classes", "message"),
    [
        ("oversampel", 1.0, CLASSES, r'data\.balance="oversampel" \(did you mean "oversample"\?\): choose one of none, '),
        ("oversample", 1.5, CLASSES, r"data\.balance_power=1\.5: must be from 0 "),
        ("oversample", 1.0, None, r"data\.balance=oversample needs a task whose examples have one class each"),
    ],
)
def test_mistakes_are_named(kind, power, classes, message):
    examples = Numbers(len(CLASSES), classes=classes)
    with pytest.raises(UserError, match=message) as raised:
        balance(examples, kind, power, 0)
    assert "\n" not in str(raised.value)
