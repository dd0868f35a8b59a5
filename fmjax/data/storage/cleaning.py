"""Lists what is in the cache, and removes what has not been used for some days.

An entry was last used when a process last asked for it (`cache.touch`). Entries that a process on
this machine maps or has open are kept, as far as /proc shows them to this user; elsewhere, a file
that is mapped stays readable after it is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fmjax.data.storage import cache
from fmjax.data.storage.token_store import HEADER

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


def entries() -> Iterator[Entry]:
    """Yields all entries of the cache."""
    root = cache.folder()
    files, hashes = root / "files", root / "hashes"
    for mark in sorted(hashes.rglob("*.json")):
        name = mark.relative_to(hashes)
        file = files / name.with_name(name.name.removesuffix(".json"))
        yield Entry(name.parts[0], (mark, file), size_of(file))
    for header in sorted((root / "tokens").glob(f"*/{HEADER}")):
        if not header.parent.name.startswith("."):
            yield Entry("tokens", (header, header.parent), size_of(header.parent))
    for note in sorted((root / "digests").glob("*.json")):
        yield Entry("digests", (note,), size_of(note))
    left = [*files.rglob(".*.part"), *hashes.rglob(".*.part"), *(root / "tokens").glob(".*")]
    for path in sorted(left):
        yield Entry("unfinished", (path,), size_of(path))


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


def remove(days: float) -> tuple[int, int, int]:
    """Removes the entries that have not been used for some days, except those in use. Returns how
    many were removed, their bytes, and how many were kept because they are in use."""
    held, before = open_files(), time.time() - days * cache.DAY
    held |= {path.parent for path in held}  # token stores
    count = size = kept = 0
    for entry in entries():
        if entry.used >= before:
            continue
        if not held.isdisjoint(path.resolve() for path in entry.paths):
            kept += 1
        elif removed(entry, before):
            count, size = count + 1, size + entry.size
    return count, size, kept


def removed(entry: Entry, before: float) -> bool:
    """Removes an entry, the file that makes it whole first, unless it has been used since."""
    if entry.used >= before:
        return False
    for path in entry.paths:
        if path.is_dir():
            gone = path.with_name(f".removed-{uuid.uuid4().hex}")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return True


def open_files() -> set[Path]:
    """Returns the files of the cache that processes map or have open, as far as this user may see
    them; none where there is no /proc."""
    root, found = str(cache.folder().resolve()), set[Path]()
    for process in Path("/proc").glob("[0-9]*"):
        names = set[str]()
        with contextlib.suppress(OSError):  # another user's process, or one that has just ended
            lines = (process / "maps").read_text(encoding="utf-8", errors="surrogateescape")
            names |= {line.split(maxsplit=5)[-1] for line in lines.splitlines()}
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    names.add(os.readlink(link))
        found |= {Path(name) for name in names if name.startswith(root)}
    return found
