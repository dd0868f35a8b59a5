"""Messages of mistakes: what a record's mistake carries, and checks of settings that say what is allowed."""

from __future__ import annotations

import pickle

import pytest

from fmjax.errors import RecordError, UserError, in_range, one_of


def test_a_mistake_in_a_record_carries_which_record_it_is_of():
    error = RecordError("a.csv line 3", "has no label; correct it", 1)
    assert str(error) == "a.csv line 3: has no label; correct it" and isinstance(error, UserError)
    again = pickle.loads(pickle.dumps(error))
    assert (again.place, again.problem, again.index, str(again)) == (error.place, error.problem, 1, str(error))
    shown = pickle.loads(pickle.dumps(RecordError("a.csv line 3", "is damaged", shown="cat.png")))
    assert str(shown) == "cat.png: is damaged" and shown.place == "a.csv line 3" and shown.index is None


def test_one_of_a_few_choices():
    one_of("task.pool", "mean", ("first", "mean"))
    with pytest.raises(UserError, match=r'^task.pool="maen" \(did you mean "mean"\?\): choose one of first, mean$'):
        one_of("task.pool", "maen", ("first", "mean"))
    with pytest.raises(UserError, match='^task.pool="3": choose one of first, mean$'):
        one_of("task.pool", 3, {"first": 1, "mean": 2})


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (1.5, {"least": 0, "most": 1}, "must be from 0 to 1"),
        (-0.1, {"least": 0, "below": 1}, "must be at least 0 and less than 1"),
        (1, {"least": 0, "below": 1}, "must be at least 0 and less than 1"),
        (0, {"above": 0}, "must be above 0"),
        (0, {"above": 0, "most": 1}, "must be above 0 and at most 1"),
        (-1, {"least": 0}, "must not be negative"),
        (0, {"least": 1}, "must be at least 1"),
        (3, {"most": 2}, "must be at most 2"),
        ("1", {"least": 0}, "must not be negative"),
        (True, {"least": 0}, "must not be negative"),
        (None, {}, "must be a number"),
        (float("nan"), {"least": 0}, "must not be negative"),
    ],
)
def test_numbers_out_of_range(value, bounds, message):
    with pytest.raises(UserError) as caught:
        in_range("a.b", value, **bounds)
    assert str(caught.value) == f"a.b={value}: {message}"
    with pytest.raises(UserError, match="; 0 is none$"):
        in_range("a.b", value, **bounds, hint="0 is none")


def test_numbers_in_range():
    least_and_most = {"least": 0, "most": 0}
    for value, bounds in ((0, {"least": 0}), (1, {"most": 1}), (0.5, {"above": 0, "below": 1}), (-3, {}), (0, least_and_most)):
        in_range("a.b", value, **bounds)
