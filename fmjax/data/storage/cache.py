"""The cache folder: files that are downloaded, decompressed or rewritten once, so that they can be
memory-mapped, and what is remembered of files, their digests and indexes.

It is `$FMJAX_CACHE`, else `$XDG_CACHE_HOME/fmjax`, else `~/.cache/fmjax`, and may be removed at any
time between runs. The files are in `files/`; their sizes and SHA-256, compared whenever a file is
used again, have the same paths in `hashes/`. A path contains the hash of what the file was made
from, so a file is created again when its origin changes.

The SHA-256 of a file is computed once and remembered in `digests/` with the file's size, times and
inode, as Git does in its index; a file of which one of these has changed is read again. A file that
changed within the last seconds is not remembered, since a change in the same tick of the clock
would leave no trace ("racy Git").
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import fcntl
import hashlib
import io
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from fmjax.contracts import Record, Value
from fmjax.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Buffer  # of collections.abc from Python 3.12 on

SETTLED = 2 * 10**9  # nanoseconds after which a change of a file certainly changes its timestamps
DAY = 86_400.0  # seconds
SMALL = 2**16  # bytes; a smaller file is read as fast as what is remembered of it
SLOW = 2**30  # bytes to read again at each start that are worth a warning
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors that reading does not cause
THREADS = 8  # files that are read at a time
TRIES = 1000  # to get a lock that others remove
POLL = 0.05  # seconds between two attempts to lock
QUIET = 1.0  # seconds of waiting before it is shown
FORMAT = 1  # of remembered digests
VERIFY = "read all data again and compare its digests, instead of trusting those remembered"


class CannotWrite(OSError):
    """A file cannot be written, as opposed to the data that go into it, which cannot be read."""


class Known(NamedTuple):
    """A file's SHA-256, its state at the time, and whether this process has read the file."""

    state: tuple[int, ...]  # size, times of modification and change in ns, inode
    sha256: str
    read: bool


HASHES: dict[Path, Known] = {}  # by absolute path; also serves if the cache cannot be written
HELD: dict[Path, int] = {}  # the file descriptors of trees that this process reads
_verifying = contextvars.ContextVar("verifying", default=False)
_forgotten: dict[Path, int] = {}  # bytes read in vain, by the cache that could not keep the result


def folder() -> Path:
    """Returns the cache folder, which may not exist yet."""
    if chosen := os.environ.get("FMJAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fmjax"


def is_writable() -> bool:
    """Returns whether files can be created in the cache folder."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
    return os.access(folder(), os.W_OK)


def get_or_make(relative: Path, make: Callable[[BinaryIO], None]) -> Path:
    """Returns a file of the cache; `make` writes it if it is missing or damaged.

    Raises UserError if the cache cannot be written, or `make` cannot read its data, and any other
    exception of `make`; then nothing is left behind.
    """
    try:
        return found_or_made(relative, make)
    except OSError as error:
        if isinstance(error, CannotWrite) or error.errno in FULL:
            raise UserError(
                f"{folder()}: the cache cannot hold {relative.name} ({error.strerror or error}); "
                "free disk space, or set the environment variable FMJAX_CACHE to another folder"
            ) from error
        raise UserError(
            f"{error.filename or relative.name}: the data cannot be read "
            f"({error.strerror or error}); check the disk, or copy the file again"
        ) from error


def remembered(relative: Path, find: Callable[[], Record]) -> Record:
    """Returns JSON values that `find` finds, or found in an earlier start; they are only found if
    the cache cannot be written."""

    def write(stream: BinaryIO) -> None:
        stream.write(json.dumps(find()).encode())

    try:
        path = found_or_made(relative, write)
    except CannotWrite:
        return find()
    found: Record = json.loads(path.read_text(encoding="utf-8"))
    return found


def found_or_made(relative: Path, make: Callable[[BinaryIO], None]) -> Path:
    """Returns a file of the cache like `get_or_make`; raises CannotWrite if it cannot be
    written."""
    file, mark = folder() / "files" / relative, folder() / "hashes" / f"{relative}.json"
    with writing():
        if is_whole(file, mark):
            return file
    with contextlib.ExitStack() as stack:
        with writing():
            for parent in (file.parent, mark.parent):
                parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(mark.with_name(f"{file.name}.lock")))
            if is_whole(file, mark):  # it was made while this process waited
                return file
        replace(file, make)
        with writing():
            content = json.dumps(digest(file, own=True)).encode()
            replace(mark, lambda stream: stream.write(content))
    return file


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds a lock, so that one process makes something and the others wait, after a second with a
    line that says so. Yields False where the file system has no locks; then each makes it.

    A lock ends with its process; on a shared file system, other hosts may not see it. Raises
    OSError if the lock file cannot be created.
    """
    begun: float | None = time.monotonic()
    for attempt in range(TRIES):
        with path.open("ab") as lock:
            alone = True
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if begun is not None and time.monotonic() - begun >= QUIET:
                        tell(f"waiting for another process that prepares the same data ({path})")
                        begun = None
                    time.sleep(POLL)
                except OSError:
                    alone = False
                    break
            # Whoever had the lock has removed it; another may have created it again.
            same = False
            with contextlib.suppress(FileNotFoundError):
                same = os.path.samestat(os.fstat(lock.fileno()), path.stat())
            if not same and attempt < TRIES - 1:
                continue
            try:
                yield alone
            finally:
                path.unlink(missing_ok=True)
            return


def is_whole(file: Path, mark: Path) -> bool:
    """Returns whether a cached file exists and has not changed since it was created."""
    try:
        whole = bool(digest(file) == json.loads(mark.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return False
    touch(mark)
    return whole


def tree_of(file: Path) -> Path | None:
    """Returns the folder of the remote data set to which a file of the cache belongs, or None."""
    remote = folder() / "files" / "remote"
    inner = file.relative_to(remote).parts if file.is_relative_to(remote) else ()
    return remote / inner[0] if len(inner) > 1 else None


def hold(tree: Path) -> None:
    """Keeps `cleaning` from a tree until this process ends. Its files are opened one at a time, so
    they are not seen to be in use."""
    with contextlib.suppress(OSError):
        tree.mkdir(parents=True, exist_ok=True)
        if tree not in HELD:
            HELD[tree] = os.open(tree, os.O_RDONLY)
            fcntl.flock(HELD[tree], fcntl.LOCK_SH)


def touch(path: Path) -> None:
    """Notes that an entry is used, for `cleaning`, at most once a day."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > DAY:
            os.utime(path)


def replace(file: Path, make: Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Writes a file under another name and renames it, so that readers never see a part of it; if
    `durable`, not even after a crash of the machine."""
    part = file.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with opened_to_write(part) as stream:
            make(stream)
            with writing():
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
        with writing():
            part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turns an OSError inside into CannotWrite."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror or str(error), error.filename) from error


class Written(io.FileIO):
    """A file whose errors of writing are CannotWrite."""

    def write(self, data: Buffer, /) -> int:
        with writing():
            return super().write(data) or 0


def opened_to_write(path: Path) -> BinaryIO:
    """Returns a new file. Raises CannotWrite if it cannot be created; so do its methods if it
    cannot be written."""
    with writing():
        return io.BufferedWriter(Written(path, "w"))


@contextlib.contextmanager
def verifying(wanted: bool) -> Iterator[None]:
    """Reads all files inside again, instead of trusting remembered digests, if `wanted`."""
    token = _verifying.set(wanted or _verifying.get())
    try:
        yield
    finally:
        _verifying.reset(token)


def is_verifying() -> bool:
    """Returns whether all data are read again, inside `verifying`."""
    return _verifying.get()


def digest(path: Path, own: bool = False) -> Record:
    """Returns the size and SHA-256 of a file, which is read only if they are not remembered.

    A file of the cache that was just made here, `own`, is remembered at once: nobody changes it.
    Raises OSError if the file cannot be read.
    """
    return _digest(Path(os.path.abspath(path)), own, _verifying.get())


def read_digests(paths: Sequence[Path]) -> None:
    """Computes the digests of files, several at a time, for `digest` to find.

    A file that cannot be read is left to `digest`.
    """
    verify = _verifying.get()

    def read(path: Path) -> None:
        with contextlib.suppress(OSError):
            _digest(Path(os.path.abspath(path)), False, verify)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, paths))


def _digest(path: Path, own: bool, verify: bool) -> Record:
    begun, state = time.time_ns(), state_of(path)
    known = HASHES.get(path)
    if known is None or known.state != state:
        known = recall(path, state)
    if known is None or own or (verify and not known.read):
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if known is not None and known.sha256 != sha256:
            warn(
                f"{path}: its content has changed, but neither its size nor its times, so what was "
                "remembered of it is discarded; check the disk"
            )
        known = Known(state, sha256, True)
        if state_of(path) != state or not (own or begun - state[2] > SETTLED):
            return {"size": state[0], "sha256": sha256}
        remember(path, known)
    HASHES[path] = known
    return {"size": state[0], "sha256": known.sha256}


def state_of(path: Path) -> tuple[int, int, int, int]:
    """Returns what changes when a file changes: size, times of modification and change, inode."""
    return state_in(path.stat())


def state_in(stat: os.stat_result) -> tuple[int, int, int, int]:
    """Returns the state of a file from what the system says about it."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def name_for(content: Value) -> str:
    """Returns a name for JSON values: 32 hexadecimal digits."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def note_of(path: Path) -> Path:
    """Returns the file in which the digest of a file is remembered."""
    return folder() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


def recall(path: Path, state: tuple[int, ...]) -> Known | None:
    """Returns what is remembered of a file in this state; None if nothing is, or it is damaged."""
    if state[0] < SMALL:
        return None
    try:
        note = json.loads(note_of(path).read_text(encoding="utf-8"))
        found = Known(tuple(note["state"]), note["sha256"], False)
        touch(note_of(path))
        return found if note == as_note(path, found) and found.state == state else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remember(path: Path, known: Known) -> None:
    """Stores a file's digest; if the cache cannot be written, only for this process."""
    if known.state[0] < SMALL:
        return
    content, note = json.dumps(as_note(path, known)).encode(), note_of(path)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        replace(note, lambda stream: stream.write(content), durable=False)
    except OSError as error:
        not_kept(known.state[0], error)


def as_note(path: Path, known: Known) -> Record:
    """Returns the JSON object in which a digest is remembered; `check` reveals damage."""
    note = {"format": FORMAT, "path": os.fsencode(path).decode("utf-8", "replace")}
    note |= {"state": list(known.state), "sha256": known.sha256}
    return note | {"check": hashlib.sha256(json.dumps(note).encode()).hexdigest()[:16]}


def not_kept(size: int, error: OSError) -> None:
    """Counts bytes that the next start must read again, and says so once if they are many."""
    place = folder()
    before = _forgotten.get(place, 0)
    _forgotten[place] = before + size
    if before < SLOW <= before + size:
        warn(
            f"{place}: the cache cannot be written ({error.strerror or error}), so each start "
            "reads all data again; free disk space, or set the environment variable FMJAX_CACHE "
            "to another folder"
        )


def warn(text: str) -> None:
    """Prints a warning."""
    tell(f"warning: {text}")


def tell(text: str) -> None:
    """Prints a line on any host: each has its own disk."""
    print(text, file=sys.stderr, flush=True)
