"""Opens sources of records: local or remote files with texts, tables or images, TFDS, and the
embedded corpora."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fmjax.contracts import Source, Value
from fmjax.data.records import check_columns, hold_out
from fmjax.data.sources.kinds import (
    AUTO,
    Files,
    SourceKind,
    extensions,
    find_kind,
    kinds,
    recognize,
)
from fmjax.data.sources.slices import Characters, Slice, part, split_slice
from fmjax.data.storage.paths import MAY_FOLLOW, find_files, kind_of
from fmjax.data.storage.ranged import CannotRange, RangedFile
from fmjax.errors import UserError

__all__ = ["Source", "check_columns", "hold_out", "kind_of_files", "named_files", "open_source"]

EMBEDDED = "python_docs"  # the source for "auto" without files


def open_source(source: str, files: Files | None, split: str, **options: Value) -> Source:
    """Returns the records of a split.

    Args:
      source: the name of a kind of source, or "auto": inferred from the file extensions, or the
        embedded corpus if no files are given.
      files: a path, several joined by commas, a glob or a folder, or a part of these, such as
        "input.txt[:90%]". Remote files (gs:// and others) are read by range, or downloaded into the
        cache first. For TFDS, the name of its split, such as "train[:90%]"; by default `split`.
      split: the name of the split.
      options: `record` of text files (paragraph, line, file); `columns` of CSV and TSV files
        without a header and of parallel files, and the columns to read from Parquet and Arrow;
        `name`, `data_dir` and `download` of TFDS. Empty and None mean unset.

    Raises UserError for an unknown kind or option, missing or malformed files, and empty data.
    """
    kind = None if source == AUTO else find_kind(source)
    wanted: Slice | None = None
    named: Files = ()
    ranged: list[RangedFile] = []
    if files and not (kind and kind.reads == "split"):
        files, wanted = split_slice(files)
        named = files
        files, ranged = located_remotely(files, kind)
        if ranged:
            kind = kind or kind_of_files([Path(file.name) for file in ranged])
        kind = kind or recognize(files) or kind_of_files(named_files(files))
    kind = kind or find_kind(EMBEDDED)
    given = {name: value for name, value in options.items() if value}
    found = ranged or located(kind, files, split)
    check_options(kind, given)
    try:
        records = kind.open(found, split, **given)
    except CannotRange:
        copies = located(kind, downloaded(named, kind), split)
        records = kind.open(copies, split, **given)
    if wanted is None:
        return records
    whole_files = kind.name == "text" and given.get("record") == "file"
    return Characters(records, wanted) if whole_files else part(records, wanted)


def located(kind: SourceKind, files: Files | None, split: str) -> Files | Sequence[Path] | None:
    """Returns what a kind of source opens.

    Raises UserError for missing or too many files.
    """
    if kind.reads == "split":
        return files
    if kind.reads == "nothing":
        if files:
            raise UserError(
                f"data.source={kind.name} is built in and reads no files; "
                f"leave data.files.{split} out"
            )
        return None
    if not files:
        raise UserError(
            f"data.source={kind.name} needs files; set --config.data.files.{split}=FILE"
        )
    return files if kind.reads == "folder" else named_files(files, kind)


def named_files(files: Files, kind: SourceKind | None = None) -> list[Path]:
    """Returns the named files; in a folder, those of a kind or with any known extension. Raises
    UserError if one is missing."""
    own = {} if kind is None else dict.fromkeys(kind.extensions, kind.name)
    return find_files(files, extensions() | own, wanted_name(kind))


def wanted_name(kind: SourceKind | None) -> str:
    """Returns the name of the kind whose extensions the files of a folder must have; empty if any
    known extension is allowed."""
    return "" if kind is None or kind.any_extension else kind.name


def check_options(kind: SourceKind, given: Iterable[str]) -> None:
    """Raises UserError for an option that a kind of source does not accept."""
    for name in given:
        if name not in kind.options:
            takers = [other.name for other in kinds().values() if name in other.options]
            raise UserError(
                f"data.{name} is an option of {', '.join(takers) or 'no kind of source'}, not of "
                f"{kind.name}; leave it out"
            )


def downloaded(files: Files, kind: SourceKind | None) -> Files:
    """Returns names, with remote files replaced by their local copies."""
    if not any("://" in name for name in ([files] if isinstance(files, str) else files)):
        return files
    from fmjax.data.storage import remote  # imported here because few runs use it

    return remote.local(files, extensions(), wanted_name(kind))[0]


def located_remotely(files: Files, kind: SourceKind | None) -> tuple[Files, list[RangedFile]]:
    """Returns names, with remote files replaced by their local copies, and the remote files that
    are read by range instead."""
    addresses = [files] if isinstance(files, str) else files
    if not any("://" in name for name in addresses):
        return files, []
    from fmjax.data.storage import remote  # imported here because few runs use it

    by_range = {one.name for one in kinds().values() if one.ranged}
    if kind is not None:
        by_range &= {kind.name}
    return remote.local(files, extensions(), wanted_name(kind), by_range)


def kind_of_files(paths: Sequence[Path]) -> SourceKind:
    """Returns the kind of files by their extensions.

    Raises UserError if there are several, or one is unknown.
    """
    names: dict[str, Path] = {}
    for path in paths:
        name = kind_of(path, extensions())
        if name is None:
            known = f"{', '.join(extensions())} ({MAY_FOLLOW})"
            raise UserError(
                f"{path}: its file extension is not one of {known}; name its kind with "
                "--config.data.source"
            )
        names[name] = path
    if len(names) > 1:
        examples = ", ".join(f"{path.name} is {name}" for name, path in names.items())
        raise UserError(f"the files are of different kinds ({examples}); use files of one kind")
    return kinds()[next(iter(names))]
