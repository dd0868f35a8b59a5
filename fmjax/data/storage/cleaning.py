"""Lists what is in the cache, and removes what has not been used for some days.

Only what fmjax has written is an entry; other files in the folder are never removed.

An entry was last used when a process last asked for it (`cache.touch`). Entries that a process on
this machine maps or has open are kept, as far as /proc shows them to this user, and so are the
files of a tree that a process holds (`cache.hold`). Another machine is not seen: do not remove
anything while it reads the same cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fmjax.contracts import Record
from fmjax.data.storage import cache
from fmjax.data.storage.token_store import HEADER, read_header

# Names of what killed processes leave behind.
PART = re.compile(r"\.[0-9a-f]{32}\.part")
FOLDER = re.compile(r"\.tokens-.*|\.removed-[0-9a-f]{32}", re.DOTALL)
LEAST = 2  # days; uses are noted once a day

WHAT = {
    "tokens": "token stores",
    "remote": "remote files",
    "ranged": "parts of remote files that are read by range",
    "unpacked": "decompressed files",
    "arrow": "Parquet and Arrow files, rewritten",
    "squad": "SQuAD files, rewritten",
    "index": "indexes of records",
    "rows": "tables of rows",
    "found": "labels and other findings",
    "digests": "remembered SHA-256",
    "unfinished": "files of processes that were killed",
}


class Entry(NamedTuple):
    """What is removed as one: its kind, its files or folders (the first says when it was last
    used), and its bytes."""

    kind: str
    paths: tuple[Path, ...]
    size: int

    @property
    def used(self) -> float:
        """When it was last used, in seconds since 1970; now if it is gone."""
        try:
            return self.paths[0].stat().st_mtime
        except OSError:
            return time.time()


class Removed(NamedTuple):
    """How many entries were removed, their bytes, how many were kept because they are in use, and
    how many could not be removed."""

    entries: int
    size: int
    kept: int
    failed: int


def entries() -> Iterator[Entry]:
    """Yields all entries of the cache."""
    root = cache.folder()
    files, hashes, tokens = root / "files", root / "hashes", root / "tokens"
    for mark in sorted(hashes.rglob("*.json")):
        name = mark.relative_to(hashes)
        file = files / name.with_name(name.name.removesuffix(".json"))
        if is_mark(read_json(mark)) and not os.path.isdir(file):
            yield Entry(name.parts[0], (mark, file), size_of(file))
    for header in sorted(tokens.glob(f"tokens-*/{HEADER}")):
        if read_header(header.parent) is not None:
            yield Entry("tokens", (header, header.parent), size_of(header.parent))
    for note in sorted((root / "digests").glob("*.json")):
        if is_note(note):
            yield Entry("digests", (note,), size_of(note))
    for folder in (files, hashes, root / "digests"):
        for path in sorted(folder.rglob(".*.part")):
            if PART.fullmatch(path.name) and os.path.isfile(path):
                yield Entry("unfinished", (path,), size_of(path))
    for path in sorted(tokens.glob(".*")):
        if FOLDER.fullmatch(path.name):
            yield Entry("unfinished", (path,), size_of(path))


def read_json(path: Path) -> Record:
    """Returns the JSON object in a file; an empty one if there is none, or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_mark(found: Record) -> bool:
    """Returns whether a JSON object says what a file of the cache must be."""
    return (
        found.keys() == {"size", "sha256"}
        and isinstance(found["size"], int)
        and re.fullmatch("[0-9a-f]{64}", str(found["sha256"])) is not None
    )


def is_note(path: Path) -> bool:
    """Returns whether a file is a remembered digest."""
    note = read_json(path)
    try:
        known = cache.Known(tuple(note["state"]), note["sha256"], False)
        return note == cache.as_note(Path(note["path"]), known)
    except (KeyError, TypeError):
        return False


def size_of(path: Path) -> int:
    """Returns the bytes of a file, or of the files in a folder; 0 if it is gone."""
    try:
        if path.is_dir():
            return sum(inner.stat().st_size for inner in path.iterdir())
        return path.stat().st_size
    except OSError:
        return 0


def table() -> str:
    """Returns the size of the cache by kind, as lines."""
    sizes, counts = dict[str, int](), dict[str, int]()
    for entry in entries():
        sizes[entry.kind] = sizes.get(entry.kind, 0) + entry.size
        counts[entry.kind] = counts.get(entry.kind, 0) + 1
    lines = [
        f"{sizes[kind] / 1e6:>12,.1f} MB {counts[kind]:>9,}  {WHAT.get(kind, kind)}"
        for kind in sorted(sizes, key=lambda kind: -sizes[kind])
    ]
    total = f"{sum(sizes.values()) / 1e6:>12,.1f} MB {sum(counts.values()):>9,}  in all"
    return "\n".join([f"{cache.folder()}:", *lines, total])


def remove(days: float) -> Removed:
    """Removes the entries that have not been used for some days, at least LEAST, except those in
    use."""
    held, before = open_files(), time.time() - days * cache.DAY
    held |= {path.parent for path in held}  # token stores
    count = size = kept = failed = 0
    for entry in entries():
        if entry.used >= before:
            continue
        try:
            if not held.isdisjoint(path.resolve() for path in entry.paths):
                kept += 1
            elif removed(entry, before):
                count, size = count + 1, size + entry.size
            else:
                kept += 1
        except OSError:
            failed += 1
    return Removed(count, size, kept, failed)


def removed(entry: Entry, before: float) -> bool:
    """Removes an entry, the file that makes it whole first, unless it has been used since, or a
    process holds its tree. Raises OSError if it cannot be removed."""
    with free(entry) as is_free:
        if not is_free or entry.used >= before:
            return False
        for path in entry.paths:
            if path.is_dir() and not path.is_symlink():
                gone = path.with_name(f".removed-{uuid.uuid4().hex}")
                path.rename(gone)
                shutil.rmtree(gone)
            else:
                path.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def free(entry: Entry) -> Iterator[bool]:
    """Locks the tree of an entry, so that no process begins to read it; yields False if one reads
    it already."""
    tree = cache.tree_of(entry.paths[-1])
    with contextlib.ExitStack() as stack:
        is_free = True
        if tree is not None:
            with contextlib.suppress(FileNotFoundError):
                number = os.open(tree, os.O_RDONLY)
                stack.callback(os.close, number)
                try:
                    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    is_free = False
                except OSError:
                    pass  # the file system has no locks
        yield is_free


def open_files() -> set[Path]:
    """Returns the files that processes map or have open, as far as this user may see them; none
    where there is no /proc."""
    names = set[str]()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's process, or one that has just ended
            lines = (process / "maps").read_text(encoding="utf-8", errors="surrogateescape")
            names |= {line.split(maxsplit=5)[-1] for line in lines.splitlines()}
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    names.add(os.readlink(link))
    return {Path(name) for name in names if name.startswith("/")}
