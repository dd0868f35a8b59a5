"""Plans which pieces of text share a row, so that little of a row is padding.

The plan depends only on the lengths of the pieces and is made once, when a run starts: an array of
piece numbers, row after row, and the bounds of the rows, so that any row is found in constant time.
Rows are filled one at a time. Each begins with the longest remaining piece, and then takes the
piece that fits best into the remaining room: with one length the longest that fits, which is
first-fit-decreasing; with several, such as sources and targets, the one whose lengths have the
largest dot product with the room (Panigrahy et al. 2011, "Heuristics for vector bin packing").
Pieces of the same lengths are interchangeable, so the pattern of a row is repeated while such
pieces remain: the time grows with the number of distinct lengths, and hardly with the number of
pieces.

Numbers of pieces take four bytes each where that is enough, since there are as many as sentences
in a corpus.

The pieces of a row complement each other in length and come from anywhere in the data, since pieces
of the same lengths are shuffled before they are assigned. They stay together in all epochs; each
epoch shuffles the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fmjax.contracts import Examples
from fmjax.data.ragged import spread

# Maximum number of distinct lengths; with more, lengths are compared in coarser units.
SHAPES = 4096


class Plan(NamedTuple):
    """Row i holds the pieces `order[bounds[i]:bounds[i + 1]]`, in ascending order; rows are in the
    order of their first piece.

    `fill` is the fraction of all rows, per length, that is not padding.
    """

    order: np.ndarray
    bounds: np.ndarray
    fill: tuple[float, ...]

    @property
    def rows(self) -> int:
        return len(self.bounds) - 1

    def pieces(self, row: int) -> np.ndarray:
        """Returns the numbers of the pieces in a row."""
        return self.order[self.bounds[row] : self.bounds[row + 1]]


def pack(lengths: np.ndarray, most: int | Sequence[int]) -> Plan:
    """Returns the plan of pieces of `lengths [N]`, or of several lengths each, `[N, D]`, in rows of
    at most `most` (D numbers).

    Raises ValueError if a piece is longer than a row.
    """
    room = np.atleast_1d(np.asarray(most, np.int64))
    lengths_ND = np.asarray(lengths).astype(np.int32, copy=False).reshape(-1, room.size)
    if (lengths_ND > room).any():
        raise ValueError(f"a piece of {lengths_ND.max(axis=0)} in rows of {room}")
    kinds, shapes, unit = compared(lengths_ND)
    # Pieces of a kind are next to each other, in an order that depends only on their number.
    dealt = np.random.default_rng(0).permutation(len(lengths_ND)).astype(number_type(len(kinds)))
    dealt = dealt[np.argsort(kinds[dealt], kind="stable")]
    counts = np.bincount(kinds, minlength=len(shapes))
    begins = np.cumsum(counts) - counts
    parts: list[np.ndarray] = []  # [rows, pieces in each]
    for pattern, times in patterns(shapes, counts.copy(), room // unit):
        taken = []
        for kind, many in pattern.items():
            taken.append(dealt[begins[kind] : begins[kind] + times * many].reshape(times, many))
            begins[kind] += times * many
        parts.append(np.sort(np.concatenate(taken, axis=1), axis=1))
    return planned(parts, lengths_ND, room)


def compared(lengths_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the kind of each piece [N], the lengths of each kind [U, D], longest first, and the
    unit of these lengths."""
    unit = 1
    while True:
        rounded = -(-lengths_ND // unit)
        sides = tuple((rounded.max(axis=0, initial=0) + 1).tolist())
        keys, kinds = unique(np.ravel_multi_index(tuple(rounded.T), sides), math.prod(sides))
        if keys.size <= SHAPES:
            break
        unit *= 2
    shapes = np.stack(np.unravel_index(keys, sides), axis=1)
    order = np.lexsort((shapes.sum(axis=1), shapes.max(axis=1)))[::-1]
    return np.argsort(order).astype(np.int16)[kinds], shapes[order], unit


def unique(values: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the unique values in order, and the number of each value [N] among them. Does not
    sort values whose `limit` is small."""
    if limit > max(4 * values.size, 2**16):
        return np.unique(values, return_inverse=True)
    keys = np.flatnonzero(np.bincount(values, minlength=limit))
    numbers = np.zeros(limit, number_type(limit))
    numbers[keys] = np.arange(keys.size)
    return keys, numbers[values]


def patterns(
    shapes: np.ndarray, left: np.ndarray, room: np.ndarray
) -> list[tuple[dict[int, int], int]]:
    """Returns how many pieces of each kind share a row, and the number of such rows, until none of
    `left [U]` remains."""
    shares = shapes / np.maximum(room, 1)
    found = []
    first = 0
    while first < len(left):
        if not left[first]:
            first += 1
            continue
        used = {first: 1}
        left[first] -= 1
        free = room - shapes[first]
        while (fitting := np.flatnonzero((left > 0) & (shapes <= free).all(axis=1))).size:
            best = int(fitting[np.argmax(shares[fitting] @ (free / np.maximum(room, 1)))])
            many = 1 if len(room) > 1 else int(min(left[best], free[0] // max(shapes[best, 0], 1)))
            used[best] = used.get(best, 0) + many
            left[best] -= many
            free = free - many * shapes[best]
        more = min(left[kind] // many for kind, many in used.items())
        for kind, many in used.items():
            left[kind] -= more * many
        found.append((used, 1 + int(more)))
    return found


def planned(parts: Sequence[np.ndarray], lengths_ND: np.ndarray, room: np.ndarray) -> Plan:
    """Returns the plan of rows, given in groups with the same number of pieces."""
    rows = (
        np.concatenate([np.full(len(part), part.shape[1]) for part in parts])
        if parts
        else np.zeros(0, np.int64)
    )
    firsts = np.concatenate([part[:, 0] for part in parts]) if parts else np.zeros(0, np.int64)
    flat = np.concatenate([part.reshape(-1) for part in parts]) if parts else np.zeros(0, np.int64)
    # Rows in the order of their first pieces, without sorting: no two are the same.
    owner = np.full(len(lengths_ND), -1, number_type(len(rows)))
    owner[firsts] = np.arange(len(rows))
    in_order = owner[owner >= 0]
    order = flat[spread((np.cumsum(rows) - rows)[in_order], rows[in_order])]
    bounds = np.concatenate([[0], np.cumsum(rows[in_order])]).astype(np.int64)
    fill = lengths_ND.sum(axis=0) / np.maximum(room * len(rows), 1)
    return Plan(order, bounds, tuple(fill.tolist()))


def number_type(count: int) -> type[np.signedinteger]:
    """Returns the type of numbers below `count`."""
    return np.int32 if count < 2**31 else np.int64


def pack_matched(lengths: np.ndarray, most: int) -> tuple[Plan, int]:
    """Returns the plan for pieces with two lengths `[N, 2]` in rows with `most` places for the
    first side, and the number of places for the second.

    To fill both sides equally, the second side is scaled by the ratio of the sums of lengths, with
    room for at least the longest piece. Of a few candidates, the one with the fullest rows on both
    sides together is chosen.
    """
    lengths = np.asarray(lengths)
    first, second = lengths.sum(axis=0).tolist()
    near = [round(most * second / first * factor) for factor in (0.96, 0.98, 1.0, 1.02, 1.04)]
    sides = sorted({max(side, int(lengths[:, 1].max())) for side in near})
    plans = [pack(lengths, (most, side)) for side in sides]
    places = [plan.rows * (most + side) for plan, side in zip(plans, sides, strict=True)]
    best = int(np.argmin(places))
    return plans[best], sides[best]


def describe(fill: Mapping[str, float]) -> str:
    """Returns one line about how full rows are, by array."""
    return (
        ", ".join(f"{100 * share:.1f} % of {name}" for name, share in fill.items()) + " no padding"
    )


def fill_of(examples: Examples) -> dict[str, float]:
    """Returns the fraction of each array of tokens that is not padding, if known; for a mixture, by
    part."""
    if examples.fill is not None:
        return dict(examples.fill)
    if examples.lengths is not None and examples.max_length:
        filled = examples.lengths if examples.filled is None else examples.filled
        return {"input_ids": float(np.mean(filled)) / examples.max_length}
    return {
        f"{part}/{name}": share
        for part, own in examples.parts.items()
        for name, share in fill_of(own).items()
    }
