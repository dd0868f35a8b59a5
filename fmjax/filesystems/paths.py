"""Paths of run directories: a local folder, or a folder of a bucket, `gs://bucket/run`.

Runs are read and written through `RunPath` alone, which both kinds are.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import fsspec
import fsspec.config

from fmjax.errors import UserError
from fmjax.filesystems import patience, scratch
from fmjax.filesystems.buckets import SCHEME, BucketPath

RunPath: TypeAlias = Path | BucketPath
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://+(.*)", re.DOTALL)
# `Path` writes gs://bucket as gs:/bucket; other names with a colon are those of local folders.
SHORTENED = re.compile(r"(gs|gcs|s3|az|abfs|hdfs|hf|https?):/([^/].*)", re.DOTALL)
PACKAGES = ("gcsfs", "google.cloud.storage")


def run_path(text: str | os.PathLike[str]) -> RunPath:
    """Returns a local or a bucket path for a string or a path, with "~" expanded.

    Raises UserError for the address of another service, for a name that not all libraries for
    buckets take, and if packages for buckets are missing.
    """
    if isinstance(text, BucketPath):
        return text
    address = parts_of(text)
    if address is None:
        return Path(text).expanduser()
    scheme, place = address
    if scheme == "gcs":
        raise UserError(f"{scheme}://{place}: write {SCHEME}{place}")
    if f"{scheme}://" != SCHEME:
        raise UserError(
            f"{scheme}://{place}: runs are kept in local folders and at {SCHEME}; mount it on "
            "every host, and name the folder"
        )
    bucket, _, key = place.partition("/")
    if not bucket or not key.strip("/"):
        raise UserError(f"{SCHEME}{place}: names no folder of a bucket; write {SCHEME}BUCKET/RUN")
    if {".", ".."} & set(place.split("/")):
        raise UserError(f'{SCHEME}{place}: has "." or ".." as a folder; write the path without it')
    if wrong := sorted({letter for letter in place if letter in "#?*[];" or letter < " "}):
        raise UserError(
            f"{SCHEME}{place}: a run in a bucket cannot have {wrong[0]!r} in its "
            "name; choose another name"
        )
    if missing := [name for name in PACKAGES if not installed(name)]:
        raise UserError(
            f"{SCHEME}{place}: needs a package that is not installed ({missing[0]}); pip install "
            "gcsfs"
        )
    set_up()
    return BucketPath(bucket, re.sub("/+", "/", key).strip("/"))


def local_path(text: str | os.PathLike[str]) -> Path:
    """Returns the path of a local file or folder. Raises UserError for an address."""
    if parts_of(text):
        raise UserError(f"{text}: must be a local file or folder; name one")
    return Path(text)


def parts_of(text: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Returns the scheme of an address, and the rest; None for a local path."""
    name = os.fspath(text)
    address = ADDRESS.fullmatch(name) or SHORTENED.fullmatch(name)
    return (address[1], address[2]) if address else None


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def set_up() -> None:
    """Sets up the libraries with which Orbax reads and writes a bucket: gcsfs for small files,
    TensorStore for arrays.

    Listings must not be remembered, as other hosts write as well. A bucket's kind is not asked for:
    that is a request with a permission of its own. Messages are not printed, as errors are raised
    as well.
    """
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", f"{patience.CONNECT:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{patience.REPLY:.0f}")
    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
        fsspec.register_implementation(
            name, "fmjax.filesystems.patient_gcsfs.PatientFileSystem", clobber=True
        )
        used = fsspec.registry.get(name)
        # Loaded already, as by pandas: the name of a class comes late.
        if used is not None and used.__module__.partition(".")[0] == "gcsfs":
            from fmjax.filesystems.patient_gcsfs import PatientFileSystem

            fsspec.register_implementation(name, PatientFileSystem, clobber=True)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def remove_tree(path: RunPath) -> None:
    """Removes a folder, as far as that is possible."""
    if isinstance(path, BucketPath):
        path.remove_tree()
    else:
        shutil.rmtree(path, ignore_errors=True)


def rename(path: RunPath, target: RunPath) -> RunPath:
    """Renames a folder; both are of the same kind. Returns the new path."""
    if isinstance(path, BucketPath) and isinstance(target, BucketPath):
        return path.rename(target)
    assert isinstance(path, Path) and isinstance(target, Path)
    return path.rename(target)


@contextmanager
def as_local(path: RunPath) -> Iterator[Path]:
    """Gives a local folder with the content of a folder of a run, for the length of the block."""
    if isinstance(path, Path):
        yield path
        return
    with scratch.folder("copy") as folder:
        for name in path.files():
            copy = Path(folder, path.name, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((path / name).read_bytes())
        local = Path(folder, path.name)
        try:
            yield local
        except UserError as error:
            raise UserError(str(error).replace(str(local), str(path))) from error


@contextmanager
def explained() -> Iterator[None]:
    """Turns an OSError about a bucket in the block into a UserError; any other error propagates."""
    try:
        yield
    except OSError as error:
        if (message := explanation(error)) is None:
            raise
        raise UserError(message) from error


def explanation(error: OSError) -> str | None:
    """Returns a line about an error of a bucket, None for any other error."""
    if not str(error.filename).startswith(SCHEME):
        return None
    return (
        f"{error.filename}: {error.strerror}; fix the permissions of the bucket or the network, "
        "and run the same command again"
    )


@contextmanager
def written_from_local(path: RunPath) -> Iterator[Path]:
    """Gives a local folder whose files are in a folder of a run when the block succeeds."""
    if isinstance(path, Path):
        yield path
        return
    with scratch.folder("copy") as folder:
        local = Path(folder, path.name)
        yield local
        for file in sorted(local.rglob("*")):
            if file.is_file():
                (path / file.relative_to(local).as_posix()).write_bytes(file.read_bytes())
