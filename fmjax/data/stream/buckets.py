"""Length buckets: batches of rows with similar lengths, which have little padding and few shapes to
compile.

An example belongs to the first bucket that it fits in, a batch to one bucket. The bucket of a batch
and its examples depend only on the seed and the batch's number, by arithmetic and one permutation
for each bucket and epoch. So reading can begin anywhere, and only the number of the batch is
stored.

In every epoch each bucket has a new permutation, cut into batches. A bucket's remainder moves to
the next longer bucket, and that of the longest bucket to its next epoch: no example is dropped or
repeated, and epoch e begins with batch floor(e N / B), as it does without buckets. The batches of
an epoch are in random order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fmjax.config.numbers import is_count, is_positive
from fmjax.contracts import Example, Examples, HostBatch, Undrawn
from fmjax.data.stream.randomness import ENDLESS
from fmjax.errors import UserError

AUTO, NONE = "auto", "none"
COUNT, MULTIPLE = 4, 8  # "auto" finds at most 4 borders, multiples of 8
SAVED = (
    0.05  # the fraction of all tokens that further borders must save, since each adds a compilation
)
MASKS = ("attention_mask", "label_weights")  # arrays that are 0 in padding


class Place(NamedTuple):
    """A batch: its bucket, an epoch, and the number of its first example in the bucket's order in
    that epoch."""

    bucket: int
    epoch: int
    first: int


class Plan:
    """The examples of each batch.

    Args:
      lengths: [N], in tokens.
      borders: the maximum length of each bucket, ascending.
      batch_size: at most N.
    """

    def __init__(self, lengths: np.ndarray, borders: Sequence[int], batch_size: int):
        bucket = np.searchsorted(borders, lengths)
        there = np.unique(bucket)
        self.borders = [int(borders[number]) for number in there]
        self.members = [np.flatnonzero(bucket == number).astype(np.int64) for number in there]
        self.total, self.size = len(lengths), batch_size
        # Each bucket's own examples, and the remainder of the previous bucket.
        self.counts: list[int] = []
        self.batches: list[int] = []  # of an epoch, per bucket
        carried = 0
        for own in self.members:
            self.counts.append(len(own) + carried)
            carried = self.counts[-1] % batch_size
            self.batches.append(self.counts[-1] // batch_size)
        self.ends = np.cumsum(self.batches[:-1]).tolist()
        self._last = ((-1, 0), Place(0, 0, 0))  # the batch that was asked for last, and its place

    def place(self, batch: int, seed: int) -> Place:
        """Returns the place of a batch."""
        asked, found = self._last  # as one value, since threads share it
        if asked != (batch, seed):
            found = self.find(batch, seed)
            self._last = (batch, seed), found
        return found

    def find(self, batch: int, seed: int) -> Place:
        """Computes the place of a batch."""
        epoch = -(-(batch + 1) * self.size // self.total) - 1
        begin, end = (at * self.total // self.size for at in (epoch, epoch + 1))
        lot = int(permutation(end - begin, seed, epoch, len(self.members))[batch - begin])
        for bucket, before in enumerate(self.ends):
            if lot < before:
                return Place(bucket, epoch, (lot - before + self.batches[bucket]) * self.size)
        # The last bucket's order continues across epochs.
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
        before = bucket - 1  # its remainder
        return self.member(before, epoch, self.batches[before] * self.size + lot - len(own), seed)

    def length(self, batch: int, seed: int) -> int:
        """Returns the length of a batch's rows."""
        return self.borders[self.place(batch, seed).bucket]

    def places(self, most: int = ENDLESS) -> float:
        """Returns the mean number of tokens that fit into the batches of an epoch, in rows of at
        most `most`."""
        each = [*(number * self.size for number in self.batches[:-1]), self.counts[-1]]
        return float(np.dot(each, np.minimum(self.borders, most)))


@functools.lru_cache(maxsize=24)
def permutation(count: int, *seeds: int) -> np.ndarray:
    """Returns the permutation of `count` numbers for some seeds. Caches the last few."""
    return np.random.default_rng(seeds).permutation(count).astype(np.uint32)


class Order:
    """The numbers of examples in the order of training."""

    def __init__(self, examples: Bucketed, seed: int):
        self.examples, self.seed = examples, seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, at: int) -> int:
        plan = self.examples.plan
        return plan.example(*divmod(at, plan.size), self.seed)


class Bucketed(Examples):
    """Examples that are read in buckets.

    Args:
      examples: with `lengths [N]`, and `sized`, the arrays whose last axis is the length, with
        padding at the end.
      borders: the lengths of buckets, ascending; the last is the maximum length of an example.
      batch_size: of training.
    """

    def __init__(self, examples: Examples, borders: Sequence[int], batch_size: int):
        self.examples, self.borders, self.batch_size = examples, list(borders), batch_size
        self.lengths: np.ndarray = np.asarray(examples.lengths)
        self.plan = Plan(self.lengths, self.borders, batch_size)
        self.fill = {
            name: float(np.sum(filled)) / self.plan.places(most)
            for name, (filled, most) in sides_of(examples).items()
        }

    def __reduce__(self) -> tuple[type[Bucketed], tuple[Examples, list[int], int]]:
        return Bucketed, (self.examples, self.borders, self.batch_size)

    @functools.cached_property
    def bucket(self) -> np.ndarray:
        """The bucket of each example in evaluation, [N]."""
        return np.searchsorted(self.borders, self.lengths)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Undrawn:
        return self.examples[index]

    def draw(self, example: Undrawn, rng: np.random.Generator) -> Example:
        return self.examples.draw(example, rng)

    def drawn(self, indices: np.ndarray) -> Example | None:
        return self.examples.drawn(indices)

    def where(self, index: int) -> str:
        return self.examples.where(index)

    def stand_in(self, index: int) -> int:
        """Returns the next example that fits into the bucket of example `index`."""
        fitting = np.flatnonzero(self.bucket <= self.bucket[index])
        return int(fitting[np.searchsorted(fitting, index, side="right") % fitting.size])

    def order(self, seed: int) -> Order:
        """Returns the numbers of the examples in the order of training."""
        return Order(self, seed)

    def trim(self, batch: HostBatch, length: int) -> Example:
        """Returns a batch without the columns from `length` on, which are padding in all rows.

        Raises UserError otherwise.
        """
        if any(batch[name][..., length:].any() for name in MASKS if name in batch):
            raise UserError(
                f"data.buckets: an example has more than the {length} tokens of its batch, so its "
                "`lengths` are wrong; correct the task, or set data.buckets=none"
            )
        return {
            name: array[..., :length] if name in self.examples.sized else array
            for name, array in batch.items()
        }

    def trim_batch(self, batch: HostBatch, number: int, seed: int) -> Example:
        """Returns a batch of training cut to the length of its bucket."""
        return self.trim(batch, self.plan.length(number, seed))

    @functools.cached_property
    def in_order(self) -> np.ndarray:
        """The numbers of the examples in the order of evaluation, bucket by bucket, [N]."""
        return np.argsort(self.bucket, kind="stable")

    def groups(self, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yields the examples of each batch of evaluation, and the length of its rows."""
        for number, border in enumerate(self.borders):
            own = np.flatnonzero(self.bucket == number)
            for begin in range(0, len(own), batch_size):
                yield own[begin : begin + batch_size], border

    def restored(self, arrays: HostBatch, valid: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of an evaluation [N, ...] in the order of the examples."""
        place = np.argsort(self.in_order)
        return {name: array[valid > 0][place] for name, array in arrays.items()}


def sides_of(examples: Examples) -> Mapping[str, tuple[np.ndarray, int]]:
    """Returns, for each array of tokens, the number of tokens of each example and the length of a
    row; empty for examples without `lengths`."""
    if examples.sides or examples.lengths is None:
        return examples.sides
    filled = examples.lengths if examples.filled is None else examples.filled
    return {"input_ids": (np.asarray(filled), examples.max_length or ENDLESS)}


def bucketed(
    examples: Examples,
    given: Sequence[int | str],
    max_length: int,
    batch_size: int,
    multiple: int = MULTIPLE,
) -> Examples:
    """Returns examples in the buckets of `data.buckets`; unchanged if it names none, or is "auto"
    and the examples have no lengths. Inferred borders are multiples of `multiple`.

    Raises UserError for malformed lengths, and if lengths are set for examples without lengths.
    """
    words = tuple(str(word) for word in given)
    known = examples.lengths is not None and len(examples.lengths) > 0
    if words in ((), (NONE,)) or (words == (AUTO,) and not known):
        return examples
    if examples.lengths is None:
        raise UserError(
            "data.buckets: all examples have one length, since they are packed, drawn anew, or "
            "come from several sources; leave it out"
        )
    longest_row = max([max_length, *(most for _, most in examples.sides.values())])
    if words == (AUTO,):
        borders = fewest_borders(examples.lengths, longest_row, batch_size, multiple)
    else:
        borders = read_borders(words, longest_row, examples.lengths, multiple)
    if int(examples.lengths.max()) > borders[-1]:
        borders = [*borders, longest_row]
    return Bucketed(examples, borders, batch_size)


def check_words(words: Sequence[str]) -> None:
    """Raises UserError unless words are lengths, "auto", "auto:N" or "none"."""
    kind, _, count = words[0].partition(":")
    found = kind == AUTO and is_positive(count)
    alone = len(words) == 1 and (words[0] in (AUTO, NONE) or found)
    if not alone and not all(is_count(word) for word in words):
        raise UserError(
            f"data.buckets={','.join(words)}: write auto, auto:N for N lengths, lengths such as "
            "32,64,128, or none"
        )


def read_borders(
    words: Sequence[str], max_length: int, lengths: np.ndarray, multiple: int = MULTIPLE
) -> list[int]:
    """Returns the lengths in `data.buckets`, or those that fit the data best; "auto:6" means six
    buckets.

    Raises UserError for a malformed length, or one longer than `data.max_length`.
    """
    check_words(words)
    if words[0].startswith(AUTO):
        return best_borders(lengths, int(words[0].removeprefix(f"{AUTO}:")), max_length, multiple)
    borders = sorted({int(word) for word in words})
    if borders[0] < 1 or borders[-1] > max_length:
        raise UserError(
            f"data.buckets={','.join(words)}: lengths must be 1 to data.max_length={max_length}; "
            "correct them"
        )
    return borders


def fewest_borders(
    lengths: np.ndarray, max_length: int, batch_size: int, multiple: int = MULTIPLE
) -> list[int]:
    """Returns the fewest borders, at most COUNT, whose batches have nearly as little padding as
    with COUNT borders."""
    ways = [best_borders(lengths, count, max_length, multiple) for count in range(1, COUNT + 1)]
    places = [Plan(lengths, borders, batch_size).places() for borders in ways]
    return next(
        borders
        for borders, tokens in zip(ways, places, strict=True)
        if tokens * (1 - SAVED) <= min(places)
    )


def best_borders(
    lengths: np.ndarray, count: int, max_length: int, multiple: int = MULTIPLE
) -> list[int]:
    """Returns at most `count` borders, multiples of `multiple` or `max_length`, with the least
    total padding."""
    steps = -(-max_length // multiple)
    borders = np.minimum(np.arange(1, steps + 1) * multiple, max_length)
    steps = int(np.searchsorted(borders, lengths.max())) + 1
    borders = borders[:steps]
    below = np.concatenate(
        [[0], np.cumsum(np.bincount(np.searchsorted(borders, lengths), minlength=steps))]
    )
    # cost[i, j]: of one bucket for lengths above border i - 1 up to border j.
    cost = np.where(
        np.arange(steps)[:, None] <= np.arange(steps),
        (below[1:] - below[:-1, None]) * borders,
        math.inf,
    )
    best, chosen = cost[0], []
    for _ in range(1, min(count, steps)):
        ways = np.where(
            np.arange(steps)[:, None] < np.arange(steps),
            best[:, None] + np.roll(cost, -1, axis=0),
            math.inf,
        )
        more = ways.min(axis=0)
        chosen.append(np.where(more < best, ways.argmin(axis=0), -1))
        best = np.minimum(more, best)
    found, last = [], steps - 1
    for before in reversed(chosen):
        if before[last] >= 0:
            found.append(int(borders[last]))
            last = int(before[last])
    return sorted({*found, int(borders[last])})
