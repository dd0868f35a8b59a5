"""Guards for preparing data: interruption, and a lock on the output folder."""

from __future__ import annotations

import contextlib
import fcntl
import signal
from collections.abc import Iterator
from pathlib import Path

from fmjax.errors import Interrupted, UserError


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raises Interrupted when SIGTERM arrives."""

    def stop(*_: object) -> None:
        raise Interrupted("finished tasks are kept; run the same command again to continue")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def only_one(output: Path, work: Path) -> Iterator[None]:
    """Locks the output folder. Raises UserError if another process has locked it."""
    with (work / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"--output={output}: another process is preparing data in it; wait for it, or name "
                "another folder"
            ) from error
        yield
