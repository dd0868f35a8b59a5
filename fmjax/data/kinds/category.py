"""Categories: each column has a set of names from the training data, and each name has an id."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from fmjax import contracts
from fmjax.contracts import Column, Config, Value, Where
from fmjax.data.kinds import columns as stored
from fmjax.errors import RecordError


@dataclasses.dataclass(frozen=True)
class Processor(contracts.Processor):
    """The names that occur in each column. Ids are unique across columns; the first id of each
    column is for unknown names.
    """

    kind: ClassVar[str] = "category"
    what: ClassVar[str] = "set of category names"
    reads: ClassVar[str] = "categories"
    file: ClassVar[str] = stored.FILE
    unit: ClassVar[str] = "rows"
    model_settings: ClassVar[tuple[str, ...]] = ("categories",)

    names: Mapping[str, tuple[str, ...]]

    @classmethod
    def fit(cls, columns: Sequence[Column], settings: Config, added: Sequence[Value] = ()) -> Self:
        """Returns the names in each column, sorted. Raises UserError, naming the record, for a
        value that is not a name.
        """
        found: dict[str, set[str]] = {}
        for column in columns:
            values = {category(value, where, column.name) for value, where in column.values()}
            found[column.name] = found.get(column.name, set()) | values
        return cls({name: tuple(sorted(values)) for name, values in found.items()})

    @classmethod
    def restore(cls, folder: Path) -> Self:
        return cls({column: tuple(names) for column, names in stored.read(folder).items()})

    def save(self, folder: Path) -> None:
        stored.write(folder, self.names)

    @property
    def sha256(self) -> str:
        return stored.sha256(self.names)

    def load(self, value: Value, where: str) -> str:
        return category(value, where)

    def sizes(self) -> dict[str, int]:
        """Returns the number of ids of all columns together."""
        return {"categories": sum(len(names) + 1 for names in self.names.values())}

    def digest(self, value: Value) -> bytes:
        return str(value).strip().encode("utf-8", "surrogatepass")

    @functools.cached_property
    def ids(self) -> dict[str, dict[str, int]]:
        """The id of each name, by column; the key "" has the id of unknown names."""
        found: dict[str, dict[str, int]] = {}
        first = 0
        for column, names in self.names.items():
            found[column] = {name: number for number, name in enumerate(("", *names), start=first)}
            first += len(names) + 1
        return found

    def arrays(self, records: Sequence[Mapping[str, Value]], where: Where) -> np.ndarray:
        """Returns the ids of records, int32 [B, columns]. Raises UserError, naming the record that
        lacks one.
        """
        columns = []
        for column, ids in self.ids.items():
            read = [
                category(value, place, column)
                for value, place in stored.values(records, column, where)
            ]
            columns.append([ids.get(name, ids[""]) for name in read])
        return np.array(columns, np.int32).T


def category(value: Value, where: str, column: str = "") -> str:
    """Returns the name of a category from a string or a whole number. Raises RecordError for
    anything else.
    """
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        of_column = f'column "{column}" ' if column else ""
        raise RecordError(
            where, f"{of_column}holds {value!r:.60}, not the name of a category; correct the record"
        )
    return str(value).strip()
