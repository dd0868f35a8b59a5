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
from fmjax.pytree import grouped, names

MANIFEST = "manifest.json"
# {"step", "items": {item: {name: "float32[2,3]"}}, "data", "metrics", "files": {path: {"size",
# "sha256"}}}
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
    stored: Mapping[str, Mapping[str, str]], abstract: Mapping[str, PyTree], folder: Path
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


def list_files(folder: Path) -> Manifest:
    """Returns the size and SHA-256 of each file in a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": file_digest(path),
        }
        for path in files
    }


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(content: Manifest) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, content: Manifest) -> None:
    """Writes a step's manifest, with its own SHA-256, atomically."""
    write_json(folder / MANIFEST, dict(content) | {"sha256": content_digest(content)})


def read_manifest(folder: Path) -> Manifest:
    """Returns a step's manifest.

    Raises DamagedError if it differs from what was written for this step.
    """
    try:
        content: Manifest = json.loads((folder / MANIFEST).read_bytes())
        whole = content.pop("sha256") == content_digest(content) and content["step"] == int(
            folder.name
        )
    except PermissionError as error:
        raise UserError(f"{error.filename}: cannot be read; fix its permissions") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedError(
            f"{folder}: this checkpoint is damaged: {MANIFEST} does not match its checksum"
        )
    return content


def verify_files(folder: Path, files: Mapping[str, Mapping[str, PyTree]]) -> None:
    """Raises DamagedError, naming the first file of a step that is missing or has changed."""
    for name, entry in files.items():
        path = folder / name
        try:
            whole = path.stat().st_size == entry["size"] and file_digest(path) == entry["sha256"]
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
