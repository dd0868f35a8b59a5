"""gcsfs, through which Orbax reads and writes its small files, with our patience.

`paths.set_up` registers it in place of gcsfs's own class, which tries six times, and waits for an
answer for up to five minutes each time.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import aiohttp
import gcsfs
import gcsfs.retry
from google.api_core.retry import AsyncRetry
from google.auth.exceptions import GoogleAuthError

from fmjax.filesystems import patience

SEND = inspect.unwrap(gcsfs.GCSFileSystem._request)  # a single try
REFUSED = 3  # tries of a request whose token the service refuses


class PatientFileSystem(gcsfs.GCSFileSystem):
    """Google Cloud Storage, with requests that are repeated as `patience` says."""

    def __init__(self, *args: Any, **kwargs: Any):
        limits = aiohttp.ClientTimeout(sock_connect=patience.CONNECT, sock_read=patience.REPLY)
        super().__init__(*args, **{"requests_timeout": limits, **kwargs})

    async def _request(self, *args: Any, **kwargs: Any) -> Any:
        repeated = AsyncRetry(**patience.repeating(temporary()))(SEND)
        answer = await repeated(self, *args, **kwargs)
        patience.OUTAGE.answered()
        return answer


def temporary() -> Callable[[BaseException], bool]:
    """Returns the test for the errors of one request, of which a refused token is temporary at
    first."""
    refused = itertools.count(1)

    def test(error: BaseException) -> bool:
        return is_temporary(error) or (is_refused(error) and next(refused) < REFUSED)

    return test


def is_refused(error: BaseException) -> bool:
    """Returns whether the service has refused a token, which may just have expired."""
    refused = isinstance(error, gcsfs.retry.HttpError) and int(error.code or 0) == 401
    return refused and error.__cause__ is None and "Invalid Credentials" in str(error)


def is_temporary(error: BaseException) -> bool:
    """Returns whether an error of gcsfs or of a library below it is temporary."""
    if isinstance(error, gcsfs.retry.HttpError):
        # gcsfs turns a token that cannot be renewed into a 401.
        if isinstance(error.__cause__, GoogleAuthError):
            return patience.is_temporary(error.__cause__)
        return patience.is_temporary_status(int(error.code or 0))
    kinds = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, gcsfs.retry.ChecksumError)
    return isinstance(error, kinds) or patience.is_temporary(error)
