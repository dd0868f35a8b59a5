"""Token stores: the token ids of a corpus in files that are read in parts, so that a corpus need
not fit into memory.

A store is a folder:

    tokens.ds         the ids of one document after the other: uint16, or uint32 if ids exceed it
    tokens.ds.index   the end of each document, in tokens: uint64
    tokens.ds.sizes   the characters and UTF-8 bytes of each document: uint64 [documents, 2]
    store.json        format, counts, and the size and SHA-256 of each file

All numbers are little-endian. The first two files are as datatrove's `DocumentTokenizer` writes
them. A store is written beside its final place and renamed, and its sizes are checked whenever it
is opened, so that a part of one is never taken for the whole; with `data.verify`, so are its
digests. Its name is a hash of what it was made from.

Ids are read with `pread`, not mapped: mapped pages count as memory of the process, and a file that
is truncated while it is mapped kills it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax.config.json_files import write_json
from fmjax.contracts import Record, Value
from fmjax.data.storage import cache
from fmjax.errors import UserError

FORMAT = 1
TOKENS, ENDS, SIZES, HEADER = "tokens.ds", "tokens.ds.index", "tokens.ds.sizes", "store.json"

_place: contextvars.ContextVar[str | None] = contextvars.ContextVar("store", default=None)


class Part(NamedTuple):
    """Consecutive documents: their ids [T], the number of tokens of each [N], and the characters
    and UTF-8 bytes of each [N, 2]."""

    ids: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray


class TokenStore:
    """A finished store, pickled by its path. Documents are numbered from 0.

    Raises UserError if the folder has none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        header = read_header(folder)
        if header is None:
            raise UserError(f"{folder}: is not a complete token store; start the run again")
        cache.touch(folder / HEADER)
        self.header = header
        self.dtype = np.dtype(header["dtype"])
        self.stream = (folder / TOKENS).open("rb", buffering=0)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Value, ...]]:
        return TokenStore, (self.folder,)

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """The end of each document in tokens, int64 [documents], memory-mapped."""
        return mapped(self.folder / ENDS, np.dtype("<i8"))

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """The characters and UTF-8 bytes of each document, int64 [documents, 2], memory-mapped."""
        return mapped(self.folder / SIZES, np.dtype("<i8")).reshape(-1, 2)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Returns the tokens from `begin` to before `end`, int32. Raises UserError if the file has
        become shorter."""
        wide = self.dtype.itemsize
        data = os.pread(self.stream.fileno(), (end - begin) * wide, begin * wide)
        if len(data) < (end - begin) * wide:
            raise UserError(f"{self.folder / TOKENS}: was truncated; start the run again")
        return np.frombuffer(data, self.dtype).astype(np.int32)


def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Returns the numbers in a file, memory-mapped; an empty file cannot be mapped."""
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def read_header(folder: Path) -> Record | None:
    """Returns the content of a store's `store.json`; None unless the store is complete, and with
    `data.verify` its digests are those of its files."""
    try:
        header: Record = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        whole = header["format"] == FORMAT and all(
            (folder / name).stat().st_size == file["size"]
            and (
                not cache.is_verifying() or cache.digest(folder / name)["sha256"] == file["sha256"]
            )
            for name, file in header["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return header if whole else None


class Writer:
    """Writes a store into a new folder.

    Its methods raise UserError if the disk is full, with the bytes that the store needs."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.tokens, self.documents, self.totals = 0, 0, np.zeros(2, np.int64)
        self.share = 0.0  # of the documents that have been written
        self.hashes = {name: hashlib.sha256() for name in (TOKENS, ENDS, SIZES)}
        with self.explained():
            folder.mkdir(parents=True, exist_ok=True)
            self.streams = {name: (folder / name).open("wb") for name in self.hashes}

    def add(self, part: Part, share: float = 0.0) -> None:
        """Appends documents, after which `share` of all are written."""
        ends = self.tokens + np.cumsum(part.counts, dtype=np.int64)
        content = {
            TOKENS: part.ids.astype(self.dtype, copy=False),
            ENDS: ends.astype("<u8"),
            SIZES: part.sizes.astype("<u8"),
        }
        with self.explained():
            for name, array in content.items():
                data = array.tobytes()
                self.streams[name].write(data)
                self.hashes[name].update(data)
        self.tokens += part.ids.size
        self.documents += len(part.counts)
        self.totals += part.sizes.sum(axis=0, dtype=np.int64)
        self.share = share

    def close(self, facts: Record) -> None:
        """Completes the store; `facts` are added to its header."""
        with self.explained():
            for stream in self.streams.values():
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
            files = {
                name: {"size": (self.folder / name).stat().st_size, "sha256": sha256.hexdigest()}
                for name, sha256 in self.hashes.items()
            }
            header: Record = {"format": FORMAT, "dtype": self.dtype.str, "files": files}
            header |= {"tokens": self.tokens, "documents": self.documents}
            header |= dict(zip(("characters", "bytes"), self.totals.tolist(), strict=True))
            write_json(self.folder / HEADER, header | facts)

    def abandon(self) -> None:
        """Removes what was written."""
        for stream in self.streams.values():
            with contextlib.suppress(OSError):  # what a full disk did not take
                stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            written = self.tokens * self.dtype.itemsize + self.documents * 24
            needed = f" of about {written / self.share:,.0f}" if self.share else ""
            raise UserError(
                f"{self.folder.parent}: the tokens of the data cannot be stored "
                f"({error.strerror or error}) after {written:,}{needed} bytes; free disk space, or "
                "name another folder in data.store"
            ) from error


@contextlib.contextmanager
def stored_in(folder: str | None) -> Iterator[None]:
    """Makes `place` return a folder; None stands for the cache."""
    token = _place.set(folder)
    try:
        yield
    finally:
        _place.reset(token)


def place() -> Path:
    """Returns the folder where stores are built: `data.store`, unless it is remote, or the
    cache."""
    chosen = _place.get()
    if not chosen or remote_place():
        return cache.folder() / "tokens"
    return Path(chosen).expanduser().absolute()


def remote_place() -> str:
    """Returns `data.store` if it is an address, whose stores are read by range; otherwise ""."""
    chosen = _place.get() or ""
    return chosen.rstrip("/") if "://" in chosen else ""


def find(key: str, folders: list[Path]) -> TokenStore | None:
    """Returns the first complete store of that name in some folders, or None."""
    found = (folder / key for folder in folders)
    return next((TokenStore(path) for path in found if read_header(path) is not None), None)


def get_or_build(
    folder: Path, key: str, dtype: np.dtype, fill: Callable[[Writer], Record]
) -> TokenStore:
    """Returns the store of a name; `fill` writes it if there is none, and returns what to add to
    its header.

    One process builds and the others wait, also those of other hosts if the file system has locks
    that all hosts see. Otherwise several build, and the first to finish wins. Raises UserError if
    the folder cannot be written to, and any exception of `fill`; then nothing is left behind.
    """
    target = folder / key
    if read_header(target) is not None:
        return TokenStore(target)
    with locked(folder, key) as alone:
        if read_header(target) is None:
            beside = f".{key}-{socket.gethostname()}-"
            for left in folder.glob(f"{beside}*") if alone else ():  # by a killed process
                shutil.rmtree(left, ignore_errors=True)
            build(folder / f"{beside}{uuid.uuid4().hex}", target, dtype, fill)
    return TokenStore(target)


def build(part: Path, target: Path, dtype: np.dtype, fill: Callable[[Writer], Record]) -> None:
    """Writes a store to `part` and renames it."""
    writer = Writer(part, dtype)
    try:
        writer.close(fill(writer))
        with writer.explained():
            sync(part)
            if target.exists() and read_header(target) is None:
                shutil.rmtree(target)  # damaged
            with contextlib.suppress(FileExistsError):
                replace(part, target)
            sync(target.parent)
    finally:
        writer.abandon()


def replace(part: Path, target: Path) -> None:
    """Renames a folder. Raises FileExistsError if another process has built the same."""
    try:
        part.rename(target)
    except OSError as error:
        if read_header(target) is None:
            raise
        raise FileExistsError(str(target)) from error


def sync(folder: Path) -> None:
    """Makes the names in a folder survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path, key: str) -> Iterator[bool]:
    """Lets one process at a time build the store of a name; yields False on file systems without
    locks. The system frees the lock of a process that ends."""
    path = folder / "locks" / key
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(cache.locked(path))
        except OSError as error:
            raise UserError(
                f"{folder}: the tokens of the data cannot be stored ({error.strerror or error}); "
                "name another folder in data.store"
            ) from error
        yield alone


def key_of(*facts: Value) -> str:
    """Returns the name of the store that is made from these JSON values."""
    return f"tokens-{digest_of(FORMAT, *facts)}"


def digest_of(*facts: Value) -> str:
    """Returns a name for JSON values."""
    return cache.name_for(facts)[:24]
