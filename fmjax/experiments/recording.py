"""Writes what was measured into the file of claims."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fmjax.config.json_files import write_atomically
from fmjax.errors import UserError
from fmjax.experiments.entries import Claims, Measured, Written, read_claims
from fmjax.experiments.verdicts import Rows

MARK = "# --- measured"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks the folder of the file, so that several processes record one after the other."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def record(path: Path, name: str, rows: Rows) -> Claims:
    """Replaces what was measured of one experiment; the rest of the file stays as it is.

    Returns what the file then says. Reads it anew, since other processes may have recorded results;
    call it while the file is `locked`. Raises UserError if the file lacks the line that begins with
    MARK, or is not correct.
    """
    claims = read_claims(path)
    known = {**claims.measured, name: rows}
    parts = [head(path)]
    for one in claims.experiments:
        parts += [lines(one, label, row) for label, row in known.get(one, {}).items()]
    write_atomically(path, "".join(parts))
    return read_claims(path)


def head(path: Path) -> str:
    """Returns the file up to what was measured. Raises UserError if it has no such place."""
    text = path.read_text(encoding="utf-8")
    if MARK not in text:
        raise UserError(f"{path}: has no line that begins with {MARK}; add it at the end")
    return f"{text[: text.index(MARK)]}{text[text.index(MARK) :].splitlines()[0]}\n"


def lines(name: str, label: str, row: Measured) -> str:
    """Returns a row as TOML."""
    groups: tuple[tuple[str, Mapping[str, float | tuple[float, ...]]], ...]
    groups = (("values", row.values), ("deviation", row.deviation))
    plain = {key: one for key, one in vars(row).items() if one and not isinstance(one, dict)}
    return "".join(
        [
            f"\n[measured.{name}.{json.dumps(label)}]\n",
            *(f"{of}.{key} = {toml(one)}\n" for of, group in groups for key, one in group.items()),
            *(f"{key} = {toml(one)}\n" for key, one in plain.items()),
        ]
    )


def toml(value: str | float | tuple[float, ...]) -> str:
    """Returns a value as TOML, which writes NaN as "nan"; numbers of the file as they were."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, Written):
        return value.text
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return json.dumps(value, ensure_ascii=False)
