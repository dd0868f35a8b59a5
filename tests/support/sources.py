"""Sources of records and examples in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from fmjax.contracts import Example, Examples, Record, Value


class MemoryRecords(list[Record]):
    """A source of records in memory. A subclass says what `where` calls a record: `place` and `first`."""

    place: ClassVar[str] = "line"
    first: ClassVar[int] = 1  # the number of the first record; 2 where a header is line 1

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self[0])

    def value(self, index: int, name: str) -> Value:
        return self[index][name]

    def where(self, index: int) -> str:
        return f"{self.place} {index + self.first}"

    def fingerprint(self) -> Record:
        return {"sha256": hashlib.sha256(repr(list(self)).encode("utf-8", "surrogatepass")).hexdigest()}


class Numbers(Examples):
    """Examples that are their own numbers, from `begin` on, with random noise drawn.

    `bad[i]` is called when example i is read; `more` is part of every example; `read` lists what has been read.
    """

    def __init__(
        self,
        count: int,
        begin: int = 0,
        *,
        bad: Mapping[int, Callable[[], Any]] | None = None,
        classes: np.ndarray | None = None,
        **more: int,
    ):
        self.count, self.begin, self.bad, self.classes, self.more = count, begin, bad or {}, classes, more
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def where(self, index: int) -> str:
        return f"file.bin record {index}"

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(index)
        if index in self.bad:
            self.bad[index]()
        self.read.append(index)
        return {"number": np.int64(self.begin + index), **{name: np.int64(value) for name, value in self.more.items()}}

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        return {**example, "noise": rng.random(3, np.float32)}
