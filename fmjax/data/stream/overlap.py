"""Whether records that a run is judged by are among those it is trained on: compared by 8-byte hashes of their texts.

Of large data a sample is compared, evenly spread, which bounds memory (8 bytes a record of validation) and time (one pass).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fmjax.data.records import Source

MOST_HELD = 1_000_000  # records of validation that are compared
MOST_TRAINED = 200_000  # records of training


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How many of `held` records of validation are among `trained` records of training; `first` is one of them.

    `whole` is false where these are a sample.
    """

    count: int
    held: int
    trained: int
    whole: bool
    first: str = ""

    def warning(self) -> str:
        """Returns a line about what is in both."""
        among = f"the {self.trained:,} of training" if self.whole else f"{self.trained:,} of training that were compared"
        return (
            f"warning: {self.count:,} of {self.held:,} records of validation have the text of one among {among} "
            f"({self.first} is the first), so their metrics may flatter; take them out of one side"
        )


def text_columns(task: Any, source: Source) -> list[str]:
    """Returns the columns of texts that a task reads, without those of its labels."""
    named = [getattr(task, field.name) for field in dataclasses.fields(task) if not field.name.startswith(("label", "tag"))]
    return [name for name in source.columns if name in named]


def find_overlap(train: Source, held: Source, columns: Sequence[str]) -> Overlap | None:
    """Returns how many records of `held` have the same texts as one of `train`; None if no column holds text."""
    chosen, others = spread(len(held), MOST_HELD), spread(len(train), MOST_TRAINED)
    texts = [name for name in columns if isinstance(held[0][name], str)]
    if not texts:
        return None
    ours, theirs = hashes(held, chosen, texts), hashes(train, others, texts)
    found = np.flatnonzero(np.isin(ours, theirs))
    first = held.where(int(chosen[found[0]])) if found.size else ""
    whole = len(chosen) == len(held) and len(others) == len(train)
    return Overlap(int(found.size), len(chosen), len(others), whole, first)


def spread(count: int, most: int) -> np.ndarray:
    """Returns at most `most` of the numbers below `count`, evenly spread."""
    return np.arange(count) if count <= most else np.arange(most) * count // most


def hashes(source: Source, indices: Iterable[int], columns: Sequence[str]) -> np.ndarray:
    """Returns [records] uint64: a hash of each record's texts, but for case and white space."""
    return np.fromiter((digest(source[int(index)], columns) for index in indices), np.uint64)


def digest(record: dict[str, Any], columns: Sequence[str]) -> int:
    text = "\0".join(" ".join(str(record[name]).lower().split()) for name in columns)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
