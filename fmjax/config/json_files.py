"""Atomic writing of files, and reading of JSON files with helpful errors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fmjax.errors import UserError
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import RunPath

MISSING = "no such file; a Hugging Face model folder has one"


class DuplicateKey(ValueError):
    """A JSON object has a key twice, so its value is ambiguous."""

    def __init__(self, key: str):
        super().__init__(f'the key "{key:.60}" occurs twice in a JSON object')
        self.key = key


def parse_json(text: str | bytes | bytearray) -> Any:
    """Returns the value of a text in strict JSON.

    Raises DuplicateKey, a ValueError, if an object has a key twice. Raises ValueError for anything
    else that is not JSON, such as NaN and Infinity, which Python accepts."""
    if isinstance(text, str) and not text.startswith("\ufeff"):
        return STRICT.decode(text)  # `json.loads` would make a decoder for each call
    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object from keys and values. Raises DuplicateKey if a key occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKey(next(name for name in names if names.count(name) > 1))
    return found


def refuse_constant(name: str) -> Any:
    """Raises ValueError: JSON has no NaN and no Infinity."""
    raise ValueError(f"{name} is not JSON")


STRICT = json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse_constant)


def read_json(path: RunPath, missing: str = MISSING) -> dict[str, Any]:
    """Returns a JSON object.

    Raises UserError if the file is missing, saying so, or holds something else, and OSError if a
    bucket does not answer.
    """
    try:
        # Not `parse_json`: files of other programs may have NaN in keys that are not read.
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"{path}: {missing}") from None
    except PermissionError:
        raise UserError(f"{path}: cannot be read; fix its permissions") from None
    except DuplicateKey as error:
        raise UserError(f"{path}: {error}; remove one") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(path, BucketPath) and isinstance(error, OSError):
            raise
        raise UserError(f"{path}: is not JSON ({error}); download the file again") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: contains a JSON {type(content).__name__}, not an object; download the file "
            "again"
        )
    return content


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when the block succeeds, and is removed when it fails.

    A reader, or a restart after a kill, finds either the old content or the complete new content.

    Raises OSError if it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: RunPath, content: str | bytes) -> None:
    """Writes a file as `open_atomically` does, text as UTF-8."""
    written = content.encode("utf-8") if isinstance(content, str) else content
    if isinstance(path, BucketPath):  # whose objects appear whole
        path.write_bytes(written)
        return
    with open_atomically(path) as file:
        file.write(written)


def write_json(path: RunPath, content: Any, *, indent: int = 1, sort_keys: bool = False) -> None:
    """Writes JSON atomically. Raises OSError if the file cannot be written.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    text = (
        json.dumps(content, indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
        + "\n"
    )
    # A lone surrogate, as in an undecodable argument of a command, becomes an escape sequence.
    write_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def to_line(content: Any) -> str:
    """Returns JSON in one line, with null for NaN and infinity, which JSON does not have."""
    return json.dumps(without_nan(content), allow_nan=False)


def without_nan(content: Any) -> Any:
    """Returns content in which NaN and infinity are None."""
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
