"""The cache folder: what was fetched from afar, unpacked or rewritten once, so that it can be mapped into memory.

It is `$FMJAX_CACHE`, else `$XDG_CACHE_HOME/fmjax`, else `~/.cache/fmjax`, and may be removed at any time between runs. Under
`files/` stands what was made, under the same path in `hashes/` its size and SHA-256, which are checked when it is used again.
Names hold the hash of what a file was made from, so that what has changed is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fmjax.errors import UserError

SETTLED = 2 * 10**9  # nanoseconds after which a change of a file is sure to change its times
HASHES: dict[Path, tuple[tuple[int, ...], str]] = {}  # what this process has read, and in which state


def folder() -> Path:
    """Returns the cache folder, which need not be there yet."""
    if given := os.environ.get("FMJAX_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fmjax"


def made(relative: Path, make: Callable[[BinaryIO], None]) -> Path:
    """Returns a file of the cache, which `make` writes unless it is there whole.

    Raises UserError if the cache cannot be written, and whatever `make` raises; then nothing is left behind.
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
            f"{folder()}: the cache cannot hold {relative.name} ({error.strerror or error}); make room, or name another folder "
            "in the environment: FMJAX_CACHE=DIR"
        ) from error
    return file


def is_whole(file: Path, mark: Path) -> bool:
    """Returns whether a file of the cache is there as it was made."""
    try:
        return bool(digest(file) == json.loads(mark.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return False


def replace(file: Path, make: Callable[[BinaryIO], Any]) -> None:
    """Writes a file beside its place and moves it there, so that whoever reads it finds a whole one."""
    part = file.with_name(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        with part.open("wb") as stream:
            make(stream)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def digest(path: Path) -> dict[str, Any]:
    """Returns the size and SHA-256 of a file, read once in a process unless it changes."""
    state = path.stat()
    seen = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    known, found = HASHES.get(path, ((), ""))
    if known != seen:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time_ns() - state.st_ctime_ns > SETTLED:
        HASHES[path] = seen, found
    return {"size": state.st_size, "sha256": found}
