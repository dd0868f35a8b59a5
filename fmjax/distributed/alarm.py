"""If one of several hosts ends with an error, all end: the others would wait for it for ever.

Hosts tell each other through the key-value store of JAX's coordination service, at which each looks
every few seconds. A host that waits inside a collective operation cannot be interrupted, so its
process ends at once.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax._src import distributed

from fmjax.distributed import hosts
from fmjax.errors import Interrupted, UserError, one_line

PLACE = "fmjax/ended/"
blocks = itertools.count(1)  # hosts enter the same blocks, so a block has one number on all of them
LOOK = 2.0  # seconds between two looks
CLEANUP = 10.0  # seconds that a host takes at most to leave things in order
LINGER = 30.0  # seconds for which the first host, which runs the service, waits for the others
FAILED, USER_ERROR = 1, 2  # exit codes


@contextmanager
def ending_together(cleanup: Callable[[], None]) -> Iterator[None]:
    """Ends this process if another host's block ends with an error, and the others if this one's
    does; each prints one line.

    An `Interrupted` is left alone: all hosts have agreed on it.

    Args:
      cleanup: is called before this process is ended because of another one.
    """
    if not hosts.several():
        yield
        return
    place = f"{PLACE}{next(blocks)}/"
    watch = Watch(place, cleanup)
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        watch.stop()
        ring(place, error)
        raise
    else:
        atexit.unregister(depart)  # the error of a block before this one was caught
    finally:
        watch.stop()


class Watch:
    """A thread that looks whether another host has ended."""

    def __init__(self, place: str, cleanup: Callable[[], None]):
        self._place, self._cleanup, self._end = place, cleanup, threading.Event()
        self._thread = threading.Thread(target=self._look, name="alarm", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()

    def _look(self) -> None:
        while not self._end.wait(LOOK):
            try:
                reasons = [line for line in rung(self._place).values() if line]
            except Exception:  # the service has ended, and JAX ends this process
                return
            if reasons and not self._end.is_set():
                self._leave(reasons[0])
                return

    def _leave(self, reason: str) -> None:
        cleanup = threading.Thread(target=self._cleanup, daemon=True)
        cleanup.start()
        cleanup.join(CLEANUP)
        print(f"error: {reason}; all hosts end", file=sys.stderr)
        with suppress(Exception):
            service().key_value_set(f"{self._place}{jax.process_index()}", "")
        depart(self._place, USER_ERROR)


def ring(place: str, error: BaseException) -> None:
    """Tells the other hosts that this one ends with an error, and has this process end without
    waiting for them."""
    index = jax.process_index()
    reason = one_line(error) if isinstance(error, Exception) else ""
    with suppress(Exception):
        line = f"host {index} has ended: {reason or type(error).__name__}"
        service().key_value_set(f"{place}{index}", line)
    atexit.unregister(depart)
    atexit.register(depart, place, USER_ERROR if isinstance(error, UserError) else FAILED)


def depart(place: str, code: int) -> None:
    """Ends this process, the first host's once the others have ended or time is up."""
    for child in multiprocessing.active_children():
        child.terminate()
    deadline = time.monotonic() + LINGER
    with suppress(Exception):
        while hosts.first() and time.monotonic() < deadline:
            if len(rung(place)) == jax.process_count():
                break
            time.sleep(0.1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rung(place: str) -> dict[str, str]:
    """Returns what hosts have said at the end of a block, by key; an empty line of those that
    follow.
    """
    return dict(service().key_value_dir_get(place))


def service() -> Any:
    """Returns the client of JAX's coordination service, for which JAX has no public name."""
    return distributed.global_state.client
