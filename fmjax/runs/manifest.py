"""The manifest of a checkpoint: the checksums of its files, and the description of its arrays.

It is written last. A step without one does not exist, and one whose files differ from it is
damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import jax

from fmjax.config.json_files import write_json
from fmjax.contracts import PyTree
from fmjax.errors import UserError
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import RunPath
from fmjax.pytree import grouped, names
from fmjax.runs import array_digests

MANIFEST = "manifest.json"
# {"step", "items": {item: {name: "float32[2,3]"}}, "data", "metrics", "files": {path: {"size",
# "sha256"}}}; in a bucket, files have "md5" in place of "sha256", and there is also "arrays":
# {item: {name: digest}}, see `array_digests`, and "attempt", the folder that `files` are in
Manifest: TypeAlias = dict[str, PyTree]
Leaf: TypeAlias = jax.Array | jax.ShapeDtypeStruct


class DamagedError(UserError):
    """A checkpoint differs from what was written."""


def flat(item: PyTree) -> dict[str, PyTree]:
    """Returns an item's leaves by name; a bare array is called "value"."""
    return {name or "value": leaf for name, leaf in names(item).items()}


def describe(leaf: Leaf) -> str:
    """Returns what must agree between an array and its abstract leaf, such as 'float32[2,3]'."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def check_fits(
    stored: Mapping[str, Mapping[str, str]], abstract: Mapping[str, PyTree], folder: RunPath
) -> None:
    """Raises UserError, with the names grouped, if the stored items do not match `abstract`."""
    ours = {
        f"{item}/{name}": describe(leaf)
        for item, tree in abstract.items()
        for name, leaf in flat(tree).items()
    }
    theirs = {
        f"{item}/{name}": text for item in abstract for name, text in stored.get(item, {}).items()
    }
    problems = {
        "missing": [name for name in ours if name not in theirs],
        "unexpected": [name for name in theirs if name not in ours],
        "misshapen": [
            f"{name} {theirs[name]}, expected {ours[name]}"
            for name in ours
            if theirs.get(name, ours[name]) != ours[name]
        ],
    }
    if any(problems.values()):
        raise UserError(
            f"{folder}: this checkpoint does not fit the model and optimizer; {grouped(problems)}; "
            "use the config that it was saved with"
        )


def list_files(folder: RunPath) -> Manifest:
    """Returns the size and SHA-256 of each file in a folder, by relative path; of objects the MD5
    that the bucket gives, so that none is read.
    """
    if isinstance(folder, BucketPath):
        return {
            name: {"size": found.st_size} | ({"md5": found.md5} if found.md5 else {})
            for name, found in folder.files().items()
        }
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": file_digest(path),
        }
        for path in files
    }


def file_digest(path: Path, kind: str = "sha256") -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def content_digest(content: Manifest) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: RunPath, content: Manifest, new: bool = False) -> None:
    """Writes a step's manifest, with its own SHA-256, atomically.

    Raises FileExistsError if it is to be `new`, and is in the bucket already.
    """
    sealed = dict(content) | {"sha256": content_digest(content)}
    if new and isinstance(folder, BucketPath):
        (folder / MANIFEST).write_bytes(json.dumps(sealed, indent=1).encode(), generation=0)
    else:
        write_json(folder / MANIFEST, sealed)


def read_manifest(folder: RunPath) -> Manifest:
    """Returns a step's manifest.

    Raises DamagedError if it differs from what was written for this step, and OSError if a bucket
    does not answer.
    """
    try:
        content: Manifest = json.loads((folder / MANIFEST).read_bytes())
        whole = content.pop("sha256") == content_digest(content) and content["step"] == int(
            folder.name
        )
    except PermissionError as error:
        raise UserError(f"{error.filename}: cannot be read; fix its permissions") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        if isinstance(folder, BucketPath) and isinstance(error, OSError):
            raise
        whole = False
    if not whole:
        raise DamagedError(
            f"{folder}: this checkpoint is damaged: {MANIFEST} does not match its checksum"
        )
    return content


def verify_files(folder: RunPath, files: Mapping[str, Mapping[str, PyTree]]) -> None:
    """Raises DamagedError, naming the first file of a step that is missing or has changed."""
    if isinstance(folder, BucketPath):
        verify_objects(folder, files)
        return
    for name, entry in files.items():
        path = folder / name
        kind = "md5" if "md5" in entry else "sha256"  # it was copied from a bucket
        try:
            same = path.stat().st_size == entry["size"]
            whole = same and (kind not in entry or file_digest(path, kind) == entry[kind])
        except PermissionError:
            raise UserError(f"{path}: cannot be read; fix its permissions") from None
        except FileNotFoundError:
            raise DamagedError(f"{folder}: this checkpoint is damaged: {name} is missing") from None
        except OSError:  # A bad sector.
            whole = False
        if not whole:
            raise DamagedError(
                f"{folder}: this checkpoint is damaged: {name} does not match its checksum"
            )


def verify_objects(folder: BucketPath, files: Mapping[str, Mapping[str, PyTree]]) -> None:
    """As `verify_files`, by what the bucket says about the objects.

    They are read only if the bucket does not have the digest: if they were copied from a local
    run, whose manifest has others, or were uploaded in parts.
    """
    found = folder.files()
    for name, entry in files.items():
        if name not in found:
            raise DamagedError(f"{folder}: this checkpoint is damaged: {name} is missing")
        whole = found[name].st_size == entry["size"]
        kind = "md5" if "md5" in entry else "sha256"
        if whole and kind == "md5" and found[name].md5:
            whole = entry["md5"] == found[name].md5
        elif whole and kind in entry:
            whole = (folder / name).digest(kind, entry["size"]) == entry[kind]
        if not whole:
            raise DamagedError(
                f"{folder}: this checkpoint is damaged: {name} does not match its checksum"
            )


def check_arrays(
    stored: Mapping[str, Mapping[str, str]], items: Mapping[str, PyTree], folder: RunPath
) -> None:
    """Raises DamagedError, naming the first array that is not the one that was saved; arrays
    without a stored digest are not compared.
    """
    for item, tree in items.items():  # in the same order on every host
        if item not in stored:
            continue
        leaves = flat(tree)
        now = array_digests.read(leaves, array_digests.start(leaves))
        for name, digest in now.items():
            if stored[item].get(name, digest) != digest:
                raise DamagedError(
                    f"{folder}: this checkpoint is damaged: {item}/{name} is not what was saved"
                )
