"""The kinds of sources: declarations in the modules of sources, and lookup by name.

A module declares `SOURCES`, a tuple of `SourceKind`. The kinds in this folder are found by the
names declared there. A module outside fmjax is named with dots, such as
`data.source=my_sources.toy`, and declares one kind; `fmjax.config.names` checks whether it may be
imported. All modules here are imported to find a name, so they import heavy packages inside
functions.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from fmjax.config import names
from fmjax.contracts import Source
from fmjax.errors import UserError, nearest, one_of

PACKAGE = "fmjax.data.sources"
AUTO = "auto"  # inferred from the files
Files: TypeAlias = str | Sequence[str]
NO, BY_NAME, BY_CONTENT = 0, 1, 2  # the certainty that files are of a kind


def unrecognized(files: Files) -> int:
    """Recognizes no files."""
    return NO


@dataclasses.dataclass(frozen=True)
class SourceKind:
    """A kind of source.

    Attributes:
      name: the value of `data.source`; outside fmjax, the module's name is used instead.
      open: returns the records; called with the files, the split and the options that are set.
      reads: what `data.files` names and `open` receives. "files": existing files, as a list of
        paths. "folder": one file or folder, as the user wrote it. "split": the name of a split that
        the source knows. "nothing": the source is built in.
      options: the keys of the config's `data` section that it accepts.
      extensions: its file extensions, such as ".csv"; they determine the kind of a file, and which
        files of a folder are read.
      any_extension: whether it reads the files of a folder that have the extensions of other kinds.
      ranged: whether remote files are read by range: `open` then may also receive `RangedFile`s.
      recognizes: returns the certainty that files are of the kind, if their extension does not
        determine it; the first file exists.
    """

    name: str
    open: Callable[..., Source]
    reads: Literal["files", "folder", "split", "nothing"] = "files"
    options: tuple[str, ...] = ()
    extensions: tuple[str, ...] = ()
    any_extension: bool = False
    ranged: bool = False
    recognizes: Callable[[Files], int] = unrecognized


def first_path(files: Files) -> Path:
    """Returns the first of some files or folders."""
    return Path(files if isinstance(files, str) else next(iter(files), "")).expanduser()


def one_path(files: Files, split: str, kind: str) -> Path:
    """Returns the single file or folder that is named.

    Raises UserError if it does not exist, or several are named.
    """
    given = [files] if isinstance(files, str) else list(files)
    if len(given) != 1:
        raise UserError(
            f"data.files.{split}: has {len(given)} names, but data.source={kind} reads one file or "
            "folder; name one"
        )
    path = Path(given[0]).expanduser()
    if not path.exists():
        there = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
        listed = f"; the folder has {', '.join(there[:8])}" if there else ""
        raise UserError(
            f"{path}: no such file or folder{nearest(path.name, there)}{listed}; correct the path"
        )
    return path


def check_split(source: str, split: str, splits: Iterable[str]) -> None:
    """Raises UserError unless a built-in source has a split."""
    splits = list(splits)
    if split not in splits:
        raise UserError(
            f'{source} has no split "{split}"{nearest(split, splits)}; '
            f"choose one of {', '.join(splits)}"
        )


@functools.cache
def kinds() -> dict[str, SourceKind]:
    """Returns fmjax's own kinds, by name."""
    modules = [
        importlib.import_module(f"{PACKAGE}.{name}") for name in names.choices(PACKAGE, "SOURCES")
    ]
    declared: list[SourceKind] = [kind for module in modules for kind in module.SOURCES]
    return {kind.name: kind for kind in sorted(declared, key=lambda kind: kind.name)}


@functools.cache
def extensions() -> dict[str, str]:
    """Returns the known file extensions, with the kind of each."""
    return {extension: kind.name for kind in kinds().values() for extension in kind.extensions}


def find_kind(name: str) -> SourceKind:
    """Returns the kind of source of a name.

    Raises UserError if it does not exist or is not allowed.
    """
    if "." not in name:
        one_of("data.source", name, [AUTO, *kinds()])
        return kinds()[name]
    declared: tuple[SourceKind, ...] = names.find(
        PACKAGE, name, "SOURCES", "data.source", "source"
    ).SOURCES
    if len(declared) != 1:
        raise UserError(
            f'data.source="{name}": the module declares {len(declared)} kinds of source; '
            "keep only one in SOURCES"
        )
    return dataclasses.replace(declared[0], name=name)


def recognize(files: Files) -> SourceKind | None:
    """Returns the kind that recognizes files with the most certainty, or None."""
    certainty = {kind: kind.recognizes(files) for kind in kinds().values()}
    best = max(certainty, key=certainty.__getitem__)
    return best if certainty[best] else None
