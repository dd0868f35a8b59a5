"""Makes batches of examples: batch = f(seed, step), the same for any number of hosts, workers and
restarts.

A stream of batches has random access, so reading can begin anywhere: the state of `TrainBatches`
is the number of batches it has returned, and it resumes in constant time. The threads and worker
processes that read ahead are Grain's; they must end with the process that started them
(`watch.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags

from fmjax.contracts import Config, Example, Examples, HostBatch, Undrawn
from fmjax.data.stream.buckets import Bucketed
from fmjax.data.stream.handing import Handed
from fmjax.data.stream.randomness import ENDLESS, Generators, Shuffled
from fmjax.data.stream.tolerance import SKIPPED, Guarded, Tolerance, take_skipped
from fmjax.data.stream.watch import (
    Slots,
    Watchdog,
    begin_reader,
    how_it_ended,
    notice_every_end,
)
from fmjax.errors import UserError

NEXT = "global_next_index"  # key of the state: number of examples returned, over all hosts


class Drawable(Protocol):
    """Random access to examples that `draw` turns into arrays: `Examples`, or guarded ones."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Undrawn: ...

    def draw(self, example: Undrawn, rng: np.random.Generator, /) -> Example: ...

    def drawn(self, indices: np.ndarray, /) -> Example | None: ...


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How batches are read. It does not affect their content.

    Attributes:
      threads: number of threads that read ahead in this process, if there are no workers.
      workers: number of processes that read ahead.
      prefetch: number of batches to read ahead.
      stall_seconds: seconds of waiting for a batch before a warning; 0: never.
    """

    threads: int = 1
    workers: int = 0
    prefetch: int = 4
    stall_seconds: float = 0.0


class TrainBatches:
    """An endless iterator over shuffled training batches, with a small dictionary as its state.

    Each epoch is a new permutation of the examples, cut into batches without regard to the ends of
    epochs, so that none is dropped or repeated. Randomness in an example depends only on the seed
    and the example's number in the stream. Examples with an `order` of their own, such as those of
    a mixture, come in that order; with length buckets, a batch is as long as its bucket.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
        reading: Reading = Reading(),
        rows: np.ndarray | None = None,
        tolerance: Tolerance | None = None,
        tell: Callable[[str], None] = to_stderr,
    ):
        """
        Args:
          examples: the examples to read.
          batch_size: examples per batch, over all hosts.
          seed: determines the order, and randomness in examples.
          reading: how they are read.
          rows: the rows of each batch that this host reads; None: all.
          tolerance: what to do about examples that cannot be read; None: an error.
          tell: called with each warning.
        """
        self._size, self._reading, self._seed = batch_size, reading, seed
        self._examples, self._tolerance, self._tell = examples, tolerance or Tolerance(), tell
        self._slots = Slots(reading.workers)
        self._watchdog = Watchdog(reading.stall_seconds, self._stalled)
        order = examples.order(seed)
        self._handed = Handed(Guarded(examples, self._tolerance.most > 0, self._slots.note, order))
        stream = Stream(self._handed, seed, shuffled=order is None)
        each = range(batch_size) if rows is None else rows.tolist()
        self._batches = grain.MapDataset.source(Batches(stream, batch_size, each))
        self._returned = 0  # batches
        self._iterator: Any = None

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Example:
        """Returns this host's rows of the next batch. Raises UserError for a record that cannot be
        read, and for a worker that has died."""
        if self._iterator is None:
            self._iterator = iter(self._reader())
        try:
            with self._watchdog.waiting():
                batch: Example = next(self._iterator)
        except RuntimeError as error:
            if how := how_it_ended(error):
                raise UserError(self._dead(how)) from None
            raise
        for message in take_skipped(batch):
            self._tolerance.add(message)
        if isinstance(self._examples, Bucketed):
            batch = self._examples.trim_batch(batch, self._returned, self._seed)
        self._returned += 1
        return batch

    def _reader(self) -> Any:
        """Returns Grain's iterable over the batches from the next one on."""
        reading = self._reading
        ahead = 0 if reading.workers else reading.prefetch
        options = grain.ReadOptions(
            num_threads=reading.threads if ahead else 0, prefetch_buffer_size=ahead
        )
        batches = self._batches[self._returned :].to_iter_dataset(options)
        if not reading.workers:
            return batches
        notice_every_end()
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain has flags of its own, whose defaults are fine
        each = grain.MultiprocessingOptions(
            reading.workers,
            per_worker_buffer_size=max(-(-reading.prefetch // reading.workers), 1),
        )
        return batches.mp_prefetch(
            each, worker_init_fn=functools.partial(begin_reader, os.getpid())
        )

    def _stalled(self, waited: float) -> None:
        places = [self._examples.where(index) for index in self._slots.reading() if index >= 0]
        reading = ", ".join(places) or "nothing yet"
        self._tell(
            f"warning: no batch for {waited:.0f} s (data.stall_seconds); being read: {reading}"
        )

    def _dead(self, how: str) -> str:
        name, reading = f"data.workers={self._reading.workers}", self._slots.reading()
        if not self._slots.begun():
            return (
                f"{name}: a worker process {how} before it read anything; workers import the "
                'script, so call fmjax.fit in it under if __name__ == "__main__":, or set '
                "data.workers=0"
            )
        dead = [reader for reader in self._slots.dead() if reading[reader] >= 0]
        named = [
            f"worker {reader}, reading {self._examples.where(reading[reader])}," for reader in dead
        ]
        return (
            f"{name}: {' and '.join(named) or 'one of them'} {how}; check that record and the free "
            "memory, or set data.workers=0"
        )

    def state(self) -> dict[str, int]:
        """Returns the position of the iterator as JSON values. It is the same on every host and for
        any number of hosts."""
        return {NEXT: self._returned * self._size}

    def restore(self, state: Mapping[str, int]) -> None:
        """Moves to the position of a `state`."""
        self._stop()
        self._returned = state[NEXT] // self._size

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None  # Grain's iterators complain if they still exist when Python exits

    def close(self) -> None:
        """Stops the threads and processes that read ahead."""
        self._watchdog.close()
        self._stop()
        self._slots.close()
        self._handed.close()


class Stream:
    """The drawn, guarded examples of training: shuffled anew in each epoch, without end, or in
    order."""

    def __init__(self, examples: Handed, seed: int, shuffled: bool):
        self.examples = examples
        self.order = Shuffled(len(examples), seed) if shuffled else None
        self.generators = Generators(seed, shuffled)

    def __len__(self) -> int:
        return len(self.examples) if self.order is None else ENDLESS

    def __getitem__(self, at: int) -> Example:
        read = self.examples[at if self.order is None else self.order[at]]
        drawn: Example = self.examples.draw(read, self.generators[at])
        return drawn

    def batch(self, places: Sequence[int]) -> Example:
        """Returns the examples at some places as one batch, drawn together if possible."""
        numbers = places if self.order is None else [self.order[at] for at in places]
        return self.examples.drawn(np.array(numbers)) or stacked([self[at] for at in places])


class Batches:
    """The batches of a stream, of each of which this host reads some rows."""

    def __init__(self, stream: Stream, size: int, rows: Sequence[int]):
        self.stream, self.size, self.rows = stream, size, rows

    def __len__(self) -> int:
        return len(self.stream) // self.size

    def __getitem__(self, number: int) -> Example:
        begin = number * self.size
        return self.stream.batch([begin + row for row in self.rows])


def stacked(rows: Sequence[Example]) -> Example:
    """Returns a batch of examples."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def eval_batches(
    examples: Drawable, *, batch_size: int, seed: int, rows: np.ndarray | None = None
) -> Iterator[Example]:
    """Yields every example once, in order, in batches of one size; `valid [B]` is 0 for rows that
    fill up the last batch.

    Examples in length buckets come bucket by bucket, each in order, in batches as long as their
    bucket. `rows` are the rows of each batch that this host reads; None: all.
    """
    generators = Generators(seed)
    chosen = np.arange(batch_size) if rows is None else rows
    for numbers, trim in groups(examples, batch_size):
        valid = (chosen < len(numbers)).astype(np.float32)
        own = [int(numbers[row if real else 0]) for row, real in zip(chosen, valid, strict=True)]
        batch = examples.drawn(np.array(own))
        if batch is None:
            read = [examples.draw(examples[number], generators[number]) for number in own]
            batch = stacked(read)
        yield trim(batch) | {"valid": valid}


def batch_spec(batch: HostBatch) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a batch."""
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}


def batch_shapes(config: Config, examples: Examples) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a global training batch, by the first example."""
    # Where bad records are left out, the first may be one.
    skip = config["data"].get("on_error", "fail") != "fail"
    first = next(eval_batches(Guarded(examples, skip, lambda index: None), batch_size=1, seed=0))
    size = config["data"]["batch_size"]
    return {
        name: jax.ShapeDtypeStruct((size, *one.shape[1:]), one.dtype)
        for name, one in batch_spec(first).items()
        if name not in ("valid", SKIPPED)
    }


def groups(
    examples: Drawable, batch_size: int
) -> Iterator[tuple[Sequence[int] | np.ndarray, Callable[[Example], Example]]]:
    """Yields the indices of the examples of each evaluation batch, and a function that trims the
    batch to its length."""
    if isinstance(examples, Bucketed):
        for numbers, length in examples.groups(batch_size):
            yield numbers, functools.partial(examples.trim, length=length)
        return
    for begin in range(0, len(examples), batch_size):
        yield range(begin, min(begin + batch_size, len(examples))), dict
