"""Readers that run ahead of training, watched: which example each is reading, which has died, and whether one hangs.

Worker processes end by themselves when the process that started them is gone, whatever ended that; Grain's would not. They leave
signals that a launcher sends to all processes to the one that trains, which saves its state first.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

_reader = 0  # which worker this process is


class Slots:
    """Two numbers for each worker process, its id and the example it reads, in a file that all of them map; without workers,
    those of this process."""

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
        """Says that this reader is about to read an example."""
        self.table[_reader] = os.getpid(), index

    def reading(self) -> list[int]:
        """Returns the example that each reader has begun last, -1 if none."""
        return self.table[:, 1].tolist()

    def dead(self) -> list[int]:
        """Returns which readers have begun and are no longer there."""
        return [reader for reader, pid in enumerate(self.table[:, 0].tolist()) if pid > 0 and not alive(pid)]

    def close(self) -> None:
        """Removes the file; what has it mapped keeps it."""
        if self.path and os.path.exists(self.path):
            os.remove(self.path)


def alive(pid: int) -> bool:
    """Returns whether there is a process, of one's own, with that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def begin_reader(parent: int, reader: int, count: int) -> None:
    """Makes this worker process reader number `reader`: it ends when its parent, a process id, does, and by no signal before."""
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
    """Returns how a worker ended by what Grain says of it, None if the error is another one."""
    found = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    if not found:
        return None
    code = int(found[1])
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class Watchdog:
    """Tells, once in `seconds`, that a wait takes longer than that; 0: never."""

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
        told = 0
        while not self.closed.wait(min(self.seconds / 4, 1.0)):
            since = self.since
            waited = 0.0 if since is None else time.monotonic() - since
            told = min(told, int(waited / self.seconds))
            if waited >= self.seconds * (told + 1):
                told += 1
                self.tell(waited)

    def close(self) -> None:
        self.closed.set()
