"""gcsfs, through which Orbax reads and writes its small files, with our patience.

`paths.set_up` registers it in place of gcsfs's own class, which tries six times, and waits for an
answer for up to five minutes each time.
"""

from __future__ import annotations

import inspect
from typing import Any

import aiohttp
import gcsfs
import gcsfs.retry
from google.api_core.retry import AsyncRetry

from fmjax import patience

SEND = inspect.unwrap(gcsfs.GCSFileSystem._request)  # a single try


class PatientFileSystem(gcsfs.GCSFileSystem):
    """Google Cloud Storage, with requests that are repeated as `patience` says."""

    def __init__(self, *args: Any, **kwargs: Any):
        limits = aiohttp.ClientTimeout(sock_connect=patience.CONNECT, sock_read=patience.REPLY)
        super().__init__(*args, **{"requests_timeout": limits, **kwargs})

    async def _request(self, *args: Any, **kwargs: Any) -> Any:
        repeated = AsyncRetry(**patience.repeating(is_temporary))(SEND)
        answer = await repeated(self, *args, **kwargs)
        patience.OUTAGE.answered()
        return answer


def is_temporary(error: BaseException) -> bool:
    """Returns whether an error of gcsfs or of a library below it is temporary."""
    if isinstance(error, gcsfs.retry.HttpError):
        return patience.is_temporary_status(int(error.code or 0))
    kinds = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, gcsfs.retry.ChecksumError)
    return isinstance(error, kinds) or patience.is_temporary(error)
