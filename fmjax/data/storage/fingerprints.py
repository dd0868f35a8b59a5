"""Describes how two sets of data differ, file by file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from fmjax.contracts import Record, Value
from fmjax.data.identity import MARKS
from fmjax.data.storage.tar import ARCHIVE_EXTENSIONS

LISTED = 5  # number of listed differences
# The digest of a content; for a folder also that of its files' names and sizes; and what a store
# says about a remote file (`ranged.marks_of`).
DIGESTS = ("sha256", "names", *MARKS)


def data_differences(old: Record, new: Record) -> list[str]:
    """Returns one line per file and option that differs, such as "train: a.txt: 10 bytes, sha256
    1f.. -> 12 bytes, sha256 9c..".

    The fingerprints are those of sources, by split. Files are matched by name, unless they were
    renamed but have the same content in the same order.
    """
    before, after = dict(leaves(renamed(old, new))), dict(leaves(new))
    changed = [path for path in before | after if before.get(path) != after.get(path)]
    lines = [
        f"{path}: {before.get(path, '(absent)')} -> {after.get(path, '(absent)')}"
        for path in changed
    ]
    if not lines and list(file_names(renamed(old, new))) != list(file_names(new)):
        lines = [f"the files come in another order: {', '.join(file_names(new))}"]
    rest = len(lines) - LISTED
    return lines if rest <= 1 else [*lines[:LISTED], f"and {rest} more"]


def renamed(old: Record, new: Mapping[str, Value]) -> Record:
    """Returns a fingerprint with the names of `new` for files with the same content at the same
    position.
    """
    return joined(old, new, lambda before, after: after)


def with_digests(new: Record, old: Mapping[str, Value]) -> Record:
    """Returns a fingerprint with the digests that an earlier one has of the same files, as of a
    folder whose contents were read then."""
    return joined(new, old, lambda after, before: {**before, **after})


def joined(
    one: Record, other: Mapping[str, Value], join: Callable[[Value, Value], Value]
) -> Record:
    """Returns a fingerprint with `join(file, other's)` for files with the same content at the same
    position."""
    found: Record = {}
    for key, value in one.items():
        theirs = other.get(key)
        if isinstance(value, Mapping) and isinstance(theirs, Mapping):
            value = joined(dict(value), theirs, join)
        elif key == "files" and isinstance(theirs, Sequence) and len(theirs) == len(value):
            pairs = zip(value, theirs, strict=True)
            value = [join(own, its) if same_content(own, its) else own for own, its in pairs]
        found[key] = value
    return found


def same_content(one: Value, other: Value) -> bool:
    """Returns whether two files have the same size and digests, of which they need one in
    common."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return False
    common = [name for name in DIGESTS if name in one and name in other]
    return bool(common) and all(one.get(name) == other.get(name) for name in (*common, "size"))


def needs_contents(stored: Mapping[str, Value], by_range: Collection[str], remote: bool) -> bool:
    """Returns whether data can be compared with a stored fingerprint only if they are read as a
    whole, since it has other digests than those that are known of the data anyway.

    These are folders of images of earlier versions of fmjax, which stored a digest of the contents
    alone; and files of the kinds `by_range`, which a run knows by their SHA-256 if they were local
    or copied, and by what a store says if they are read by range. `remote` says whether data are
    remote now.
    """
    source, files = stored.get("source"), stored.get("files")
    if isinstance(files, Sequence) and source == "class_folders":
        return any(
            "names" not in file and not str(file["name"]).lower().endswith(ARCHIVE_EXTENSIONS)
            for file in files
        )
    if isinstance(files, Sequence) and source in by_range:
        marks = [any(name in file for name in MARKS) for file in files]
        hashed = ["sha256" in file for file in files]
        return not all(marks if remote else hashed)
    return any(
        needs_contents(value, by_range, remote)
        for value in stored.values()
        if isinstance(value, Mapping)
    )


def leaves(node: Mapping[str, Value], path: str = "") -> Iterator[tuple[str, str]]:
    """Yields the path and the value of every leaf of a fingerprint."""
    for key, value in node.items():
        place = f"{path}: {key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from leaves(value, place)
        elif key == "files" and all(isinstance(file, Mapping) and "name" in file for file in value):
            yield from files_of(value, path)
        elif key in ("sha256", "tokenizer"):
            yield place, f"sha256 {str(value)[:12]}"
        else:
            yield place, str(value)


def file_names(node: Mapping[str, Value]) -> Iterator[str]:
    """Yields the names of all files of a fingerprint, in order; splits and sources by name."""
    for key in sorted(node):
        if isinstance(node[key], Mapping):
            yield from file_names(node[key])
        elif key == "files":
            yield from (str(file["name"]) for file in node[key] if isinstance(file, Mapping))


def files_of(files: Sequence[Record], path: str) -> Iterator[tuple[str, str]]:
    seen: dict[str, int] = {}
    for file in files:
        name = str(file["name"])
        seen[name] = seen.get(name, 0) + 1
        mark = f" ({seen[name]})" if seen[name] > 1 else ""
        known = [f"{file['size']:,} bytes"] if isinstance(file.get("size"), int) else []
        known += [
            f"{'sha256' if key == 'names' else key} {str(file[key])[:12]}"
            for key in DIGESTS
            if key in file
        ]
        yield f"{path}: {name}{mark}", ", ".join(known) or "there"
