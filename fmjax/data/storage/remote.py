"""Remote files (`gs://bucket/file`, and others that fsspec reads), downloaded into the cache once
per host.

A copy is named by the address, in a folder named by a hash of the address, the size and the version
(a tag or the modification time), so a changed file is downloaded again. Only files that the user
named are downloaded. Files are copied as a whole: the reader of ArrayRecord needs a local file, and
the SHA-256 by which a run knows its data covers all bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import fsspec
from fsspec.spec import AbstractFileSystem

from fmjax.contracts import Value
from fmjax.data.storage import cache
from fmjax.data.storage.paths import is_data, is_image
from fmjax.errors import UserError, nearest, one_line

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://")
# The packages that read each scheme.
SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
IDX = re.compile(r"(images|labels)[-.]idx[13]", re.IGNORECASE)
# Files in folders that Hugging Face's datasets saved.
SAVED = ("state.json", "dataset_dict.json", "dataset_info.json")
# The names of a file's version at Google, S3, Azure, Hugging Face and others.
VERSIONS = (
    *("generation", "ETag", "etag", "mtime", "updated"),
    *("LastModified", "last_modified", "blob_id", "last_commit", "created"),
)
BLOCK = 2**23
THREADS = 8  # files of a folder that are downloaded at a time


class RemoteFile(NamedTuple):
    """A file of a service: its address, and what the service says about it."""

    system: AbstractFileSystem
    address: str
    about: Mapping[str, Value]

    @property
    def name(self) -> str:
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def is_folder(self) -> bool:
        return bool(self.about["type"] == "directory")


def is_remote(name: str) -> bool:
    """Returns whether a name is an address."""
    return ADDRESS.match(name) is not None


def local(
    files: str | Sequence[str], extensions: Mapping[str, str], kind: str = ""
) -> str | Sequence[str]:
    """Returns names, with each address replaced by the files that were downloaded.

    Args:
      files: names and addresses.
      extensions: known file extensions, and the kind of source that each stands for.
      kind: the kind of the files to take from a folder; empty for any.

    Raises UserError for a file that cannot be downloaded.
    """
    names = [name.strip() for name in files.split(",")] if isinstance(files, str) else list(files)
    if not any(map(is_remote, names)):
        return files
    copies: list[str] = []
    for name in names:
        copies += map(str, fetch(name, extensions, kind)) if is_remote(name) else [name]
    return copies


def fetch(address: str, extensions: Mapping[str, str], kind: str = "") -> list[Path]:
    """Returns the local copies of a file, of the files of a glob, or of a folder."""
    scheme = address.partition("://")[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(
            f"{address}: {scheme}:// is not supported{nearest(scheme, SCHEMES)}; "
            f"name a local file, or one of {known}"
        )
    try:
        system, path = fsspec.core.url_to_fs(address)
        system.invalidate_cache()  # listings of earlier calls
        if re.search(r"[*?\[]", address):
            found = system.glob(path, detail=True)
            matches = [file for file in as_files(system, scheme, found) if not file.is_folder]
            if not matches:
                raise UserError(f"{address}: no file matches; correct the pattern")
            return fetch_all(matches)
        if system.isdir(path):
            return fetch_folder(system, scheme, path, extensions, kind)
        if not system.exists(path):
            raise UserError(
                f"{address}: no such file{neighbors(system, path)}; correct the address"
            )
        (file,) = as_files(system, scheme, {path: system.info(path)})
        if IDX.search(file.name):
            raise UserError(
                f"{address}: the labels of an idx file of images are in another file; name the "
                f"folder of both, {address.rpartition('/')[0]}"
            )
        return fetch_all([file])
    except ImportError as error:
        raise UserError(
            f"{address}: cannot be read without a package that is not installed "
            f"({one_line(error, 200)}); pip install {SCHEMES[scheme]}, or fetch the file"
        ) from error
    except UserError:
        raise
    except Exception as error:  # any error of the network, the service or its package
        what = one_line(error, 200) or type(error).__name__
        raise UserError(
            f"{address}: cannot be fetched ({what}); correct the address, or your credentials for "
            "it"
        ) from error


def as_files(
    system: AbstractFileSystem, scheme: str, found: Mapping[str, Mapping[str, Value]]
) -> list[RemoteFile]:
    """Returns files in the order of their names, from their paths and what is known of them."""
    return [
        RemoteFile(system, f"{scheme}://{path.strip('/')}", found[path]) for path in sorted(found)
    ]


def listing(system: AbstractFileSystem, path: str) -> dict[str, Mapping[str, Value]]:
    """Returns what is in a folder. Some services list the folder itself, too."""
    found = {about["name"].rstrip("/"): about for about in system.ls(path, detail=True)}
    return {name: about for name, about in found.items() if name != path.rstrip("/")}


def neighbors(system: AbstractFileSystem, path: str) -> str:
    """Returns a hint at what is in the folder of a missing file; empty if there is no folder."""
    parent, _, name = path.rstrip("/").rpartition("/")
    if not parent or not system.isdir(parent):
        return ""
    there = sorted(child.rpartition("/")[2] for child in listing(system, parent))
    return f"{nearest(name, there)}; the folder has {', '.join(there[:8])}" if there else ""


def fetch_folder(
    system: AbstractFileSystem, scheme: str, path: str, extensions: Mapping[str, str], kind: str
) -> list[Path]:
    """Returns the local copies of the data files in a folder, or a copy of the whole tree if they
    form one data set.

    These are class folders of images, idx files, and folders that Hugging Face's datasets saved.
    """
    children = as_files(system, scheme, listing(system, path))
    names = [child.name for child in children]
    data = [child for child in children if is_data(Path(child.name), extensions, kind)]
    together = any(name in SAVED or IDX.search(name) for name in names)
    if data and not together:
        return fetch_all([child for child in data if not child.is_folder])
    files = as_files(system, scheme, system.find(path, detail=True))
    wanted = [file for file in files if belongs(file.name, extensions)]
    address = f"{scheme}://{path.strip('/')}"
    if not wanted:
        listed = f"; it has {', '.join(names[:8])}" if names else ""
        raise UserError(
            f"{address}: the folder has no file of a supported kind{listed}; name the files"
        )
    key = hashed([address, [[file.address, *state_of(file)] for file in wanted]])
    copies = fetch_all(wanted, key)
    depth = len(PurePosixPath(wanted[0].address.removeprefix(address).lstrip("/")).parts)
    return [copies[0].parents[depth - 1]]


def belongs(name: str, extensions: Mapping[str, str]) -> bool:
    """Returns whether a file of a folder is part of a data set of several files."""
    return (
        name in SAVED
        or is_image(name)
        or is_data(Path(name), extensions)
        or IDX.search(name) is not None
    )


def fetch_all(files: Sequence[RemoteFile], key: str = "") -> list[Path]:
    """Returns the local copies of files. Files with the same key are stored in one tree."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda file: copied(file, key), files))


def copied(file: RemoteFile, key: str = "") -> Path:
    """Returns the local copy of a file.

    Raises UserError if it changes during the download, or arrives incomplete.
    """
    before = state_of(file)
    place = PurePosixPath(
        *[part for part in re.split(r"[:/]+", file.address) if part not in ("", ".", "..")]
    )

    def copy(stream: BinaryIO) -> None:
        count = 0
        with file.system.open(file.about["name"], "rb") as remote:
            while block := remote.read(BLOCK):
                count += stream.write(block)
        file.system.invalidate_cache(file.about["name"])
        if count != before[0] or state_of(file) != before:
            raise UserError(
                f"{file.address}: arrived with {count:,} of {before[0]:,} bytes, or changed during "
                "the download; try again"
            )

    return cache.get_or_make(Path("remote", key or hashed([file.address, *before]), place), copy)


def state_of(file: RemoteFile) -> tuple[int, str]:
    """Returns the size of a file, and its version: a tag or the modification time.

    Raises UserError if it has none.
    """
    about = file.system.info(file.about["name"])  # some services put it otherwise in a listing
    version = next((str(about[name]) for name in VERSIONS if about.get(name)), "")
    if not version:
        raise UserError(
            f"{file.address}: the server gives no version of the file; download it yourself, and "
            "name the copy"
        )
    return int(about["size"]), version


def hashed(content: Sequence[object]) -> str:
    """Returns a short name for a list of JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
