"""Remote files (`gs://bucket/file`, and any other address that etils.epath reads), downloaded once
into the cache.

A copy is named by the address, in a folder named by a hash of the address, the size and the
modification time (or the version tag), so a changed file is downloaded again. Only files that the
user named are downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import fsspec
from etils import epath

from fmjax.data.storage import cache
from fmjax.data.storage.paths import is_data, is_image
from fmjax.errors import UserError, nearest, one_line

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://")
# The packages that read each scheme.
SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
IDX = re.compile(r"(images|labels)[-.]idx[13]", re.IGNORECASE)
# Files in folders that Hugging Face's datasets saved.
SAVED = ("state.json", "dataset_dict.json", "dataset_info.json")
# Their names for the version tag at S3, Azure and others.
VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "blob_id", "last_commit")
BLOCK = 2**23
THREADS = 8  # files of a folder that are downloaded at a time


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
        path = epath.Path(address)
        if re.search(r"[*?\[]", address):
            matches = sorted(str(match) for match in globbed(path) if not match.is_dir())
            if not matches:
                raise UserError(f"{address}: no file matches; correct the pattern")
            return fetch_all([epath.Path(match) for match in matches])
        if path.is_dir():
            return fetch_folder(path, extensions, kind)
        if not path.exists():
            there = (
                sorted(child.name for child in path.parent.iterdir())
                if path.parent.exists()
                else []
            )
            listed = f"; the folder has {', '.join(there[:8])}" if there else ""
            raise UserError(
                f"{address}: no such file{nearest(path.name, there)}{listed}; correct the address"
            )
        if IDX.search(path.name):
            raise UserError(
                f"{address}: the labels of an idx file of images are in another file; name the "
                f"folder of both, {path.parent}"
            )
        return fetch_all([path])
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


def globbed(path: epath.Path) -> Iterator[epath.Path]:
    """Yields the matches of an address with a pattern."""
    parts = path.parts
    first = next(number for number, part in enumerate(parts) if re.search(r"[*?\[]", part))
    yield from type(path)(*parts[:first]).glob("/".join(parts[first:]))


def fetch_folder(path: epath.Path, extensions: Mapping[str, str], kind: str) -> list[Path]:
    """Returns the local copies of the data files in a folder, or a copy of the whole tree if they
    form one data set.

    These are class folders of images, idx files, and folders that Hugging Face's datasets saved.
    """
    children = sorted(path.iterdir(), key=str)
    names = [child.name for child in children]
    data = [child for child in children if is_data(Path(child.name), extensions, kind)]
    together = any(name in SAVED or IDX.search(name) for name in names)
    if data and not together:
        return fetch_all([child for child in data if not child.is_dir()])
    wanted = [file for file in walk(path) if belongs(file.name, extensions)]
    if not wanted:
        listed = f"; it has {', '.join(names[:8])}" if names else ""
        raise UserError(
            f"{path}: the folder has no file of a supported kind{listed}; name the files"
        )
    states = [state_of(file) for file in wanted]
    key = hashed(
        [str(path), [[str(file), *state] for file, state in zip(wanted, states, strict=True)]]
    )
    copies = fetch_all(wanted, key)
    depth = len(PurePosixPath(str(wanted[0]).removeprefix(str(path)).lstrip("/")).parts)
    return [copies[0].parents[depth - 1]]


def belongs(name: str, extensions: Mapping[str, str]) -> bool:
    """Returns whether a file of a folder is part of a data set of several files."""
    return (
        name in SAVED
        or is_image(name)
        or is_data(Path(name), extensions)
        or IDX.search(name) is not None
    )


def walk(path: epath.Path) -> Iterator[epath.Path]:
    """Yields the files under a folder, in the order of their names."""
    for child in sorted(path.iterdir(), key=str):
        if child.is_dir():
            yield from walk(child)
        else:
            yield child


def fetch_all(paths: Sequence[epath.Path], key: str = "") -> list[Path]:
    """Returns the local copies of files. Files with the same key are stored in one tree."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda path: copied(path, key), paths))


def copied(path: epath.Path, key: str = "") -> Path:
    """Returns the local copy of a file.

    Raises UserError if it changes during the download, or arrives incomplete.
    """
    before = state_of(path)
    address = str(path)
    place = PurePosixPath(
        *[part for part in re.split(r"[:/]+", address) if part not in ("", ".", "..")]
    )

    def copy(stream: BinaryIO) -> None:
        count = 0
        with path.open("rb") as remote:
            while block := remote.read(BLOCK):
                count += stream.write(block)
        if count != before[0] or state_of(path) != before:
            raise UserError(
                f"{address}: arrived with {count:,} of {before[0]:,} bytes, or changed during the "
                "download; try again"
            )

    return cache.get_or_make(Path("remote", key or hashed([address, *before]), place), copy)


def state_of(path: epath.Path) -> tuple[int, str]:
    """Returns the size of a file, and its time of modification or version tag.

    Raises UserError if it has neither.
    """
    stat = path.stat()
    version = str(stat.mtime or "")
    if not version:
        system, inner = fsspec.core.url_to_fs(str(path))
        about = system.info(inner)
        version = next((str(about[name]) for name in VERSIONS if about.get(name)), "")
    if not version:
        raise UserError(
            f"{path}: the server gives no version of the file; download it yourself, and name the "
            "copy"
        )
    return int(stat.length), version


def hashed(content: Sequence[object]) -> str:
    """Returns a short name for a list of JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
