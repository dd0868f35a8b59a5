"""Finds validation records that also occur in the training data, by 8-byte hashes of the values
that a task reads.

For large data, an evenly spread sample is compared, which bounds memory (8 bytes per validation
record) and time (one pass)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import numpy as np

from fmjax.contracts import Processors, Record, Source, Value

MOST_HELD = 1_000_000  # validation records that are compared
MOST_TRAINED = 200_000  # training records
Digest: TypeAlias = Callable[[Value], bytes]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The number of `held` validation records that occur among `trained` training records; `first`
    is one of them.

    `whole` is false if only a sample was compared.
    """

    count: int
    held: int
    trained: int
    whole: bool
    first: str = ""

    def warning(self) -> str:
        """Returns a warning about the records in both."""
        sample = "" if self.whole else f" (compared with a sample of {self.trained:,})"
        return (
            f"warning: {self.count:,} of {self.held:,} validation records also occur in "
            f"training{sample}, the first is {self.first}; metrics will be too good; remove the "
            "duplicates"
        )


def find_overlap(
    train: Source, held: Source, reads: Mapping[str, str], processors: Processors
) -> Overlap | None:
    """Returns how many records of `held` have the same values as one of `train`; None if no column
    can be compared.

    Args:
      train: the training data.
      held: the validation data.
      reads: the columns that a task reads, and the kind of each.
      processors: by kind; `Processor.digest` defines the comparison.
    """
    chosen, others = spread(len(held), MOST_HELD), spread(len(train), MOST_TRAINED)
    first = held[0]
    digests = {
        name: processors[kind].digest
        for name, kind in reads.items()
        if processors[kind].digest(first[name])
    }
    if not digests:
        return None
    ours, theirs = hashes(held, chosen, digests), hashes(train, others, digests)
    found = np.flatnonzero(np.isin(ours, theirs))
    place = held.where(int(chosen[found[0]])) if found.size else ""
    whole = len(chosen) == len(held) and len(others) == len(train)
    return Overlap(int(found.size), len(chosen), len(others), whole, place)


def spread(count: int, most: int) -> np.ndarray:
    """Returns at most `most` of the numbers below `count`, evenly spread."""
    return np.arange(count) if count <= most else np.arange(most) * count // most


def hashes(source: Source, indices: Iterable[int], digests: Mapping[str, Digest]) -> np.ndarray:
    """Returns [records] uint64: a hash of each record's values, by the digest of each column."""
    return np.fromiter((hashed(source[int(index)], digests) for index in indices), np.uint64)


def hashed(record: Record, digests: Mapping[str, Digest]) -> int:
    """Returns the hash of a record's values."""
    joined = b"\0".join(digest(record[name]) for name, digest in digests.items())
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")
