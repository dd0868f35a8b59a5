"""Length buckets: batches whose rows are about as long, so that little of them is padding, with few shapes to compile.

An example belongs to the first bucket that it fits in, a batch to one bucket; which, and which examples, follows from the seed
and the batch's number alone, by arithmetic and one permutation for each bucket and epoch. So reading can begin anywhere, and no
more than the number of the batch need be kept.

In every epoch each bucket has a new permutation, cut into batches. What is left of a bucket, fewer than a batch, goes to the next
longer one, and of the longest bucket, with what has come to it, to its next epoch: no example is dropped or repeated, and epoch e
begins with batch floor(e N / B), as it does without buckets. The batches of an epoch are in random order.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmjax.contracts import Examples
from fmjax.errors import UserError

ENDLESS = sys.maxsize
AUTO, COUNT, MULTIPLE = "auto", 4, 8  # "auto" is "auto:4"; borders that are found are multiples of 8


class Place(NamedTuple):
    """Where a batch stands: its bucket, and the number of its first example in the bucket's own order, in an epoch."""

    bucket: int
    epoch: int
    first: int


class Plan:
    """Which examples make up which batch.

    Args:
      lengths: [N], in tokens.
      borders: how long the examples of each bucket are at most, ascending.
      batch_size: at most N.
    """

    def __init__(self, lengths: np.ndarray, borders: Sequence[int], batch_size: int):
        bucket = np.searchsorted(borders, lengths)
        there = np.unique(bucket)
        self.borders = [int(borders[number]) for number in there]
        self.members = [np.flatnonzero(bucket == number).astype(np.int64) for number in there]
        self.total, self.size = len(lengths), batch_size
        self.counts: list[int] = []  # of each bucket's own examples and what comes from the one before
        self.batches: list[int] = []  # an epoch's of each bucket but the last, summed up
        carried = 0
        for own in self.members:
            self.counts.append(len(own) + carried)
            carried = self.counts[-1] % batch_size
            self.batches.append(self.counts[-1] // batch_size)
        self.ends = np.cumsum(self.batches[:-1]).tolist()

    def place(self, batch: int, seed: int) -> Place:
        """Returns where a batch stands."""
        epoch = -(-(batch + 1) * self.size // self.total) - 1
        begin, end = (at * self.total // self.size for at in (epoch, epoch + 1))
        lot = int(permutation(end - begin, seed, epoch, len(self.members))[batch - begin])
        for bucket, before in enumerate(self.ends):
            if lot < before:
                return Place(bucket, epoch, (lot - before + self.batches[bucket]) * self.size)
        # The last bucket's order runs on over the ends of epochs.
        last, lot = len(self.members) - 1, lot - (self.ends[-1] if self.ends else 0)
        return Place(last, 0, (epoch * self.counts[last] // self.size + lot) * self.size)

    def example(self, batch: int, row: int, seed: int) -> int:
        """Returns the number of the example in a row of a batch."""
        bucket, epoch, first = self.place(batch, seed)
        more, at = divmod(first + row, self.counts[bucket])
        return self.member(bucket, epoch + more, at, seed)

    def member(self, bucket: int, epoch: int, at: int, seed: int) -> int:
        """Returns the example at a place of a bucket's order in an epoch."""
        lot = int(permutation(self.counts[bucket], seed, epoch, bucket)[at])
        own = self.members[bucket]
        if lot < len(own):
            return int(own[lot])
        before = bucket - 1  # what was left there
        return self.member(before, epoch, self.batches[before] * self.size + lot - len(own), seed)

    def length(self, batch: int, seed: int) -> int:
        """Returns the length of a batch's rows."""
        return self.borders[self.place(batch, seed).bucket]

    @property
    def places(self) -> float:
        """The tokens that there is room for in the batches of an epoch, on average."""
        each = [*(number * self.size for number in self.batches[:-1]), self.counts[-1]]
        return float(np.dot(each, self.borders))


@functools.lru_cache(maxsize=24)
def permutation(count: int, *seeds: int) -> np.ndarray:
    """Returns the permutation of `count` numbers that belongs to the seeds; those of the last few buckets and epochs are kept."""
    return np.random.default_rng(seeds).permutation(count).astype(np.uint32)


class Order:
    """The numbers of examples in the order of training."""

    def __init__(self, plan: Plan, seed: int):
        self.plan, self.seed = plan, seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, at: int) -> int:
        return self.plan.example(*divmod(at, self.plan.size), self.seed)


class Bucketed(Examples):
    """Examples that are read in buckets.

    Args:
      examples: with `lengths [N]`, and `sized`, the arrays of an example whose last axis is its length, padding last.
      borders: lengths of buckets, ascending; the last as long as an example may be.
      batch_size: of training.
    """

    def __init__(self, examples: Any, borders: Sequence[int], batch_size: int):
        self.examples, self.lengths, self.borders = examples, np.asarray(examples.lengths), list(borders)
        self.batch_size = batch_size

    @functools.cached_property
    def plan(self) -> Plan:
        return Plan(self.lengths, self.borders, self.batch_size)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]

    def draw(self, example: Any, rng: np.random.Generator) -> Any:
        return self.examples.draw(example, rng)

    @property
    def fill(self) -> dict[str, float]:
        filled = self.lengths if self.examples.filled is None else self.examples.filled
        return {"input_ids": float(np.sum(filled)) / self.plan.places}

    def where(self, index: int) -> str:
        return self.examples.where(index)

    def order(self, seed: int) -> Order:
        """Returns the order of training: for each number of the stream that of an example."""
        return Order(self.plan, seed)

    def trim(self, batch: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Returns a batch without the columns from `length` on, which are padding in all of its rows."""
        if batch["attention_mask"][..., length:].any():
            raise UserError(
                f"data.buckets: an example has more than the {length} tokens of its batch, as one that stands in for a bad "
                "record may; leave data.buckets out, or set data.on_error=fail"
            )
        return {name: array[..., :length] if name in self.examples.sized else array for name, array in batch.items()}

    def trim_batch(self, batch: Mapping[str, np.ndarray], number: int, seed: int) -> dict[str, np.ndarray]:
        """Returns a batch of training in the length of its bucket."""
        return self.trim(batch, self.plan.length(number, seed))

    @functools.cached_property
    def in_order(self) -> np.ndarray:
        """[N]: the numbers of the examples in the order of evaluation: bucket by bucket."""
        return np.argsort(np.searchsorted(self.borders, self.lengths), kind="stable")

    def groups(self, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yields the examples of each batch of evaluation, and the length of its rows."""
        bucket = np.searchsorted(self.borders, self.lengths)
        for number, border in enumerate(self.borders):
            own = np.flatnonzero(bucket == number)
            for begin in range(0, len(own), batch_size):
                yield own[begin : begin + batch_size], border

    def restored(self, arrays: Mapping[str, np.ndarray], valid: np.ndarray) -> dict[str, np.ndarray]:
        """Returns what was found in evaluation, one row an example, in the order of the examples."""
        place = np.argsort(self.in_order)
        return {name: array[valid > 0][place] for name, array in arrays.items()}


def bucketed(examples: Any, given: Sequence[Any], max_length: int, batch_size: int) -> Any:
    """Returns examples in the buckets that `data.buckets` names, as they are if it names none.

    Raises UserError for lengths that are none, and for examples that have no lengths of their own.
    """
    if not given:
        return examples
    if examples.lengths is None:
        raise UserError(
            "data.buckets: these examples are of one length, as they are packed or drawn anew, or come from several sources; "
            "leave it out"
        )
    borders = read_borders(given, max_length, examples.lengths)
    longest = int(examples.lengths.max())
    return Bucketed(examples, borders if longest <= borders[-1] else [*borders, max_length], batch_size)


def read_borders(given: Sequence[Any], max_length: int, lengths: np.ndarray) -> list[int]:
    """Returns the lengths that `data.buckets` names, or those that fit the data best: "auto", or "auto:6" for six buckets.

    Raises UserError for what is no length, or longer than `data.max_length`.
    """
    words = [str(word) for word in given]
    kind, _, count = words[0].partition(":")
    if len(words) == 1 and kind == AUTO and (count.isdecimal() or not count) and count != "0":
        return best_borders(lengths, int(count or COUNT), max_length)
    if not all(word.isdecimal() for word in words):
        raise UserError(f"data.buckets={','.join(words)}: write lengths, such as 32,64,128, or auto, or auto:N for N buckets")
    borders = sorted({int(word) for word in words})
    if borders[0] < 1 or borders[-1] > max_length:
        raise UserError(f"data.buckets={','.join(words)}: lengths must be 1 to data.max_length={max_length}; correct them")
    return borders


def best_borders(lengths: np.ndarray, count: int, max_length: int) -> list[int]:
    """Returns at most `count` borders, multiples of 8 or `max_length`, for which examples have the least padding in all."""
    steps = -(-max_length // MULTIPLE)
    borders = np.minimum(np.arange(1, steps + 1) * MULTIPLE, max_length)
    steps = int(np.searchsorted(borders, lengths.max())) + 1
    borders = borders[:steps]
    below = np.concatenate([[0], np.cumsum(np.bincount(np.searchsorted(borders, lengths), minlength=steps))])
    # cost[i, j]: of one bucket for what is longer than border i - 1 and at most as long as border j.
    cost = np.where(np.arange(steps)[:, None] <= np.arange(steps), (below[1:] - below[:-1, None]) * borders, math.inf)
    best, chosen = cost[0], []
    for _ in range(1, min(count, steps)):
        ways = np.where(np.arange(steps)[:, None] < np.arange(steps), best[:, None] + np.roll(cost, -1, axis=0), math.inf)
        more = ways.min(axis=0)
        chosen.append(np.where(more < best, ways.argmin(axis=0), -1))
        best = np.minimum(more, best)
    found, last = [], steps - 1
    for before in reversed(chosen):
        if before[last] >= 0:
            found.append(int(borders[last]))
            last = int(before[last])
    return sorted({*found, int(borders[last])})
