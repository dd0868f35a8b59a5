"""What becomes of bad records: `data.on_error` is "fail", or "skip:N", which leaves out up to N of them and counts each.

A bad record is one that a mistake (UserError) names by its place: "reviews.tsv line 12: ...". A source that finds one as it
opens a file asks `tolerates`, and lets it be until it is read; one that stops a task's preparation is taken
out of the source, and the preparation begun again; one that turns up when an example is read has its place taken by the next
example that can be read, so that a batch still depends on the seed and the step alone.
"""

from __future__ import annotations

import contextvars
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from fmjax.data.records import Record, Source, Subset
from fmjax.errors import UserError, one_line

SKIPPED = "skipped"  # name of the array in a batch that says what its rows stand in for
LETTERS = 300  # of what is said about a bad record
CHUNK = 1000  # records that are prepared together to find the bad ones among them
T = TypeVar("T")

_current: contextvars.ContextVar[Tolerance | None] = contextvars.ContextVar("tolerance", default=None)


class Tolerance:
    """Up to `most` bad records are left out; `found` says which, in the order they were met."""

    def __init__(self, on_error: str = "fail", known: tuple[str, ...] = (), tell: Callable[[str], None] = lambda text: None):
        match = re.fullmatch(r"fail|skip:(\d+)", str(on_error))
        if not match:
            raise UserError(f'data.on_error="{on_error}": write fail, or skip:N to leave out up to N bad records')
        self.most, self.tell = int(match[1] or 0), tell
        self.found = list(known)

    def add(self, message: str) -> None:
        """Counts a bad record, once. Raises UserError if it is one too many, with all that is known about it."""
        message = message[:LETTERS]
        if message in self.found:
            return
        if len(self.found) >= self.most:
            if not self.most:
                raise UserError(message)
            raise UserError(f"{message}; {self.most} bad records were left out already (data.on_error=skip:{self.most})")
        self.found.append(message)
        self.tell(f"warning: left out {message}")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes this what `tolerates` asks about."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def apply(self, source: Any, use: Callable[[Any], T], chunk: int = 0) -> tuple[Any, T]:
        """Returns the source without the records that `use` stumbles over, and what `use` makes of it.

        With a `chunk`, `use` can be tried on so many records at a time, to find all bad ones without beginning again for each.
        Raises UserError for mistakes that are of no record, and for one bad record too many.
        """
        if not self.most or not hasattr(source, "where"):  # the parts of a mixture of tasks are their own sources
            return source, use(source)
        kept = np.arange(len(source))
        swept = not chunk
        while True:
            watched = Watched(source, kept)
            try:
                made = use(watched)
            except UserError as error:
                bad = watched.named(error)
                if bad is None:
                    raise
                self.add(one_line(error))
                kept = np.delete(kept, bad)
                if not swept:
                    kept, swept = self.sweep(source, kept, use, chunk), True
            else:
                return part_of(source, kept), made

    def sweep(self, source: Source, kept: np.ndarray, use: Callable[[Any], Any], chunk: int) -> np.ndarray:
        """Returns the records of `kept` that `use` does not name as bad when it is given a chunk of them."""
        good = []
        for begin in range(0, len(kept), chunk):
            part = kept[begin : begin + chunk]
            while part.size:
                watched = Watched(source, part)
                try:
                    use(watched)
                except UserError as error:
                    bad = watched.named(error)
                    if bad is None:
                        break  # of no single record; all of them together may do
                    self.add(one_line(error))
                    part = np.delete(part, bad)
                else:
                    break
            good.append(part)
        return np.concatenate(good) if good else kept


def part_of(source: Any, kept: np.ndarray) -> Any:
    """Returns a source without the records that are not kept; several sources stay several."""
    if len(kept) == len(source):
        return source
    mark = {"left_out": len(source) - len(kept)}
    return source.keep(kept, mark) if hasattr(source, "keep") else Subset(source, kept, mark)


def tolerates() -> bool:
    """Asked by a source that finds a bad record as it opens a file: whether it is to raise the error only when that is read."""
    tolerance = _current.get()
    return tolerance is not None and tolerance.most > 0


class Watched(Subset):
    """Some records of a source; knows which of them was named last, and which was read last."""

    def __init__(self, source: Source, kept: np.ndarray):
        super().__init__(source, kept, {})
        self.last: tuple[int, str] | None = None
        self.got: tuple[int, Record] | None = None
        self.failed: int | None = None

    def __getitem__(self, index: int) -> Record:
        try:
            record = super().__getitem__(index)
        except UserError:
            self.failed = index
            raise
        self.got = index, record
        return record

    def value(self, index: int, name: str) -> Any:
        try:
            value = super().value(index, name)
        except UserError:
            self.failed = index
            raise
        self.got = index, {name: value}
        return value

    def where(self, index: int) -> str:
        place = super().where(index)
        self.last = index, place
        return place

    def named(self, error: UserError) -> int | None:
        """Returns which record an error is about: the one whose reading it ended, or it begins with a record's place, or with
        what stands in it, a file's path."""
        if self.failed is not None:
            return self.failed
        if self.last and str(error).startswith(f"{self.last[1]}:"):
            return self.last[0]
        values = self.got[1].values() if self.got else ()
        if self.got and any(isinstance(value, str) and value and str(error).startswith(f"{value}:") for value in values):
            return self.got[0]
        return None


class Guarded:
    """Examples as a stream reads them: says which is being read, refuses numbers that are not finite, and puts the next
    example in the place of one that cannot be read where that is tolerated.

    Args:
      examples: random access, and `draw`.
      skip: whether to go on to the next example; what was wrong stands in the batch as `SKIPPED`.
      note: told the number of the example that is about to be read.
    """

    def __init__(self, examples: Any, skip: bool, note: Callable[[int], None]):
        self.examples, self.skip, self.note = examples, skip, note

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[int, Any, tuple[str, ...]]:
        """Returns the number of the first example from `index` on that can be read, it, and what is wrong with others."""
        return self.readable(int(index), ())

    def readable(self, index: int, wrong: tuple[str, ...]) -> tuple[int, Any, tuple[str, ...]]:
        for ahead in range(len(self)):
            at = (index + ahead) % len(self)
            self.note(at)
            try:
                return at, self.examples[at], wrong
            except UserError as error:
                wrong = self.after(error, wrong)
            except Exception as error:
                error.add_note(f"while reading {self.examples.where(at)}")
                raise
        raise UserError(f"{wrong[0]}; no training example can be read")

    def after(self, error: UserError, wrong: tuple[str, ...]) -> tuple[str, ...]:
        if not self.skip:
            raise error
        return (*wrong, one_line(error, LETTERS))

    def draw(self, read: tuple[int, Any, tuple[str, ...]], rng: np.random.Generator) -> Record:
        """Returns the example's arrays, drawn, and if bad ones are tolerated what it stands in for."""
        at, example, wrong = read
        for _ in range(len(self)):
            try:
                row = self.finite(self.examples.draw(example, rng), at)
                return row | {SKIPPED: np.array("\n".join(wrong), f"U{2 * LETTERS}")} if self.skip else row
            except UserError as error:
                wrong = self.after(error, wrong)
                at, example, wrong = self.readable((at + 1) % len(self), wrong)
        raise UserError(f"{wrong[0]}; no training example can be read")

    def finite(self, row: Record, at: int) -> Record:
        for name, value in row.items():
            array = np.asarray(value)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise UserError(f"{self.examples.where(at)}: has a value in {name} that is not finite; correct the record")
        return row


def take_skipped(batch: dict[str, np.ndarray]) -> list[str]:
    """Takes what the rows of a batch stand in for out of it."""
    told = batch.pop(SKIPPED, None)
    return [] if told is None else [message for row in told.tolist() for message in row.split("\n") if message]
