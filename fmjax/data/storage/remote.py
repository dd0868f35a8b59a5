"""Remote files (`gs://bucket/file`, and others that fsspec reads): read by range, or downloaded
into the cache once per host.

Files of formats with random access (`SourceKind.ranged`) are read by range (`ranged.py`), if all of
them take more than COPIED bytes. Others are copied as a whole. A copy is named by the address, in a
folder named by a hash of the address, the size and the version (a tag or the modification time), so
a changed file is downloaded again. Only files that the user named are downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import fsspec
from fsspec.spec import AbstractFileSystem

from fmjax.contracts import Value
from fmjax.data.storage import cache
from fmjax.data.storage.mapped import compression
from fmjax.data.storage.paths import is_data, is_image, is_text, kind_of
from fmjax.data.storage.ranged import BLOCK, RangedFile, ranged, state_of
from fmjax.data.storage.tar import hidden
from fmjax.errors import UserError, nearest, one_line
from fmjax.filesystems.paths import set_up

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://")
# The packages that read each scheme.
SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
IDX = re.compile(r"(images|labels)[-.]idx[13]", re.IGNORECASE)
# Files in folders that Hugging Face's datasets saved.
SAVED = ("state.json", "dataset_dict.json", "dataset_info.json")
CLASSES = "class_folders"  # the kind of source that reads texts without an extension
COPIED = 2**26  # bytes of files that are copied although they could be read by range
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


class Found(NamedTuple):
    """The files at an address; `tree` is their folder if they form one data set."""

    files: list[RemoteFile]
    tree: str = ""


def is_remote(name: str) -> bool:
    """Returns whether a name is an address."""
    return ADDRESS.match(name) is not None


def local(
    files: str | Sequence[str],
    extensions: Mapping[str, str],
    kind: str = "",
    by_range: Set[str] = frozenset(),
) -> tuple[str | Sequence[str], list[RangedFile]]:
    """Returns names, with each address replaced by the files that were downloaded; or none, and the
    files to read by range.

    Args:
      files: names and addresses.
      extensions: known file extensions, and the kind of source that each stands for.
      kind: the kind of the files to take from a folder; empty for any.
      by_range: the kinds that read files by range.

    Raises UserError for a file that cannot be found or downloaded.
    """
    names = [name.strip() for name in files.split(",")] if isinstance(files, str) else list(files)
    if not any(map(is_remote, names)):
        return files, []
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(
            pool.map(lambda name: find(name, extensions, kind) if is_remote(name) else None, names)
        )
    if by_range and (large := ranged_files(found, extensions, kind, by_range)):
        return [], large
    copies: list[str] = []
    for name, own in zip(names, found, strict=True):
        copies += [name] if own is None else map(str, fetch(name, own))
    return copies, []


def ranged_files(
    found: Sequence[Found | None],
    extensions: Mapping[str, str],
    kind: str,
    by_range: Set[str],
) -> list[RangedFile]:
    """Returns the files to read by range; none unless all of them are remote, of a kind that is
    read so, not compressed, and large."""
    files = [file for own in found if own for file in own.files]
    kinds = {kind or kind_of(Path(file.name), extensions) for file in files}
    if (
        any(own is None or own.tree for own in found)
        or len(kinds) != 1
        or not kinds <= by_range
        or any(compression(Path(file.name)) for file in files)
        or sum(int(file.about["size"]) for file in files) <= COPIED
    ):
        return []

    def opened(file: RemoteFile) -> RangedFile:
        with explained(file.address):
            return ranged(file.system, file.about["name"], file.address)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(opened, files))


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turns the errors of a service, and of a package that is missing, into a UserError."""
    scheme = address.partition("://")[0]
    try:
        yield
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


def check_scheme(address: str) -> str:
    """Returns the scheme of an address. Raises UserError if it is not supported."""
    scheme = address.partition("://")[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(
            f"{address}: {scheme}:// is not supported{nearest(scheme, SCHEMES)}; "
            f"name a local file, or one of {known}"
        )
    if scheme == "gs":
        set_up()
    return scheme


def find(address: str, extensions: Mapping[str, str], kind: str = "") -> Found:
    """Returns a file, the files of a glob, or those of a folder.

    Raises UserError if there are none, or they cannot be found.
    """
    scheme = check_scheme(address)
    with explained(address):
        system, path = fsspec.core.url_to_fs(address)
        system.invalidate_cache()  # listings of earlier calls
        if re.search(r"[*?\[]", address):
            there = system.glob(path, detail=True)
            matches = [file for file in as_files(system, scheme, there) if not file.is_folder]
            if not matches:
                raise UserError(f"{address}: no file matches; correct the pattern")
            return Found(matches)
        if system.isdir(path):
            return files_in(system, scheme, path, extensions, kind)
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
        return Found([file])


def fetch(address: str, found: Found) -> list[Path]:
    """Returns the local copies of the files at an address, or of the whole tree if they form one
    data set."""
    with explained(address):
        if not found.tree:
            return fetch_all(found.files)
        key = cache.name_for([found.tree, [[file.address, *state(file)] for file in found.files]])[
            :16
        ]
        cache.hold(cache.folder() / "files" / "remote" / key)
        copies = fetch_all(found.files, key)
        inner = found.files[0].address.removeprefix(found.tree).lstrip("/")
        return [copies[0].parents[len(PurePosixPath(inner).parts) - 1]]


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


def files_in(
    system: AbstractFileSystem, scheme: str, path: str, extensions: Mapping[str, str], kind: str
) -> Found:
    """Returns the data files in a folder, or the whole tree if they form one data set.

    These are class folders of images, idx files, and folders that Hugging Face's datasets saved.
    """
    children = as_files(system, scheme, listing(system, path))
    names = [child.name for child in children]
    data = [child for child in children if is_data(Path(child.name), extensions, kind)]
    together = any(name in SAVED or IDX.search(name) for name in names)
    if data and not together:
        return Found([child for child in data if not child.is_folder])
    files = as_files(system, scheme, system.find(path, detail=True))
    wanted = [file for file in files if belongs(file.name, extensions)]
    address = f"{scheme}://{path.strip('/')}"
    if kind in ("", CLASSES) and not together and not any(is_image(file.name) for file in wanted):
        wanted = [
            file for file in files if belongs(file.name, extensions) or is_class_text(file, address)
        ]
    if not wanted:
        listed = f"; it has {', '.join(names[:8])}" if names else ""
        raise UserError(
            f"{address}: the folder has no file of a supported kind{listed}; name the files"
        )
    return Found(wanted, address)


def is_class_text(file: RemoteFile, folder: str) -> bool:
    """Returns whether a file is a text in a class folder, perhaps without an extension."""
    inner = PurePosixPath(file.address.removeprefix(folder).lstrip("/"))
    return len(inner.parts) > 1 and is_text(file.name) and not hidden(inner)


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
    before = state(file)
    place = PurePosixPath(
        *[part for part in re.split(r"[:/]+", file.address) if part not in ("", ".", "..")]
    )

    def copy(stream: BinaryIO) -> None:
        count = 0
        with file.system.open(file.about["name"], "rb") as remote:
            while block := remote.read(BLOCK):
                count += stream.write(block)
        if count != before[0] or state(file) != before:
            raise UserError(
                f"{file.address}: arrived with {count:,} of {before[0]:,} bytes, or changed during "
                "the download; try again"
            )

    return cache.get_or_make(
        Path("remote", key or cache.name_for([file.address, *before])[:16], place), copy
    )


def state(file: RemoteFile) -> tuple[int, str]:
    """Returns the size and the version of a file as they are now."""
    return state_of(file.system, file.about["name"], file.address)
