"""Signals that end a run after saving."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fmjax.distributed import hosts
from fmjax.errors import Interrupted

COMPARED = 10  # steps between comparisons of the hosts' signals


class Signals:
    """Notes SIGTERM and SIGINT; a second one ends the process at once."""

    def __init__(self) -> None:
        self.caught = 0  # the signal's number

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Handles the signals in the block; only in the main thread, as Python requires."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def agreed(self, step: int, waiting: bool) -> int:
        """Returns the signal that ends the run after a step, 0 for none.

        Several hosts compare theirs when they are `waiting` for each other anyway, and every ten
        steps.
        """
        if hosts.several() and step % COMPARED and not waiting:
            return 0
        return hosts.any_of(self.caught)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number


def interruption(caught: int, step: int) -> Interrupted:
    """Returns the exception that ends a run by a signal after a step is saved."""
    return Interrupted(
        f"{signal.Signals(caught).name}: saved step {step}; run the same command again to continue"
    )
