"""Parallel text, aligned by line: line N has the same meaning in the files of all languages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fmjax.contracts import Record
from fmjax.data.records import RecordSource
from fmjax.data.sources.kinds import SourceKind
from fmjax.data.storage.line_scan import line_tables
from fmjax.data.storage.mapped import File, open_files, plain_name
from fmjax.errors import UserError


class Parallel(RecordSource):
    """Records `{"en": ..., "de": ...}` of files such as train.en.gz and train.de.gz, one line of
    each.

    `columns` names the columns; by default, the file extensions do. Lines that are blank in every
    file are left out. Raises UserError, with both counts, if the files differ in length, and naming
    the line, if it is blank in only one file.
    """

    def __init__(self, paths: Sequence[Path], split: str, columns: Sequence[str] = ()):
        self.split = split
        self.columns = named(paths, columns)
        self.files = open_files(paths)
        # The begin and end of each line of each file, and whether it is not blank.
        self.places = [file.index("parallel", None, 3, partial(scan, file)) for file in self.files]
        counts = ", ".join(
            f"{len(found)} in {path.name}" for found, path in zip(self.places, paths, strict=True)
        )
        if len(set(map(len, self.places))) > 1:
            raise UserError(
                f"data.files.{split}: the files are not aligned: numbers of lines are {counts}; "
                "use files with the same number of lines"
            )
        full = np.stack([found.rows[:, 2] > 0 for found in self.places])
        for number in np.flatnonzero(full.any(axis=0) & ~full.all(axis=0))[:1].tolist():
            blank = paths[int(full[:, number].argmin())]
            raise UserError(
                f"{blank} line {number + 1}: is blank, but its counterpart is not; remove both, or "
                "fix it"
            )
        smallest = np.min_scalar_type(full.shape[1])
        self.numbers = np.flatnonzero(full.all(axis=0)).astype(smallest)
        if not len(self.numbers):
            raise UserError(
                f"{', '.join(map(str, paths))}: no records for {split}; use files that are not "
                "empty"
            )
        self.fingerprint()  # computed now, before the files can change

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        line = self.numbers[index]
        places = [found.rows[line, :2].tolist() for found in self.places]
        texts = [
            file.text(begin, end).strip()
            for file, (begin, end) in zip(self.files, places, strict=True)
        ]
        return dict(zip(self.columns, texts, strict=True))

    def where(self, index: int) -> str:
        return f"{', '.join(file.path.name for file in self.files)} line {self.numbers[index] + 1}"

    def fingerprint(self) -> Record:
        files = [file.fingerprint for file in self.files]
        return {
            "source": "parallel",
            "split": self.split,
            "columns": list(self.columns),
            "files": files,
        }


def scan(file: File, facts: Record) -> Iterator[np.ndarray]:
    """Yields the begin and end of each line of a file, and whether it is not blank, [lines, 3]."""
    for table in line_tables(file):
        yield np.stack(table, axis=1)


def named(paths: Sequence[Path], columns: Sequence[str]) -> tuple[str, ...]:
    """Returns the name of each file's column.

    Raises UserError if there is only one file, or two have the same name.
    """
    names = tuple(columns) or tuple(
        Path(plain_name(path)).suffix.removeprefix(".") for path in paths
    )
    listed = ", ".join(path.name for path in paths)
    if len(paths) < 2:
        raise UserError(
            f"data.source=parallel: {listed} is one file; give one file per language, joined by "
            "commas: a.en,a.de"
        )
    if len(names) != len(paths):
        raise UserError(
            f"data.columns names {len(names)} columns ({', '.join(names)}) for {len(paths)} files "
            f"({listed}); name one column per file"
        )
    if len(set(names)) < len(names) or not all(names):
        raise UserError(
            f"data.source=parallel: the file extensions of {listed} do not name the columns; "
            "name them in data.columns"
        )
    return names


SOURCES = (SourceKind("parallel", Parallel, options=("columns",), any_extension=True),)
