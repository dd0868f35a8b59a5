"""What the records of a source are, apart from where they are: in the names of what is made from
them and kept, such as token stores and tables of rows."""

from __future__ import annotations

import hashlib
import json
import re
import uuid

import numpy as np

from fmjax.contracts import Record, Source, Value
from fmjax.data.records import ConcatenatedSources, Selected

# Of files, of the names and sizes in a folder, or of a commit.
DIGEST = re.compile('"([0-9a-f]{64}|[0-9a-f]{40})"')
# What a store says about the content of a remote file (`storage/ranged.py`).
MARKS = ("md5", "crc32c", "etag", "git", "version")
PROCESS = uuid.uuid4().hex
_unknown: dict[int, Source] = {}  # kept, so that no other source gets the same id


def identity(source: Source, here: bool = False) -> Value | None:
    """Returns JSON values that determine the records of a source. None if its fingerprint has no
    digest, so that other records could have the same; or, if `here`, what only this process has."""
    if isinstance(source, Selected):
        own = identity(source.source, here)
        digest = hashlib.sha256(numbers(source).tobytes()).hexdigest()
        return None if own is None else [own, digest]
    if isinstance(source, ConcatenatedSources):
        parts = [identity(part, here) for part in source.parts.values()]
        return None if None in parts else [list(source.columns), parts]
    content = without_names(source.fingerprint())
    if DIGEST.search(json.dumps(content)):
        return [list(source.columns), len(source), content]
    if not here:
        return None
    _unknown[id(source)] = source
    return [PROCESS, id(source)]


def without_names(fingerprint: Record) -> Record:
    """Returns a fingerprint without the names of files that have a digest, and of the split that
    these are of."""
    kept = {
        key: without_names(value) if isinstance(value, dict) else value
        for key, value in fingerprint.items()
    }
    files = fingerprint.get("files")
    if isinstance(files, list) and all(isinstance(one, dict) and digest_of(one) for one in files):
        kept["files"] = [[one.get("size"), digest_of(one)] for one in files]
        kept.pop("split", None)
    return kept


def digest_of(file: Record) -> str:
    """Returns the digest of a file that is always known: the first one, as others are only there
    with `data.verify`. What a store says about a remote file is hashed. Empty if there is none."""
    first = next((key for key in file if key in ("sha256", *MARKS)), "sha256")
    if first == "sha256":
        return str(file.get(first, ""))
    marks = [[name, value] for name, value in file.items() if name in MARKS]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()


def numbers(source: Selected) -> np.ndarray:
    """Returns the numbers of selected records, int64 [N]."""
    chosen = source.indices
    if isinstance(chosen, range):
        return np.arange(chosen.start, chosen.stop, chosen.step)
    return chosen.astype(np.int64)
