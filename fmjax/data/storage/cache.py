"""The cache folder for files that are downloaded, decompressed or rewritten once, so that they can
be memory-mapped.

It is `$FMJAX_CACHE`, else `$XDG_CACHE_HOME/fmjax`, else `~/.cache/fmjax`, and may be removed at any
time between runs. The files are in `files/`; their sizes and SHA-256, checked whenever a file is
used again, have the same paths in `hashes/`. A path contains the hash of what the file was made
from, so a file is created again when its origin changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fmjax.contracts import Record
from fmjax.errors import UserError

SETTLED = 2 * 10**9  # nanoseconds after which a change of a file certainly changes its timestamps
# Files that this process has read, and their state at the time.
HASHES: dict[Path, tuple[tuple[int, ...], str]] = {}


def folder() -> Path:
    """Returns the cache folder, which may not exist yet."""
    if chosen := os.environ.get("FMJAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fmjax"


def get_or_make(relative: Path, make: Callable[[BinaryIO], None]) -> Path:
    """Returns a file of the cache; `make` writes it if it is missing or damaged.

    Raises UserError if the cache cannot be written, and any exception of `make`; then nothing is
    left behind.
    """
    file, mark = folder() / "files" / relative, folder() / "hashes" / f"{relative}.json"
    try:
        if is_whole(file, mark):
            return file
        for parent in (file.parent, mark.parent):
            parent.mkdir(parents=True, exist_ok=True)
        replace(file, make)
        content = json.dumps(digest(file)).encode()
        replace(mark, lambda stream: stream.write(content))
    except OSError as error:
        raise UserError(
            f"{folder()}: the cache cannot hold {relative.name} ({error.strerror or error}); "
            "free disk space, or set the environment variable FMJAX_CACHE to another folder"
        ) from error
    return file


def is_whole(file: Path, mark: Path) -> bool:
    """Returns whether a cached file exists and has not changed since it was created."""
    try:
        return bool(digest(file) == json.loads(mark.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return False


def replace(file: Path, make: Callable[[BinaryIO], object]) -> None:
    """Writes a file under another name and renames it, so that readers never see a part of it."""
    part = file.with_name(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        with part.open("wb") as stream:
            make(stream)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def digest(path: Path) -> Record:
    """Returns the size and SHA-256 of a file, which is read once per process unless it changes."""
    state = path.stat()
    seen = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    known, sha256 = HASHES.get(path, ((), ""))
    if known != seen:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time_ns() - state.st_ctime_ns > SETTLED:
        HASHES[path] = seen, sha256
    return {"size": state.st_size, "sha256": sha256}
