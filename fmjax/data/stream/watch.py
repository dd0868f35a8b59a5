"""Watches the processes that read ahead of training: which example each is reading, and whether it
has died or hangs.

Worker processes exit when the process that started them is gone, however it ended; Grain's own
would not. They ignore signals that a launcher sends to all processes, since the training process
saves its state first.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_reader = 0  # the index of this worker process


class Slots:
    """Two numbers per worker process, its process id and the example it reads, in a file that all
    of them map.

    Without workers, the numbers are those of this process.
    """

    def __init__(self, workers: int, path: str = ""):
        self.workers, self.path = workers, path
        self.table = np.full((max(workers, 1), 2), -1, np.int64)
        if not workers:
            return
        if not path:
            handle, self.path = tempfile.mkstemp(prefix="fmjax-readers-")
            with os.fdopen(handle, "wb") as file:
                file.write(self.table.tobytes())
        self.table = np.memmap(self.path, np.int64, "r+", shape=self.table.shape)

    def __reduce__(self) -> tuple[type[Slots], tuple[int, str]]:
        return Slots, (self.workers, self.path)

    def note(self, index: int) -> None:
        """Records that this reader is about to read an example."""
        self.table[_reader] = os.getpid(), index

    def reading(self) -> list[int]:
        """Returns the example that each reader read last, or -1."""
        return [int(example) for example in self.table[:, 1]]

    def dead(self) -> list[int]:
        """Returns the readers that have started and died."""
        return [
            reader
            for reader, pid in enumerate(self.table[:, 0].tolist())
            if pid > 0 and not alive(pid)
        ]

    def begun(self) -> bool:
        """Returns whether any reader has started to read."""
        return bool((self.table[:, 0] > 0).any())

    def close(self) -> None:
        """Removes the file; processes that have mapped it keep their mapping."""
        if self.path and os.path.exists(self.path):
            os.remove(self.path)


def alive(pid: int) -> bool:
    """Returns whether this user has a process with that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def starts_as_worker() -> bool:
    """Returns whether this process is just starting as a worker and imports the main script."""
    # The same check as in `multiprocessing`, which refuses to start a process from there.
    return bool(getattr(multiprocessing.current_process(), "_inheriting", False))


def begin_reader(parent: int, reader: int, count: int) -> None:
    """Makes this process reader number `reader`. It exits when its parent process does, and ignores
    signals until then."""
    global _reader
    _reader = reader
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def how_it_ended(error: RuntimeError) -> str | None:
    """Returns how a worker ended, according to Grain; None for other errors."""
    # Only the text has the exit code.
    match = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    if not match:
        return None
    code = int(match[1])
    return (
        f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    )


def notice_every_end() -> None:
    """Makes Grain notice every worker that has ended.

    It would wait for ever for one that ended with exit code 0, as a script does that a worker
    imports and that calls sys.exit().
    """
    with contextlib.suppress(ImportError):  # another version of Grain, with ways of its own
        from grain._src.python.dataset.transformations import process_prefetch

        def ended(iterator: Any) -> bool:
            process = iterator._prefetch_process
            return process is not None and process.exitcode is not None

        process_prefetch.ProcessPrefetchDatasetIterator._process_failed = ended


class Watchdog:
    """During a wait, calls `tell` with the seconds waited, every `seconds`; 0: never."""

    def __init__(self, seconds: float, tell: Callable[[float], None]):
        self.seconds, self.tell = seconds, tell
        self.since: float | None = None
        self.closed = threading.Event()
        if seconds > 0:
            threading.Thread(target=self.watch, daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def watch(self) -> None:
        warnings = 0
        while not self.closed.wait(min(self.seconds / 4, 1.0)):
            since = self.since
            waited = 0.0 if since is None else time.monotonic() - since
            warnings = min(warnings, int(waited / self.seconds))
            if waited >= self.seconds * (warnings + 1):
                warnings += 1
                self.tell(waited)

    def close(self) -> None:
        self.closed.set()
