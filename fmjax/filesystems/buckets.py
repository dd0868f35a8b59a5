"""Paths in a bucket of Google Cloud Storage, `gs://bucket/folder`, for the files of a run.

A bucket holds objects, not folders: a folder exists while an object is below it. An object is
written whole or not at all, so no write needs a temporary name.

Requests that fail for a temporary reason are repeated and counted (`patience`). Other errors become
the OSError that a local file would raise, or a UserError if packages or credentials are missing.
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import fnmatch
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from fmjax.errors import UserError, one_line
from fmjax.filesystems import patience
from fmjax.filesystems.patience import CONNECT, OUTAGE, REPLY, repeating

T = TypeVar("T")
REQUEST = re.compile(r"^(\d{3}) [A-Z]+ \S+: ")  # begins a message: "403 GET https://...: Forbidden"
SCHEME = "gs://"
BLOCK = 2**23  # bytes that are read at a time to compute a digest
THREADS = 8  # objects that are copied or removed at a time; urllib3 keeps 10 connections
LOGIN = (
    "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to the key "
    "of a service account"
)
ONCE = {"retry": None, "timeout": (CONNECT, REPLY)}  # `request` repeats, and counts


class Object(NamedTuple):
    """What a bucket says about an object."""

    st_size: int
    md5: str  # in hexadecimal; empty if the bucket does not give it
    generation: int  # a number that each write changes
    retained: bool  # whether a retention policy forbids to replace or delete it


@dataclasses.dataclass(frozen=True, order=True)
class BucketPath:
    """An object or a folder of a bucket, with the methods of `pathlib.Path` that runs use.

    Methods raise FileNotFoundError, PermissionError or another OSError, as those of a local path
    do, and UserError if there are no credentials.
    """

    bucket: str
    key: str = ""  # without "/" at its ends

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def __fspath__(self) -> str:
        return str(self)

    def __truediv__(self, name: str) -> BucketPath:
        return BucketPath(self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> BucketPath:
        return BucketPath(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> BucketPath:
        return self.parent / name

    def resolve(self) -> BucketPath:
        return self

    def absolute(self) -> BucketPath:
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder exists with its first object."""

    def is_file(self) -> bool:
        return bool(self.key) and request(self, lambda: bool(self._blob.exists(**ONCE)))

    def is_dir(self) -> bool:
        return request(self, lambda: any(True for _ in self._blobs(max_results=1)))

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[BucketPath]:
        """Yields the objects and the folders in this folder, in order."""

        def names() -> list[str]:
            listed = self._blobs(delimiter="/")
            return [blob.name for blob in listed] + list(listed.prefixes)

        for name in sorted(request(self, names)):
            if name != self._prefix:  # the mark of this folder
                yield BucketPath(self.bucket, name.strip("/"))

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """Yields the matches of "*.txt" or "*/file.txt"; only the first part may be a pattern."""
        first, _, rest = pattern.partition("/")
        for path in self.iterdir():
            if fnmatch.fnmatchcase(path.name, first) and (not rest or (path / rest).is_file()):
                yield path / rest if rest else path

    def read_bytes(self) -> bytes:
        return self.read_version()[0]

    def read_version(self) -> tuple[bytes, int]:
        """Returns the content of an object and its generation, by one request."""

        def download() -> tuple[bytes, int]:
            blob = self._blob
            return bytes(blob.download_as_bytes(**ONCE)), int(blob.generation)

        return request(self, download)

    def digest(self, kind: str, size: int) -> str:
        """Returns the digest of an object of `size` bytes, which is read a block at a time."""
        found = hashlib.new(kind)
        for begin in range(0, size, BLOCK):
            span = {"start": begin, "end": min(begin + BLOCK, size) - 1, "checksum": None}
            download = functools.partial(self._blob.download_as_bytes, **span, **ONCE)
            found.update(request(self, download))
        return found.hexdigest()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes, generation: int | None = None) -> int:
        """Writes an object; returns its generation.

        Raises FileExistsError unless the object has the given generation before (0: it does not
        exist); the first try of a request may have written it.
        """

        def write() -> int:
            blob = self._blob
            blob.upload_from_string(content, if_generation_match=generation, **ONCE)
            return int(blob.generation)

        return request(self, write)

    def unlink(self, missing_ok: bool = False) -> None:
        tries = 0

        def delete() -> None:
            nonlocal tries
            tries += 1
            self._blob.delete(**ONCE)

        try:
            request(self, delete)
        except FileNotFoundError:
            # A try whose answer was lost may have removed it.
            if not missing_ok and tries == 1:
                raise

    def stat(self) -> Object:
        def read() -> Object:
            blob = self._blob
            blob.reload(**ONCE)
            return described(blob)

        return request(self, read)

    def files(self) -> dict[str, Object]:
        """Returns all objects below this folder, by relative path, without the marks of folders."""

        def listed() -> dict[str, Object]:
            found = {blob.name: blob for blob in self._blobs()}
            return {
                name.removeprefix(self._prefix): described(blob)
                for name, blob in found.items()
                if not name.endswith("/")  # as consoles and mounts (gcsfuse) mark folders
            }

        return request(self, listed)

    def rename(self, target: BucketPath) -> BucketPath:
        """Moves all objects below this folder, one by one: a reader may see a part of them."""

        def copy(name: str) -> None:
            bucket = client().bucket(self.bucket)
            source, goal = (self / name).key, (target / name).key
            request(self, lambda: bucket.copy_blob(bucket.blob(source), bucket, goal, **ONCE))

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(copy, self.files()))
        self.remove_tree()
        return target

    def remove_tree(self) -> None:
        """Removes all objects below this folder; those directly in it last, in falling order."""
        keys = request(self, lambda: [str(blob.name) for blob in self._blobs()])
        inner = [key for key in keys if "/" in key.removeprefix(self._prefix)]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda key: BucketPath(self.bucket, key).unlink(missing_ok=True), inner))
        for key in sorted(set(keys) - set(inner), reverse=True):
            BucketPath(self.bucket, key).unlink(missing_ok=True)

    def check(self) -> None:
        """Raises UserError if the bucket does not exist or access is denied."""
        try:
            request(self, lambda: any(True for _ in self._blobs(max_results=1)))
        except FileNotFoundError:
            raise UserError(
                f"{self}: there is no bucket {SCHEME}{self.bucket}; correct its name, or make it: "
                f"gcloud storage buckets create {SCHEME}{self.bucket}"
            ) from None
        except PermissionError as error:
            raise UserError(f"{self}: cannot be read ({error.strerror}); {LOGIN}") from None

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    @property
    def _blob(self) -> Any:
        return client().bucket(self.bucket).blob(self.key)

    def _blobs(self, **options: Any) -> Any:
        return client().list_blobs(self.bucket, prefix=self._prefix, **options, **ONCE)


def described(blob: Any) -> Object:
    """Returns the description of an object whose metadata are known."""
    md5 = base64.b64decode(blob.md5_hash).hex() if blob.md5_hash else ""
    retained = blob.retention_expiration_time is not None
    return Object(int(blob.size), md5, int(blob.generation), retained)


@functools.cache
def client() -> Any:
    """Returns the client of the service. Raises UserError without the packages or credentials."""
    try:
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import storage
    except ImportError as error:
        raise UserError(
            f"{SCHEME} needs a package that is not installed ({error.name}); pip install gcsfs"
        ) from None
    try:
        return storage.Client(project=None)  # a bucket's name is enough
    except DefaultCredentialsError:
        raise UserError(f"{SCHEME}: there are no credentials; {LOGIN}") from None


def request(path: BucketPath, send: Callable[[], T]) -> T:
    """Returns what `send` returns, repeating it while it fails for a temporary reason.

    Raises OSError as the methods of BucketPath do.
    """
    client()  # which says what is missing
    from google.api_core.retry import Retry

    with translated(path):
        result: T = Retry(**repeating())(send)()
        OUTAGE.answered()
    return result


@contextmanager
def translated(path: BucketPath) -> Iterator[None]:
    """Raises the errors of the service as those of files, with a short reason."""
    from google.api_core import exceptions as service
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    try:
        yield
    except service.NotFound:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from None
    except service.PreconditionFailed:
        raise FileExistsError(errno.EEXIST, "was changed by someone else", str(path)) from None
    except (service.Forbidden, service.Unauthorized) as error:
        raise PermissionError(errno.EACCES, reason(error), str(path)) from None
    except Exception as error:
        cause = (error.cause if isinstance(error, service.RetryError) else None) or error
        temporary = patience.is_temporary(cause)
        if isinstance(cause, GoogleAuthError) and not temporary:
            why = f"the credentials are not valid, {reason(cause)}"
            raise PermissionError(errno.EACCES, why, str(path)) from None
        if not temporary and not isinstance(error, (service.GoogleAPIError, RequestException)):
            raise
        lasted = f", for {patience.PATIENCE:.0f} s" if temporary else ""
        raise OSError(errno.EIO, f"{reason(cause)}{lasted}", str(path)) from None


def reason(error: Exception) -> str:
    """Returns what the service said, in a few words."""
    return REQUEST.sub(r"\1 ", one_line(error))[:120] or type(error).__name__
