"""Packing plans: every piece once, no row too long, little padding, the same from the same lengths, and fast."""

from __future__ import annotations

import cProfile
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.contracts import Examples
from fmjax.data.stream import packing
from fmjax.data.stream.packing import Plan, describe, fill_of, pack, pack_matched


def rows_of(plan: Plan) -> list[list[int]]:
    return [plan.pieces(row).tolist() for row in range(plan.rows)]


def check(plan: Plan, lengths: np.ndarray, most: int | tuple[int, ...]) -> None:
    """Asserts what holds of every plan."""
    rows, lengths = rows_of(plan), lengths.reshape(len(lengths), -1)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows) and [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all((lengths[row].sum(axis=0) <= most).all() for row in rows)
    assert plan.fill == pytest.approx(tuple(lengths.sum(axis=0) / (len(rows) * np.atleast_1d(most))))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(12, 30))
def test_every_piece_has_its_place(lengths, most):
    plan = pack(np.array(lengths), most)
    check(plan, np.array(lengths), most)
    assert plan.rows == first_fit_decreasing(lengths, most)


def first_fit_decreasing(lengths: list[int], most: int) -> int:
    """Returns how many rows the textbook's algorithm takes."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((row for row, free in enumerate(room) if free >= length), None)
        if place is None:
            room.append(most - length)
        else:
            room[place] -= length
    return len(room)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7)), min_size=1, max_size=60), st.integers(9, 20), st.integers(7, 30))
def test_pieces_of_two_lengths(pairs, first, second):
    check(pack(np.array(pairs), (first, second)), np.array(pairs), (first, second))
    plan, found = pack_matched(np.maximum(np.array(pairs), 1), first)
    check(plan, np.maximum(np.array(pairs), 1), (first, found))


def test_no_pieces_and_pieces_that_are_too_long():
    empty = pack(np.zeros(0, int), 8)
    assert empty.rows == 0 and empty.order.size == 0
    with pytest.raises(ValueError, match="a piece of"):
        pack(np.array([3, 9]), 8)


def test_a_plan_follows_from_the_lengths():
    lengths = np.random.default_rng(0).integers(1, 40, 3000)
    first, second = pack(lengths, 64), pack(lengths.tolist(), [64])
    assert np.array_equal(first.order, second.order) and np.array_equal(first.bounds, second.bounds)


def test_what_shares_a_row_comes_from_anywhere():
    lengths = np.full(3000, 7)
    apart = np.concatenate([np.diff(row) for row in rows_of(pack(lengths, 32))])
    assert np.median(apart) > 300  # of neighbours among four that are drawn from 3,000, not 1


def test_lengths_of_many_kinds_are_compared_coarsely(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 200, (4000, 2))
    fine = pack(lengths, (256, 250))
    monkeypatch.setattr(packing, "SHAPES", 300)
    coarse = pack(lengths, (256, 250))
    check(coarse, lengths, (256, 250))
    assert coarse.rows < 1.15 * fine.rows
    check(pack(np.full(5, 255), 255), np.full(5, 255), 255)


@pytest.mark.parametrize("most", [128, 512])
def test_rows_are_full_where_lengths_vary(most):
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(3.5, 1.0, 5_000).astype(int) + 1, most)
    assert pack(lengths, most).fill[0] > 0.99
    sources = np.minimum(rng.lognormal(2.5, 0.5, 5_000).astype(int) + 2, most)
    targets = np.minimum((sources * rng.lognormal(-0.3, 0.25, 5_000)).astype(int) + 2, most)
    plan, side = pack_matched(np.stack([sources, targets], axis=1), most)
    assert min(plan.fill) > 0.96 and side < 0.95 * most


def test_a_million_pieces_take_few_steps():
    lengths = np.minimum(np.random.default_rng(1).lognormal(5, 1.2, 1_000_000).astype(int) + 1, 2048)
    with cProfile.Profile() as profile:
        plan = pack(lengths, 2048)
    assert plan.fill[0] > 0.99 and sum(entry.callcount for entry in profile.getstats()) < 500_000


def test_fill_is_said():
    class Full(Examples):
        fill: ClassVar = {"input_ids": 0.98765, "labels": 0.5}

    assert describe(fill_of(Full())) == "98.8 % of input_ids, 50.0 % of labels no padding"
    assert fill_of(Examples()) == {}
