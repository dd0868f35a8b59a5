"""How long requests to a bucket are repeated: one policy for all libraries that send them.

A request that fails for a temporary reason is repeated for PATIENCE seconds, with pauses that
double and vary at random. While no request at all is answered, they share one deadline, so that
the waits of requests that follow each other do not add up.

TensorStore, which counts its tries, is set up in `runs/orbax_items` to give up after about the
same time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 180.0  # seconds after which a request that keeps failing is given up
LONGEST_PAUSE = 32.0
CONNECT = 10.0  # seconds for a connection
REPLY = 60.0  # seconds without a byte after which a connection is broken
SPEAK = 20.0  # seconds of silence after which it is reported
FORGOTTEN = 2 * PATIENCE  # seconds after the last failure of an outage when it is forgotten


class Outage:
    """Whether a service answers this process, and the number of requests that were repeated.

    Each process has one, OUTAGE. Threads may share it.
    """

    def __init__(self, tell: Callable[[str], None]):
        self.repeated = 0
        self._tell, self._mutex = tell, threading.Lock()
        self._begun, self._told = 0.0, False  # 0: the last request was answered
        self._failed = 0.0  # time of the last failure

    def failed(self, error: Exception) -> None:
        """Notes that a request failed for a temporary reason."""
        with self._mutex:
            now = time.monotonic()
            if not self._begun or now - self._failed >= FORGOTTEN:
                self._begun, self._told = now, False
            self._failed = now
            tells = not self._told and now - self._begun >= SPEAK
            self._told = self._told or tells
        if tells:
            self._tell(
                f"the bucket does not answer ({type(error).__name__}); requests are repeated for "
                f"up to {self.left():.0f} s more"
            )

    def answered(self) -> None:
        """Notes that a request was answered, if only with an error that is not temporary."""
        with self._mutex:
            told, begun = self._told, self._begun
            self._begun, self._told = 0.0, False
        if told:
            self._tell(f"the bucket answers again, after {time.monotonic() - begun:.0f} s")

    def left(self) -> float:
        """Returns the seconds for which requests are still repeated; 0 if the outage is over
        PATIENCE seconds old.
        """
        begun, now = self._begun, time.monotonic()
        if not begun or now - self._failed >= FORGOTTEN:
            return PATIENCE
        return max(0.0, begun + PATIENCE - now)

    def lasts(self) -> bool:
        """Returns whether the service has not answered for PATIENCE seconds."""
        return self.left() <= 0

    def count(self, error: Exception) -> None:
        self.repeated += 1


def speak(line: str) -> None:
    print(line, file=sys.stderr)


OUTAGE = Outage(speak)


def is_temporary(error: BaseException) -> bool:
    """Returns whether an error is temporary: 408, 429, 5xx, a broken connection, a damaged
    download, a token that cannot be renewed just now."""
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError, TransportError
    from requests import exceptions

    if isinstance(error, GoogleAPICallError):
        return is_temporary_status(error.code or 0)
    if isinstance(error, GoogleAuthError) and error.retryable:
        return True
    broken = (exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError)
    damaged = type(error).__name__ == "DataCorruption"  # whose module depends on the version
    lost = (*broken, TransportError, ConnectionError, TimeoutError)
    # The service of tokens of a virtual machine: a RefreshError because of a TransportError.
    unreachable = isinstance(error, GoogleAuthError) and isinstance(error.__cause__, TransportError)
    return damaged or unreachable or isinstance(error, lost)


def is_temporary_status(code: int) -> bool:
    return code in (408, 429) or code >= 500


def repeating(temporary: Callable[[BaseException], bool] = is_temporary) -> dict[str, Any]:
    """Returns the policy as arguments of `google.api_core.retry.Retry` and `AsyncRetry`.

    Args:
      temporary: whether an error is temporary.
    """

    def again(error: Exception) -> bool:
        if not temporary(error):
            OUTAGE.answered()
            return False
        OUTAGE.failed(error)
        return not OUTAGE.lasts()

    return {
        "predicate": again,
        "initial": 1.0,
        "maximum": LONGEST_PAUSE,
        "multiplier": 2.0,
        "timeout": PATIENCE,
        "on_error": OUTAGE.count,
    }
