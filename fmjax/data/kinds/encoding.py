"""The token ids of a column of texts, in the order of the records, by several processes if there
are many.

Processes are faster than the threads of the tokenizer's library, since reading records and moving
ids into arrays hold Python's lock. They are started with a module of fmjax as their main module, so
a script needs no `if __name__ == "__main__":`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import cloudpickle
import numpy as np

from fmjax.contracts import Source
from fmjax.data.kinds.text import texts
from fmjax.data.storage.token_store import Part
from fmjax.data.tokenizers import stored_ids
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import RecordError, UserError

CHARACTERS = 2_000_000  # of a span of records, approximately
RECORDS = 4096  # of a span, at most
TRY_ALONE, WORTH = 1.0, 4.0  # seconds of work here, and those left for which processes are started


class Encoded(NamedTuple):
    """The documents of consecutive records. Those that cannot be read are empty documents, and are
    in `bad`: index, place and problem."""

    part: Part
    bad: list[tuple[int, str, str]]


class Encoder:
    """Encodes a column of records; ids that `scripts/prepare_data.py` stored in them are read
    instead if they are from the same tokenizer. Picklable.

    With `tolerant`, a record that cannot be read is no error.
    """

    def __init__(self, source: Source, column: str, tokenizer: Tokenizer, tolerant: bool = False):
        self.source, self.column, self.tokenizer = source, column, tokenizer
        self.tolerant = tolerant
        self.stored = stored_ids.are_of(source, column, tokenizer.sha256)

    def __call__(self, begin: int, end: int) -> Encoded:
        """Returns the documents of the records from `begin` to before `end`.

        Raises RecordError for one that cannot be read.
        """
        read, given, bad = self.records(begin, end)
        rows = given if self.stored else self.tokenizer.encode_batch(read)
        return Encoded(part_of(read, rows, id_type(self.tokenizer)), bad)

    def records(
        self, begin: int, end: int
    ) -> tuple[list[str], list[np.ndarray], list[tuple[int, str, str]]]:
        """Returns the texts of records, their stored ids, and which of them are bad."""
        if not self.stored:
            with contextlib.suppress(RecordError):  # found again below
                return list(texts(self.source, self.column, begin, end)), [], []
        read: list[str] = []
        given: list[np.ndarray] = []
        bad: list[tuple[int, str, str]] = []
        for index in range(begin, end):
            try:
                text, ids = self.record(index)
            except RecordError as error:
                if not self.tolerant:
                    raise
                bad.append((index, error.place, error.problem))
                text, ids = "", np.zeros(0, np.int32)
            read.append(text)
            given.append(ids)
        return read, given, bad

    def record(self, index: int) -> tuple[str, np.ndarray]:
        """Returns the text of a record, and its stored ids, of which there may be none."""
        if not self.stored:
            return next(texts(self.source, self.column, index, index + 1)), np.zeros(0, np.int32)
        record = self.source[index]
        ids = stored_ids.read(self.source, index, record, self.tokenizer.sha256)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size:
            problem = "has ids that are not in the vocabulary; prepare the data again"
            raise RecordError(self.source.where(index), problem, index)
        return record["text"], ids


def id_type(tokenizer: Tokenizer) -> np.dtype:
    """Returns the type that holds every id of a tokenizer."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def part_of(read: Sequence[str], rows: Sequence[np.ndarray], dtype: np.dtype) -> Part:
    """Returns documents from their texts and the ids of each."""
    sizes = np.array([(len(text), len(text.encode())) for text in read], np.int64)
    counts = np.array([ids.size for ids in rows], np.int64)
    return Part(np.concatenate(rows).astype(dtype), counts, sizes.reshape(-1, 2))


class Spans:
    """Consecutive spans of records of about `CHARACTERS` characters, judged by those before."""

    def __init__(self, count: int):
        self.count, self.begun = count, 0
        self.records, self.characters = 0, 0

    def next(self) -> tuple[int, int]:
        """Returns the next span, which must exist."""
        mean = self.characters / self.records if self.records else CHARACTERS / 32
        size = int(min(max(CHARACTERS / max(mean, 1), 1), RECORDS))
        begin, self.begun = self.begun, min(self.begun + size, self.count)
        return begin, self.begun

    def learn(self, part: Part) -> None:
        """Takes the mean length of texts from a finished span."""
        self.records += len(part.counts)
        self.characters += int(part.sizes[:, 0].sum())

    def __bool__(self) -> bool:
        return self.begun < self.count


def encode(encoder: Encoder, processes: int | None = None) -> Iterator[Encoded]:
    """Yields the documents of all records, in order.

    Args:
      encoder: what reads and encodes them.
      processes: how many are started; None: one per core if much is left after a second.

    Raises RecordError for a record that cannot be read, and UserError for a process that dies.
    """
    count = len(encoder.source)
    spans = Spans(count)
    cores = len(os.sched_getaffinity(0))
    begun = time.monotonic()
    while spans and processes is None:
        found = encoder(*spans.next())
        spans.learn(found.part)
        yield found
        took = time.monotonic() - begun
        if cores > 1 and took > TRY_ALONE and took / spans.begun * (count - spans.begun) > WORTH:
            processes = cores
    if spans:
        yield from in_processes(encoder, spans, processes or 1)


def in_processes(encoder: Encoder, spans: Spans, count: int) -> Iterator[Encoded]:
    """Yields the documents of the remaining records, in order."""
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[Process] = queue.SimpleQueue()
        job = cloudpickle.dumps(encoder)
        for _ in range(count):
            idle.put(stack.enter_context(Process(job)))

        def ask(span: tuple[int, int]) -> Encoded:
            process = idle.get()
            try:
                return process.ask(span)
            finally:
                idle.put(process)

        pool = stack.enter_context(ThreadPoolExecutor(count))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        waiting: deque[Future[Encoded]] = deque()
        while spans or waiting:
            while spans and len(waiting) < 3 * count:  # so that a slow span stops nobody
                waiting.append(pool.submit(ask, spans.next()))
            found = waiting.popleft().result()
            spans.learn(found.part)
            yield found


class Process:
    """A process that encodes spans of records. It ends when this object is closed, and when this
    process ends."""

    def __init__(self, job: bytes):
        # Alone on its core, and on no chip.
        limits = {"TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fmjax.data.kinds.encoding_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | limits | {"PYTHONPATH": paths},
        )
        self.job: bytes | None = job

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, span: tuple[int, int]) -> Encoded:
        """Returns the documents of a span. Raises what the process raised."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            if self.job is not None:
                pickle.dump(self.job, self.process.stdin)
                self.job = None
            pickle.dump(span, self.process.stdin)
            self.process.stdin.flush()
            answer: Any = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            if isinstance(error, pickle.UnpicklingError):  # it may go on
                self.process.kill()
            raise UserError(
                "a process that tokenizes the data ended "
                f"(exit code {self.process.wait()}); check the free memory, and start again"
            ) from error
        if isinstance(answer, BaseException):
            raise answer
        encoded: Encoded = answer
        return encoded
