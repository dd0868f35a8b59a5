"""`columns.json`: the state that number and category kinds store per column, as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fmjax.config.json_files import read_json
from fmjax.contracts import Config, Value, Where
from fmjax.errors import RecordError, UserError

FILE = "columns.json"
State = Mapping[str, Value]  # the state of each column, as JSON values


def write(folder: Path, state: State) -> None:
    """Writes the state of columns. Raises UserError if writing fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(
            json.dumps(state, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(
            f"{folder / FILE}: {reason}; fix its permissions or free disk space"
        ) from None


def read(folder: Path) -> Config:
    """Returns the state of columns. Raises UserError if it is missing or damaged."""
    return read_json(folder / FILE)


def sha256(state: State) -> str:
    """Returns the hash of the state of columns."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def values(
    records: Sequence[Mapping[str, Value]], column: str, where: Where
) -> list[tuple[Value, str]]:
    """Returns a column's value in each record, and its location. Raises UserError, naming the
    record, if it is missing.
    """
    for number, record in enumerate(records):
        if not isinstance(record, Mapping) or column not in record:
            raise RecordError(
                where(number), f'lacks "{column}", which the task reads; add it', number
            )
    return [(record[column], where(number)) for number, record in enumerate(records)]
