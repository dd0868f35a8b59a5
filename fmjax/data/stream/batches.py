"""From examples to batches with Grain: batch = f(seed, step), the same for any number of hosts, workers and restarts.

A stream of examples has random access, so that reading can begin anywhere: `TrainBatches` needs no more than the number of
batches it has given, and goes on in constant time. Worker processes are Grain's; its `ElasticIterator`, whose three lines are
here, has no way to set them up, and they are to end with the process that started them (`watch.py`).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from fmjax.data.stream.buckets import Bucketed
from fmjax.data.stream.tolerance import Guarded, Tolerance, take_skipped
from fmjax.data.stream.watch import Slots, Watchdog, begin_reader, how_it_ended
from fmjax.errors import UserError

Batch = dict[str, np.ndarray]
NEXT = "global_next_index"  # in the state: how many examples have been given, on all hosts


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class TrainBatches:
    """An endless iterator over shuffled training batches, its state a small dictionary.

    Each epoch is a new permutation of the examples, cut into batches without regard to the ends of epochs, so that
    none is dropped or repeated; what is random in an example depends on the seed and the example's number in the
    stream alone. Examples that have an `order(seed)`, as those of a mixture, come in that one instead; of those in length
    buckets, a batch is as long as its bucket says.
    """

    def __init__(
        self,
        examples: Any,
        *,
        batch_size: int,
        seed: int,
        threads: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        rows: np.ndarray | None = None,
        tolerance: Tolerance | None = None,
        stall_seconds: float = 0.0,
        tell: Callable[[str], None] = to_stderr,
    ):
        """
        Args:
          threads: that read ahead in this process, if there are no workers.
          workers: processes that read ahead.
          prefetch: how many batches they are ahead.
          rows: those of each batch that this host reads, None being all.
          tolerance: what becomes of examples that cannot be read; None: an error.
          stall_seconds: after which a wait for a batch is told; 0: never.
        """
        self._size, self._read = batch_size, batch_size if rows is None else len(rows)
        self._threads, self._workers, self._prefetch = threads, workers, prefetch
        self._seed = seed
        self._examples, self._tolerance, self._tell = examples, tolerance or Tolerance(), tell
        self._slots = Slots(workers)
        self._watchdog = Watchdog(stall_seconds, self._stalled)
        guarded = Guarded(examples, self._tolerance.most > 0, self._slots.note)
        self._stream = stream(guarded, seed)
        if rows is not None:
            self._stream = grain.MapDataset.source(Rows(self._stream, batch_size, rows))
        self._given = 0  # batches
        self._iterator: Any = None

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch: this host's rows of it. Raises UserError for a record that cannot be read, and for a
        worker that has died."""
        if self._iterator is None:
            self._iterator = iter(self._reader())
        try:
            with self._watchdog.waiting():
                batch = next(self._iterator)
        except RuntimeError as error:
            if how := how_it_ended(error):
                raise UserError(self._dead(how)) from None
            raise
        for message in take_skipped(batch):
            self._tolerance.add(message)
        if isinstance(self._examples, Bucketed):
            batch = self._examples.trim_batch(batch, self._given, self._seed)
        self._given += 1
        return batch

    def _reader(self) -> Any:
        """Returns the batches from the next one on, as they are read ahead."""
        ahead = 0 if self._workers else self._prefetch
        options = grain.ReadOptions(num_threads=self._threads if ahead else 0, prefetch_buffer_size=ahead)
        rows = self._stream[self._given * self._read :]
        batches = rows.batch(self._read, drop_remainder=True).to_iter_dataset(options)
        if not self._workers:
            return batches
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain asks for flags of its own, which have their defaults
        each = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=max(-(-self._prefetch // self._workers), 1))
        return batches.mp_prefetch(each, worker_init_fn=functools.partial(begin_reader, os.getpid()))

    def _stalled(self, waited: float) -> None:
        places = [self._examples.where(index) for index in self._slots.reading() if index >= 0]
        reading = ", ".join(places) or "nothing yet"
        self._tell(f"warning: no batch for {waited:.0f} s (data.stall_seconds); being read: {reading}")

    def _dead(self, how: str) -> str:
        reading = self._slots.reading()
        dead = [reader for reader in self._slots.dead() if reading[reader] >= 0]
        named = [f"worker {reader}, reading {self._examples.where(reading[reader])}," for reader in dead]
        return (
            f"data.workers={self._workers}: {' and '.join(named) or 'one of them'} {how}; look at that record and at how much "
            "memory is free, or set data.workers=0"
        )

    def state(self) -> dict[str, Any]:
        """Returns where the iterator stands, as JSON-able numbers: the same on every host, and for any number of them."""
        return {NEXT: self._given * self._size}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken."""
        self._stop()
        self._given = state[NEXT] // self._size

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None  # Grain's iterators complain if they are still there when Python ends

    def close(self) -> None:
        """Ends what reads ahead."""
        self._watchdog.close()
        self._stop()
        self._slots.close()


def stream(examples: Any, seed: int) -> Any:
    """Returns the endless stream of guarded examples, drawn, of which each number can be read for itself."""
    order = examples.examples.order(seed)
    if order is None:
        return grain.MapDataset.source(examples).seed(seed).shuffle().repeat(None).random_map(examples.draw)
    return grain.MapDataset.source(Ordered(examples, order)).seed(seed).random_map(examples.draw)


class Ordered:
    """Examples in an order of their own."""

    def __init__(self, examples: Any, order: Any):
        self.examples, self.order = examples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: int) -> Any:
        return self.examples[self.order[at]]


class Rows:
    """The rows of a stream of batches that one host reads, batch after batch."""

    def __init__(self, stream: Any, size: int, rows: np.ndarray):
        self.stream, self.size, self.rows = stream, size, rows

    def __len__(self) -> int:
        return len(self.stream) // self.size * len(self.rows)

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(index, len(self.rows))
        return self.stream[batch * self.size + int(self.rows[row])]


def eval_batches(examples: Any, *, batch_size: int, seed: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
    """Yields every example once, in order, in batches of one size; `valid [B]` is 0 for the rows that fill up the last.
    Examples in length buckets come bucket by bucket, each in order, in batches as long as their bucket.

    `rows` are those of each batch that this host reads, None being all.
    """
    drawn = grain.MapDataset.source(examples).seed(seed).random_map(examples.draw)
    chosen = np.arange(batch_size) if rows is None else rows
    for numbers, trim in groups(examples, batch_size):
        valid = (chosen < len(numbers)).astype(np.float32)
        made = [drawn[int(numbers[row if real else 0])] for row, real in zip(chosen, valid, strict=True)]
        yield trim({name: np.stack([row[name] for row in made]) for name in made[0]}) | {"valid": valid}


def groups(examples: Any, batch_size: int) -> Iterator[tuple[Any, Callable[[Batch], Batch]]]:
    """Yields the numbers of the examples of each batch of evaluation, and what cuts the batch to its length."""
    if isinstance(examples, Bucketed):
        for numbers, length in examples.groups(batch_size):
            yield numbers, functools.partial(examples.trim, length=length)
        return
    for begin in range(0, len(examples), batch_size):
        yield range(begin, min(begin + batch_size, len(examples))), dict
