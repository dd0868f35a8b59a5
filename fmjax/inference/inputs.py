"""Files of examples to predict: JSON lines, text, tables, sentences of words; plain, compressed or
from a pipe.

An example that cannot be read is returned with its error, and does not affect the others.
"""

from __future__ import annotations

import atexit
import json
import math
import sys
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax.contracts import Source, Value
from fmjax.data.characters import is_blank
from fmjax.data.sources.columnar import Columnar
from fmjax.data.sources.kinds import extensions
from fmjax.data.sources.lines import RecordFiles
from fmjax.data.sources.open import open_source
from fmjax.data.storage.mapped import File, lines, not_utf8
from fmjax.data.storage.paths import kind_of
from fmjax.data.stream.tolerance import Tolerance
from fmjax.errors import RecordError, UserError, nearest, one_of

AUTO = "auto"
KINDS = ("jsonl", "text", "csv", "tsv", "parquet", "arrow", "conll")
STANDARD = "-"  # standard input or output
UNLIMITED = f"skip:{sys.maxsize}"  # no limit on bad rows: each is returned with its error


class Example(NamedTuple):
    """An example from a file.

    Attributes:
      place: its location for the answer: {"line": 3}, or {"record": 3} in columnar files.
      where: the same for messages: "in.jsonl line 3".
      value: a text, an object or a list; for an example that cannot be read, the text of its line.
      error: why it cannot be read and how to fix it; empty if it can.
    """

    place: dict[str, int]
    where: str
    value: Value
    error: str = ""


class Inputs:
    """The examples of a file, read on demand. `columns` are those of a table."""

    def __init__(self, name: str, path: Path, columns: Sequence[str] = ()):
        self.name, self.path, self.columns = name, path, tuple(columns)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        """Returns an example. Raises IndexError beyond the last one."""
        raise NotImplementedError

    def reading(self, columns: Sequence[str]) -> Inputs:
        """Returns the same examples, restricted to these columns.

        Raises UserError, listing the existing columns, if a table lacks one.
        """
        check_names(self.name, self.columns, columns)
        return self


class LineInputs(Inputs):
    """One example per non-blank line: a JSON value or, if `plain`, a text."""

    def __init__(self, name: str, path: Path, plain: bool):
        super().__init__(name, path)
        self.file, self.plain = File(path), plain
        found = array("q")
        with Tolerance(UNLIMITED).active():
            for line in lines(self.file):
                if line.text.strip() if plain else not is_blank(line.text):
                    found.extend((line.begin, line.end, line.number))
        self.places = np.array(found, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        begin, end, number = self.places[index].tolist()
        place, where = {"line": number}, f"{self.name} line {number}"
        content = self.file.data[begin:end]
        try:
            text = content.decode("utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            text = content.decode("utf-8", "replace").strip("\r\n")
            return Example(place, where, text, not_utf8(error))
        if self.plain:
            return Example(place, where, text)
        try:
            return Example(place, where, json_value(text))
        except ValueError as error:
            return Example(
                place,
                where,
                text,
                f"{error}; write one JSON string or object per line, or use --source text",
            )


class TableInputs(Inputs):
    """The rows of a table, or the sentences of a file of words with their tags."""

    def __init__(self, name: str, path: Path, source: Source):
        super().__init__(name, path, source.columns)
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        place, where = self.place(index)
        try:
            return Example(place, where, finite(self.source[index]))
        except RecordError as error:
            return Example(place, where, None, error.problem)

    def place(self, index: int) -> tuple[dict[str, int], str]:
        if not isinstance(self.source, RecordFiles):
            return {"record": index}, f"{self.name} record {index}"
        file, begin, _ = self.source.place(index)
        number = file.line_at(begin)
        return {"line": number}, f"{self.name} line {number}"


class ColumnarFile:
    """A Parquet or Arrow file before the columns to read are known."""

    def __init__(self, name: str, path: Path, kind: str):
        from fmjax.data.storage import (
            arrow_files,
        )  # imported here because importing pyarrow takes a moment

        self.name, self.path, self.kind = name, path, kind
        self.columns = tuple(arrow_files.schema_of(path, kind == "parquet").names)

    def reading(self, columns: Sequence[str]) -> Inputs:
        """Returns its rows: these columns, and `id` if it exists. Raises UserError like
        `Inputs.reading`.
        """
        check_names(self.name, self.columns, columns)
        wanted = [name for name in self.columns if name in columns or name == "id"]
        rows = Columnar([self.path], "prediction", self.kind, wanted)
        return TableInputs(self.name, self.path, rows)


def check_names(file: str, there: Sequence[str], columns: Sequence[str]) -> None:
    """Raises UserError, listing the existing columns, unless a table has all columns. Other inputs
    pass.
    """
    for column in columns:
        if there and column not in there:
            raise UserError(
                f'{file}: has no column "{column}"{nearest(column, there)}; it has '
                f"{', '.join(there)}; name the one to read with --column, or, if the file has no "
                "header, all of them with --header"
            )


def open_inputs(path: Path, kind: str = AUTO, header: Sequence[str] = ()) -> Inputs | ColumnarFile:
    """Returns the examples of a file, or of standard input ("-").

    `kind` is one of KINDS; by default it is inferred from the file extension, or is JSON lines for
    an unknown one. `header` names the columns of a CSV or TSV file without a header. Raises
    UserError if the file cannot be read or has no example.
    """
    one_of("--source", kind, (AUTO, *KINDS))
    known = {extension: name for extension, name in extensions().items() if name in KINDS}
    kind = kind_of(path, known) or "jsonl" if kind == AUTO else kind
    if header and kind not in ("csv", "tsv"):
        raise UserError(
            f"--header={','.join(header)}: applies to csv and tsv, not to {kind}; leave it out"
        )
    name = "standard input" if str(path) == STANDARD else str(path)
    path = local(path)
    if kind in ("jsonl", "text"):
        found: Inputs = LineInputs(name, path, plain=kind == "text")
    elif kind in ("parquet", "arrow"):
        return ColumnarFile(name, path, kind)
    else:
        with Tolerance(UNLIMITED).active():
            found = TableInputs(
                name, path, open_source(kind, [str(path)], "prediction", columns=tuple(header))
            )
    if not len(found):
        raise UserError(f"--input={name}: has no examples; write one per line")
    return found


def local(path: Path) -> Path:
    """Returns the path of a file with the content; a copy if it comes from a pipe."""
    try:
        if path.is_file():
            return path
        content = sys.stdin.buffer.read() if str(path) == STANDARD else path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--input={path}: cannot be read ({error.strerror}); name a file of examples"
        ) from None
    with tempfile.NamedTemporaryFile(
        prefix="fmjax-input-", suffix=path.suffix, delete=False
    ) as file:
        file.write(content)
    copy = Path(file.name)
    atexit.register(copy.unlink, missing_ok=True)
    return copy


def json_value(text: str) -> Value:
    """Returns the JSON value in a text. Raises ValueError, with the reason, if there is none."""
    try:
        value = json.loads(text, parse_constant=not_a_number, object_pairs_hook=unique)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("is not JSON (nested too deeply)") from None
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    return value


def not_a_number(name: str) -> Value:
    raise ValueError(f"is not JSON ({name} is not a number)")


def unique(pairs: list[tuple[str, Value]]) -> dict[str, Value]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f'has the key "{twice[0]}" twice')
    return dict(pairs)


def finite(value: Value) -> Value:
    """Returns a value in which NaN and infinity, which JSON lacks, are None."""
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def column_names(written: str, read: Sequence[str]) -> dict[str, str]:
    """Returns, for each column that a task reads, the file's name of it.

    `written` is the name of the one column that the task reads, or "context=passage,question=query"
    for columns with other names. Raises UserError for a name that is not a column of the task.
    """
    names = {column: column for column in read}
    if not written:
        return names
    if "=" not in written:
        if len(read) != 1:
            form = ",".join(f"{column}=NAME" for column in read)
            raise UserError(
                f"--column={written}: the model reads {' and '.join(read)}; write --column {form}"
            )
        return {read[0]: written}
    for part in written.split(","):
        column, _, name = (word.strip() for word in part.partition("="))
        if column not in names or not name:
            raise UserError(
                f'--column={written}: "{part}" is not an input of the model, which reads '
                f"{', '.join(read)}"
            )
        names[column] = name
    return names


def with_names(example: Example, names: Mapping[str, str]) -> Value:
    """Returns an example's value in the form that the task reads.

    Raises UserError, naming the example, if it cannot be read or lacks a column.
    """
    if example.error:
        raise UserError(f"{example.where}: {example.error}")
    value = example.value
    changed = {column: name for column, name in names.items() if column != name}
    if not isinstance(value, Mapping) or not changed:
        return value
    for name in changed.values():
        if name not in value:
            has = ", ".join(value) or "no column"
            raise UserError(f'{example.where}: lacks "{name}"{nearest(name, value)}; it has {has}')
    return {**value, **{column: value[name] for column, name in changed.items()}}
