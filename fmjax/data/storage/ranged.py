"""Remote files that are read by range: a reader asks for the bytes that it needs, and nothing is
copied.

Such a file is known by what its store says about it: checksums (`marks_of`), which do not depend on
the address, or else its version. Every range is of the version that was there when the file was
opened: Google Cloud Storage gets the number of the generation with each request; of other stores,
the version is compared after each one.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import inspect
import io
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.spec import AbstractFileSystem

from fmjax.contracts import Record, Value
from fmjax.data.storage import cache
from fmjax.errors import UserError, one_line

# The names of a file's version at Google, S3, Azure, Hugging Face and others.
VERSIONS = (
    *("generation", "ETag", "etag", "mtime", "updated"),
    *("LastModified", "last_modified", "blob_id", "last_commit", "created"),
)
TRIES, PAUSE = 5, 1.0  # requests for a range, and seconds before the second, which then double
AHEAD = 2**23  # bytes that are read ahead, at most
LEAST = 2**16  # of them, at first
BLOCK = 2**23  # bytes per request where a file is read as a whole


class CannotRange(UserError):
    """A remote file cannot be read by range, and must be copied."""


class Traffic:
    """What this process has read by range: requests that were answered, and their bytes."""

    def __init__(self) -> None:
        self.requests, self.bytes, self.repeated = 0, 0, 0


TRAFFIC = Traffic()


@dataclasses.dataclass(frozen=True)
class RangedFile:
    """A remote file that is read by range.

    Attributes:
      address: such as "gs://bucket/file".
      size: its bytes.
      version: a tag or a time that changes when the file changes.
      generation: the version, if requests can name it; otherwise empty.
      marks: the names and values of the store's checksums.
    """

    address: str
    size: int
    version: str
    generation: str
    marks: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """The address without the name."""
        return self.address.rpartition("/")[0]

    @property
    def key(self) -> str:
        """A name for the content."""
        return cache.name_for([self.size, *self.marks])

    def read(self, begin: int, end: int) -> bytes:
        """Returns the bytes from `begin` to before `end`.

        Raises UserError if the file has changed, or cannot be read after several tries.
        """
        if begin >= end:
            return b""
        for attempt in range(TRIES):
            if attempt:
                TRAFFIC.repeated += 1
                time.sleep(PAUSE * 2 ** (attempt - 1) * (1 + random.random()))
            try:
                return self.request(begin, end)
            except (UserError, FileNotFoundError, PermissionError) as error:
                wrong: Exception = error
                break
            except Exception as error:  # any error of the network, the service or its package
                wrong = error
        if isinstance(wrong, UserError):
            raise wrong
        if isinstance(wrong, FileNotFoundError):
            raise self.changed() from wrong
        raise UserError(
            f"{self.address}: bytes {begin:,} to {end:,} cannot be read "
            f"({one_line(wrong, 200) or type(wrong).__name__}); check the network and your "
            "credentials, and run the same command again"
        ) from wrong

    def request(self, begin: int, end: int) -> bytes:
        """Returns a range. Raises OSError if fewer bytes arrive, UserError if the file has
        changed, and any error of the store's package."""
        system, path = fsspec.core.url_to_fs(self.address)
        # Old versions of gcsfs accept a generation, but do not send it.
        sends = self.generation and "generation" in inspect.signature(system.url).parameters
        pinned = {"generation": self.generation} if sends else {}
        data = bytes(system.cat_file(path, start=begin, end=end, **pinned))
        if not pinned and state_of(system, path, self.address) != (self.size, self.version):
            raise self.changed()
        if len(data) != end - begin:
            raise OSError(f"{len(data):,} of {end - begin:,} bytes arrived")
        TRAFFIC.requests += 1
        TRAFFIC.bytes += len(data)
        return data

    def blocks(self) -> Iterator[bytes]:
        """Yields the whole content."""
        for begin in range(0, self.size, BLOCK):
            yield self.read(begin, min(begin + BLOCK, self.size))

    def copy(self) -> Path:
        """Returns a copy in the cache."""

        def write(stream: BinaryIO) -> None:
            for block in self.blocks():
                stream.write(block)

        return cache.get_or_make(Path("ranged", self.key, self.name), write)

    def changed(self) -> UserError:
        return UserError(
            f"{self.address}: was replaced or removed since this run opened it; restore it, and "
            "run the same command again (data must not change while a run reads them)"
        )

    def fingerprint(self) -> Record:
        """Returns the name, the size and the checksums. With `data.verify`, also the SHA-256, by
        which earlier versions of fmjax knew the file; it is computed once."""
        found: Record = {"name": self.name, "size": self.size} | dict(self.marks)
        if cache.is_verifying() and "sha256" not in found:
            found |= cache.remembered(Path("remote", f"{self.key}.json"), self.read_digest)
        return found

    def read_digest(self) -> Record:
        """Returns the SHA-256 of the whole file, which is read in blocks."""
        cache.tell(f"reading {self.address} ({self.size:,} bytes) to compare its SHA-256")
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return {"sha256": digest.hexdigest()}


def state_of(system: AbstractFileSystem, path: str, address: str) -> tuple[int, str]:
    """Returns the size of a file, and its version: a tag or the modification time.

    Raises UserError if it has none.
    """
    system.invalidate_cache(path)
    about = system.info(path)  # some services put it otherwise in a listing
    return int(about["size"]), version_of(about, address)


def version_of(about: Mapping[str, Value], address: str) -> str:
    """Returns a file's version. Raises UserError if the service gives none."""
    version = next((str(about[name]) for name in VERSIONS if about.get(name)), "")
    if not version:
        raise UserError(
            f"{address}: the server gives no version of the file; download it yourself, and "
            "name the copy"
        )
    return version


def ranged(system: AbstractFileSystem, path: str, address: str) -> RangedFile:
    """Returns a file of a service as it is now."""
    system.invalidate_cache(path)
    about = system.info(path)
    size, version = int(about["size"]), version_of(about, address)
    marks = marks_of(about) or {"version": cache.name_for([address, size, version])}
    generation = str(about.get("generation") or "")
    return RangedFile(address, size, version, generation, tuple(marks.items()))


def marks_of(about: Mapping[str, Value]) -> dict[str, str]:
    """Returns the checksums of a file's content that a service gives, by name: MD5 and CRC32C
    (Google), MD5 (Azure), the ETag (S3), SHA-256 or the hash of Git (Hugging Face).

    S3's ETag is the MD5 for an upload in one part; otherwise it also depends on the size of the
    parts.
    """
    marks: dict[str, str] = {}
    settings = about.get("content_settings") or {}
    md5 = about.get("md5Hash") or (settings.get("content_md5") if settings else None)
    if md5:
        marks["md5"] = (base64.b64decode(md5) if isinstance(md5, str) else bytes(md5)).hex()
    if crc32c := about.get("crc32c"):
        marks["crc32c"] = base64.b64decode(crc32c).hex()
    if lfs := about.get("lfs"):
        marks["sha256"] = str(lfs["sha256"])
    elif blob := about.get("blob_id"):
        marks["git"] = str(blob)
    if etag := about.get("ETag"):
        marks["etag"] = str(etag).strip('"')
    return marks


def fingerprint_of(path: Path | RangedFile) -> Record:
    """Returns the name, the size and the digests of a file. With `data.verify`, a local file also
    has the checksums by which a run may know it that has read it from a bucket."""
    if isinstance(path, RangedFile):
        return path.fingerprint()
    found = {"name": path.name} | cache.digest(path)
    return found | (checksums(path) if cache.is_verifying() else {})


def checksums(path: Path) -> dict[str, str]:
    """Returns the checksums by which Google knows a file: MD5 and, if its package is installed,
    CRC32C; the latter alone for an object that was uploaded in parts."""
    with path.open("rb") as stream:
        found = {"md5": hashlib.file_digest(stream, "md5").hexdigest()}
    try:
        import google_crc32c  # comes with gcsfs
    except ImportError:
        return found
    sums = google_crc32c.Checksum()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            sums.update(block)
    return found | {"crc32c": sums.digest().hex()}


class Ahead:
    """Reads ranges of a file; after one that follows the last, more is read ahead each time, so
    that reading all of it in order takes few requests. Threads may share it."""

    def __init__(self, file: RangedFile):
        self.file = file
        self.held = (0, b"")  # the begin of the bytes that were read last
        self.window = 0

    def read(self, begin: int, end: int) -> bytes:
        """Returns the bytes from `begin` to before `end`."""
        first, data = self.held  # read once, since other threads may change it
        last = first + len(data)
        if first <= begin and end <= last:
            return data[begin - first : end - first]
        follows = bool(data) and first <= begin <= last
        self.window = min(max(2 * self.window, LEAST), AHEAD) if follows else 0
        kept = data[begin - first :] if follows else b""
        stop = min(max(end, begin + self.window), self.file.size)
        data = kept + self.file.read(begin + len(kept), stop)
        self.held = begin, data
        return data[: end - begin]


class Stream(io.RawIOBase):
    """A file as a binary stream, which reads what is asked for."""

    def __init__(self, file: RangedFile):
        self.file, self.place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.file.size}
        self.place = origin[whence] + offset
        return self.place

    def read(self, size: int | None = -1, /) -> bytes:
        end = self.file.size if size is None or size < 0 else self.place + size
        data = self.file.read(self.place, min(end, self.file.size))
        self.place += len(data)
        return data
