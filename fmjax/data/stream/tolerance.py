"""Bad records: with `data.on_error="skip:N"`, up to N of them are skipped and counted; with "fail",
the first ends the run.

A bad record is one that raises RecordError. A source that finds one when opening a file calls
`tolerates`, and then delays the error until the record is read. A record that stops the preparation
of a task is removed from the source, and the preparation starts again. If an example cannot be read
in training, the next one that can be read takes its place, so that a batch still depends only on
the seed and the step.
"""

from __future__ import annotations

import contextvars
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, overload

import numpy as np

from fmjax.contracts import Example, Examples, Order, Record, Source, Undrawn, Value
from fmjax.data.records import Bundle, Selected, take
from fmjax.errors import RecordError, UserError, one_line

SKIPPED = "skipped"  # the array of a batch with the bad examples that its rows replace
LETTERS = 300  # characters of the message about a bad record
SHOWN = f"U{2 * LETTERS}"
CHUNK = 1000  # records that are prepared together to find the bad ones among them
T = TypeVar("T")

_current: contextvars.ContextVar[Tolerance | None] = contextvars.ContextVar(
    "tolerance", default=None
)


class Tolerance:
    """Skips up to `most` bad records.

    Args:
      on_error: "fail", or "skip:N".
      known: the messages about bad records that were skipped before a restart.
      tell: called with a line for each bad record that is skipped.

    Attributes:
      most: how many bad records may be skipped.
      found: the messages about skipped records, in order.

    Raises UserError for another `on_error`.
    """

    def __init__(
        self,
        on_error: str = "fail",
        known: tuple[str, ...] = (),
        tell: Callable[[str], None] = lambda text: None,
    ):
        match = re.fullmatch(r"fail|skip:([0-9]+)", str(on_error))
        if not match:
            raise UserError(
                f'data.on_error="{on_error}": write fail, or skip:N to leave out up to N bad '
                "records"
            )
        self.most, self.tell = int(match[1] or 0), tell
        self.found = list(known)

    def add(self, message: str) -> None:
        """Counts a bad record, once. Raises UserError, with its message, if that is one too
        many."""
        message = message[:LETTERS]
        if message in self.found:
            return
        if len(self.found) >= self.most:
            if not self.most:
                raise UserError(message)
            raise UserError(
                f"{message}; {self.most} bad records were already left out "
                f"(data.on_error=skip:{self.most})"
            )
        self.found.append(message)
        self.tell(f"warning: left out {message}")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes `tolerates` consult this tolerance."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    @overload
    def apply(
        self, source: Source, use: Callable[[Source], T], chunk: int = 0
    ) -> tuple[Source, T]: ...

    @overload
    def apply(
        self, source: Bundle, use: Callable[[Bundle], T], chunk: int = 0
    ) -> tuple[Bundle, T]: ...

    def apply(
        self, source: Source | Bundle, use: Callable[..., T], chunk: int = 0
    ) -> tuple[Source | Bundle, T]:
        """Returns the source without the records that `use` cannot use, and the result of `use` for
        it.

        Args:
          source: the records. A Bundle is unchanged: its parts are separate sources.
          use: called with the source, or with some of its records.
          chunk: if above 0, `use` is tried on this many records at a time, to find all bad ones
            without starting again for each.

        Raises UserError for errors that do not concern a single record, and for one bad record too
        many.
        """
        if not self.most or isinstance(source, Bundle):
            return source, use(source)
        kept: np.ndarray | range = range(len(source))
        swept = not chunk
        while True:
            watched = Watched(source, kept)
            try:
                result = use(watched)
            except UserError as error:
                bad = watched.bad_record(error)
                if bad is None:
                    raise
                self.add(one_line(error))
                kept = np.delete(kept, bad)
                if not swept:
                    kept, swept = self.sweep(source, kept, use, chunk), True
            else:
                left_out = len(source) - len(kept)
                if not left_out:
                    return source, result
                return take(source, np.asarray(kept), {"left_out": left_out}), result

    def sweep(
        self, source: Source, kept: np.ndarray | range, use: Callable[..., object], chunk: int
    ) -> np.ndarray | range:
        """Returns the records of `kept` without those that are bad when `use` reads them in
        chunks."""
        good = []
        for begin in range(0, len(kept), chunk):
            part = kept[begin : begin + chunk]
            while len(part):
                watched = Watched(source, part)
                try:
                    use(watched)
                except UserError as error:
                    bad = watched.bad_record(error)
                    if bad is None:
                        break  # not about a single record; all of them together may be fine
                    self.add(one_line(error))
                    part = np.delete(part, bad)
                else:
                    break
            good.append(part)
        return np.concatenate(good) if good else kept


def tolerates() -> bool:
    """Returns whether a source that finds a bad record when opening a file should delay the error
    until the record is read."""
    tolerance = _current.get()
    return tolerance is not None and tolerance.most > 0


def current_tolerance() -> Tolerance | None:
    """Returns the tolerance that is active, if there is one."""
    return _current.get()


class Watched(Selected):
    """Some records of a source; remembers which one could not be read, and whose location was
    requested last."""

    def __init__(self, source: Source, kept: np.ndarray | range):
        super().__init__(source, kept, {})
        self.last: tuple[int, str] | None = None
        self.failed: int | None = None

    def __getitem__(self, index: int) -> Record:
        with self.watching(index):
            return super().__getitem__(index)

    def value(self, index: int, name: str) -> Value:
        with self.watching(index):
            return super().value(index, name)

    @contextmanager
    def watching(self, index: int) -> Iterator[None]:
        """Remembers a record that cannot be read."""
        try:
            yield
        except UserError:
            self.failed = index
            raise

    def where(self, index: int) -> str:
        place = super().where(index)
        self.last = index, place
        return place

    def bad_record(self, error: UserError) -> int | None:
        """Returns the index of the record that an error is about: the one that could not be read,
        or that the error names."""
        if self.failed is not None:
            return self.failed
        if not isinstance(error, RecordError):
            return None
        if (
            error.index is not None
            and 0 <= error.index < len(self)
            and super().where(error.index) == error.place
        ):
            return error.index
        return self.last[0] if self.last and self.last[1] == error.place else None


class Guarded:
    """Examples as a stream reads them: reports which one is being read, rejects non-finite numbers,
    and, if tolerated, replaces an example that cannot be read by the next one.

    Args:
      examples: what is read.
      skip: whether to continue with the next example; the messages about bad ones are then in the
        batch as `SKIPPED`.
      note: called with the index of the example that is about to be read.
      order: the indices of the examples to read; None: of all.
    """

    def __init__(
        self,
        examples: Examples,
        skip: bool,
        note: Callable[[int], None],
        order: Order | None = None,
    ):
        self.examples, self.skip, self.note = examples, skip, note
        self.order = range(len(examples)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[int, Undrawn, tuple[str, ...]]:
        """Returns the index of the first readable example from `order[index]` on, the example, and
        the errors of the others."""
        return self.readable(int(self.order[index]), ())

    def drawn(self, numbers: np.ndarray) -> Example | None:
        """Returns the drawn examples `order[number]` as one batch; None if they have to be drawn
        one by one, which is also how a bad one is found."""
        indices = np.array([self.order[number] for number in numbers.tolist()])
        self.note(int(indices[0]))
        try:
            batch = self.examples.drawn(indices)
        except UserError:
            return None
        if batch is None or not all(map(is_finite, batch.values())):
            return None
        return batch | {SKIPPED: np.zeros(len(indices), SHOWN)} if self.skip else batch

    def readable(self, index: int, wrong: tuple[str, ...]) -> tuple[int, Undrawn, tuple[str, ...]]:
        at = index
        for _ in range(len(self.examples)):
            self.note(at)
            try:
                return at, self.examples[at], wrong
            except UserError as error:
                wrong = self.after(error, wrong)
            except Exception as error:
                error.add_note(f"while reading {self.examples.where(at)}")
                raise
            at = self.examples.stand_in(at)
        raise UserError(f"{wrong[0]}; no training example can be read")

    def after(self, error: UserError, wrong: tuple[str, ...]) -> tuple[str, ...]:
        if not self.skip:
            raise error
        return (*wrong, one_line(error, LETTERS))

    def draw(self, read: tuple[int, Undrawn, tuple[str, ...]], rng: np.random.Generator) -> Example:
        """Returns the example's arrays, drawn, and the messages about bad ones if they are
        tolerated."""
        at, example, wrong = read
        for _ in range(len(self.examples)):
            try:
                row = self.finite(self.examples.draw(example, rng), at)
                return row | {SKIPPED: np.array("\n".join(wrong), SHOWN)} if self.skip else row
            except UserError as error:
                wrong = self.after(error, wrong)
                at, example, wrong = self.readable(self.examples.stand_in(at), wrong)
        raise UserError(f"{wrong[0]}; no training example can be read")

    def finite(self, row: Example, at: int) -> Example:
        """Returns an example. Raises RecordError if one of its numbers is not finite."""
        for name, value in row.items():
            if not is_finite(value):
                raise RecordError(
                    self.examples.where(at),
                    f"has a value in {name} that is not finite; correct the record",
                )
        return row


def is_finite(value: Value) -> bool:
    """Returns whether no number of an array is infinite or NaN."""
    array = np.asarray(value)
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def take_skipped(batch: Example) -> list[str]:
    """Removes the messages about bad examples from a batch and returns them."""
    skipped = batch.pop(SKIPPED, None)
    return (
        []
        if skipped is None
        else [message for row in skipped.tolist() for message in row.split("\n") if message]
    )
