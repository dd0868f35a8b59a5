"""Where records come from: local files, TFDS, the embedded corpus. `open_source` opens any of them by its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fmjax.data.files import ENDINGS, find_files, kind_of, open_files
from fmjax.data.prepositions import Prepositions
from fmjax.data.python_docs import PythonDocs
from fmjax.data.records import Record, Source, check_columns, hold_out
from fmjax.errors import UserError, nearest

__all__ = ["KINDS", "Record", "Source", "check_columns", "hold_out", "open_source"]

# The options of each kind of source, keys of the config's `data` section.
KINDS: dict[str, tuple[str, ...]] = {
    "auto": ("record", "columns"),
    "text": ("record",),
    "jsonl": (),
    "csv": ("columns",),
    "tsv": ("columns",),
    "tfds": ("name", "data_dir", "download"),
    "python_docs": (),
    "prepositions": (),
}


def open_source(source: str, files: str | Sequence[str] | None, split: str, **options: Any) -> Source:
    """Returns the records of a split.

    `source` is a kind, or "auto": by the files' ending, the embedded corpus if no files are given. `files` is a path,
    several joined by commas, a glob or a folder; of TFDS, the name of its split, such as "train[:90%]", by default
    that of `split`. Options that are unset are empty or None: `record` of text files (paragraph, line, file),
    `columns` of CSV and TSV files without a header, `name`, `data_dir` and `download` of TFDS.

    Raises UserError for an unknown kind or option, files that are missing or malformed, and empty data.
    """
    if source not in KINDS:
        raise UserError(f'data.source="{source}"{nearest(source, KINDS)}: choose one of {", ".join(KINDS)}')
    kind, paths = source, []
    if source == "tfds":
        pass
    elif source in ("python_docs", "prepositions") or (source == "auto" and not files):
        if files:
            raise UserError(f"data.source={source} is built in and reads no files; leave data.files.{split} out")
        kind = "python_docs" if source == "auto" else source
    elif not files:
        raise UserError(f"data.source={source} needs files; give --config.data.files.{split}=FILE")
    else:
        paths = find_files(files, "" if source == "auto" else source)
        kind = one_kind(paths) if source == "auto" else source
    given = {name: value for name, value in options.items() if value}
    for name in given:
        if name not in KINDS[kind]:
            takers = [other for other in KINDS if other != "auto" and name in KINDS[other]]
            raise UserError(f"data.{name} is of {', '.join(takers) or 'no kind of source'}, not of {kind}; leave it out")
    if kind == "tfds":
        from fmjax.data.tfds import Tfds  # here, because TFDS takes a second to import

        return Tfds(split=files if isinstance(files, str) else "+".join(files or [split]), **given)
    if kind in ("python_docs", "prepositions"):
        return PythonDocs(split) if kind == "python_docs" else Prepositions(split)
    return open_files(kind, paths, split, **given)


def one_kind(paths: Sequence[Any]) -> str:
    """Returns the kind of files by their endings. Raises UserError if there are several, or one is not known."""
    kinds = {path: kind_of(path) for path in paths}
    for path, kind in kinds.items():
        if kind is None:
            raise UserError(
                f"{path}: its ending is none of {', '.join(ENDINGS)} (.gz may follow); say what it is with --config.data.source"
            )
    if len(set(kinds.values())) > 1:
        examples = ", ".join(f"{path.name} is {kind}" for kind, path in {kind: path for path, kind in kinds.items()}.items())
        raise UserError(f"the files are of different kinds ({examples}); give files of one kind")
    return str(kinds[paths[0]])
