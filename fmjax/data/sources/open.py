"""Where records come from: files of texts, tables or images, here or elsewhere, TFDS, the embedded corpus.

`open_source` opens any of them by its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fmjax.data.records import Record, Source, check_columns, hold_out
from fmjax.data.sources import folders
from fmjax.data.sources.archive import Tar, holds_texts
from fmjax.data.sources.conll import Conll
from fmjax.data.sources.lines import open_files
from fmjax.data.sources.nested_json import Squad
from fmjax.data.sources.parallel import Parallel
from fmjax.data.sources.prepositions import Prepositions
from fmjax.data.sources.python_docs import PythonDocs
from fmjax.data.sources.python_names import PythonNames
from fmjax.data.sources.python_questions import PythonQuestions
from fmjax.data.sources.slices import Characters, part, split_slice
from fmjax.data.storage.paths import ENDINGS, MAY_FOLLOW, find_files, kind_of
from fmjax.errors import UserError, nearest

__all__ = ["KINDS", "Record", "Source", "check_columns", "hold_out", "open_source"]

# The options of each kind of source, keys of the config's `data` section.
KINDS: dict[str, tuple[str, ...]] = {
    "auto": ("record", "columns"),
    "text": ("record",),
    "jsonl": (),
    "csv": ("columns",),
    "tsv": ("columns",),
    "parallel": ("columns",),
    "parquet": ("columns",),
    "arrow": ("columns",),
    "huggingface": ("columns",),
    "array_record": (),
    "tar": (),
    "tfds": ("name", "data_dir", "download"),
    "squad": (),
    "conll": (),
    "python_docs": (),
    "prepositions": (),
    "python_names": (),
    "python_questions": (),
    **dict.fromkeys(folders.KINDS, ()),
}

# Sources of texts that are built in, and those of files that are not the kinds of `files.py`.
BUILT_IN: dict[str, Callable[[str], Source]] = {
    "python_docs": PythonDocs,
    "prepositions": Prepositions,
    "python_names": PythonNames,
    "python_questions": PythonQuestions,
}
OPENERS: dict[str, Callable[..., Source]] = {"parallel": Parallel, "squad": Squad, "conll": Conll, "tar": Tar}
TABLES = ("parquet", "arrow", "huggingface")  # of columns, which pyarrow reads


def open_source(source: str, files: str | Sequence[str] | None, split: str, **options: Any) -> Source:
    """Returns the records of a split.

    `source` is a kind, or "auto": by the files' ending, the embedded corpus if no files are given. `files` is a path,
    several joined by commas, a glob or a folder, of which "input.txt[:90%]" is a part; of TFDS, the name of its split,
    such as "train[:90%]", by default that of `split`. Files of gs:// and the like are fetched into the cache first. Options
    that are unset are empty or None: `record` of text files (paragraph, line, file), `columns` of CSV and TSV files without a
    header, of parallel ones, and of Parquet and Arrow those that are read, `name`, `data_dir` and `download` of TFDS.

    Raises UserError for an unknown kind or option, files that are missing or malformed, and empty data.
    """
    if source not in KINDS:
        raise UserError(f'data.source="{source}"{nearest(source, KINDS)}: choose one of {", ".join(KINDS)}')
    kind, paths, wanted = source, [], None
    if files and source != "tfds":
        files, wanted = split_slice(files)
        files = fetched(files, source)
        source = kind = (kind_of_set(files) if source == "auto" else None) or source
    if source == "tfds" or (files and source in ("idx", "class_folders", "huggingface")):
        pass
    elif source in (*BUILT_IN, "digits") or (source == "auto" and not files):
        if files:
            raise UserError(f"data.source={source} is built in and reads no files; leave data.files.{split} out")
        kind = "python_docs" if source == "auto" else source
    elif not files:
        raise UserError(f"data.source={source} needs files; give --config.data.files.{split}=FILE")
    else:
        paths = find_files(files, "" if source in ("auto", "parallel") else source)
        kind = one_kind(paths) if source == "auto" else source
    given = {name: value for name, value in options.items() if value}
    for name in given:
        if name not in KINDS[kind]:
            takers = [other for other in KINDS if other != "auto" and name in KINDS[other]]
            raise UserError(f"data.{name} is of {', '.join(takers) or 'no kind of source'}, not of {kind}; leave it out")
    if kind == "tfds":
        from fmjax.data.sources.tfds import Tfds  # here, because TFDS takes a second to import

        return Tfds(split=files if isinstance(files, str) else "+".join(files or [split]), **given)
    if kind in folders.KINDS:
        opened = folders.open_images(kind, files, split)
        return opened if wanted is None else part(opened, wanted)
    if kind in BUILT_IN:
        return BUILT_IN[kind](split)
    if kind == "huggingface":
        paths = [one_folder(files, split)]
    opener = OPENERS.get(kind) or late_opener(kind) or partial(open_files, kind)
    texts = opener(paths, split, **given)
    if wanted is None:
        return texts
    return Characters(texts, wanted) if given.get("record") == "file" else part(texts, wanted)


def fetched(files: str | Sequence[str], source: str) -> str | Sequence[str]:
    """Returns names, with what is elsewhere fetched."""
    names = [files] if isinstance(files, str) else files
    if not any("://" in name for name in names):
        return files
    from fmjax.data.storage import remote  # here, because few need it

    return remote.local(files, "" if source in ("auto", "parallel") else source)


def kind_of_set(files: str | Sequence[str]) -> str | None:
    """Returns the kind of source that files are as a set, beyond the ending of each, or None."""
    kind = folders.kind_of_images(files)
    first = Path(files if isinstance(files, str) else next(iter(files), "")).expanduser()
    if (first / "state.json").is_file() or (first / "dataset_dict.json").is_file():
        return "huggingface"
    if kind == "class_folders" and not first.is_dir() and holds_texts(find_files(files)[0]):
        return "tar"
    return kind


def one_folder(files: Any, split: str) -> Path:
    """Returns the folder that is meant. Raises UserError if it is none, or several are."""
    names = [files] if isinstance(files, str) else list(files or ())
    if len(names) != 1 or not Path(names[0]).expanduser().is_dir():
        raise UserError(
            f"data.files.{split}={','.join(names)}: data.source=huggingface reads one folder, that datasets' save_to_disk wrote; "
            "correct the path"
        )
    return Path(names[0]).expanduser()


def late_opener(kind: str) -> Callable[..., Source] | None:
    """Returns the opener of a kind whose package takes a while to import, or None."""
    if kind == "array_record":
        from fmjax.data.sources.array_records import ArrayRecords

        return ArrayRecords
    if kind in TABLES:
        from fmjax.data.sources import columnar

        return columnar.open_saved_folder if kind == "huggingface" else partial(columnar.Columnar, kind=kind)
    return None


def one_kind(paths: Sequence[Any]) -> str:
    """Returns the kind of files by their endings. Raises UserError if there are several, or one is not known."""
    kinds = {path: kind_of(path) for path in paths}
    for path, kind in kinds.items():
        if kind is None:
            raise UserError(
                f"{path}: its ending is none of {', '.join(ENDINGS)} ({MAY_FOLLOW}); say what it is with --config.data.source"
            )
    if len(set(kinds.values())) > 1:
        examples = ", ".join(f"{path.name} is {kind}" for kind, path in {kind: path for path, kind in kinds.items()}.items())
        raise UserError(f"the files are of different kinds ({examples}); give files of one kind")
    return str(kinds[paths[0]])
