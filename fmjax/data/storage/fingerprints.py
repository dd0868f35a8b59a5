"""Describes how two sets of data differ, file by file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fmjax.contracts import Record, Value

LISTED = 5  # differences that are listed


def data_differences(old: Record, new: Record) -> list[str]:
    """Returns one line per file and option that differs, as "train: a.txt: 10 bytes, sha256 1f.. ->
    12 bytes, sha256 9c..".

    The fingerprints are those of sources, by split; files are matched by their names.
    """
    before, after = dict(leaves(old)), dict(leaves(new))
    changed = [path for path in before | after if before.get(path) != after.get(path)]
    lines = [
        f"{path}: {before.get(path, '(absent)')} -> {after.get(path, '(absent)')}"
        for path in changed
    ]
    rest = len(lines) - LISTED
    return lines if rest <= 1 else [*lines[:LISTED], f"and {rest} more"]


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


def files_of(files: Sequence[Record], path: str) -> Iterator[tuple[str, str]]:
    seen: dict[str, int] = {}
    for file in files:
        name = str(file["name"])
        seen[name] = seen.get(name, 0) + 1
        mark = f" ({seen[name]})" if seen[name] > 1 else ""
        known = [f"{file['size']:,} bytes"] if isinstance(file.get("size"), int) else []
        known += [f"sha256 {str(file['sha256'])[:12]}"] if "sha256" in file else []
        yield f"{path}: {name}{mark}", ", ".join(known) or "there"
