"""Numbers: each column is scaled to mean 0 and standard deviation 1 on the training data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from fmjax import contracts
from fmjax.config.numbers import number_of
from fmjax.contracts import Column, Config, Value, Where
from fmjax.data.kinds import columns as stored
from fmjax.errors import RecordError


@dataclasses.dataclass(frozen=True)
class Processor(contracts.Processor):
    """The mean and the standard deviation of each column."""

    kind: ClassVar[str] = "number"
    what: ClassVar[str] = "mean and deviation of its numbers"
    reads: ClassVar[str] = "numbers"
    file: ClassVar[str] = stored.FILE
    unit: ClassVar[str] = "rows"
    model_settings: ClassVar[tuple[str, ...]] = ("numbers",)

    scales: Mapping[str, tuple[float, float]]

    @classmethod
    def fit(cls, columns: Sequence[Column], settings: Config, added: Sequence[Value] = ()) -> Self:
        """Returns the mean and standard deviation of each column (deviation 1 if all values are
        equal).

        Raises UserError, naming the record, for a value that is not a number.
        """
        found: dict[str, list[float]] = {}
        for column in columns:
            values = [number(value, where, column.name) for value, where in column.values()]
            found.setdefault(column.name, []).extend(values)
        return cls(
            {
                name: (float(np.mean(values)), float(np.std(values)) or 1.0)
                for name, values in found.items()
            }
        )

    @classmethod
    def restore(cls, folder: Path) -> Self:
        return cls(
            {
                name: (float(mean), float(deviation))
                for name, (mean, deviation) in stored.read(folder).items()
            }
        )

    def save(self, folder: Path) -> None:
        stored.write(folder, self.scales)

    @property
    def sha256(self) -> str:
        return stored.sha256(self.scales)

    def load(self, value: Value, where: str) -> float:
        return number(value, where)

    def sizes(self) -> dict[str, int]:
        """Returns the number of columns."""
        return {"numbers": len(self.scales)}

    def digest(self, value: Value) -> bytes:
        return str(value).strip().encode("utf-8", "surrogatepass")

    def arrays(self, records: Sequence[Mapping[str, Value]], where: Where) -> np.ndarray:
        """Returns the numbers of records, scaled, fp32 [B, columns]. Raises UserError, naming the
        record that lacks one.
        """
        columns = []
        for name, (mean, deviation) in self.scales.items():
            read = [
                number(value, place, name) for value, place in stored.values(records, name, where)
            ]
            columns.append((np.array(read) - mean) / deviation)
        return np.stack(columns, axis=1).astype(np.float32)


def number(value: Value, where: str, column: str = "") -> float:
    """Returns a finite number. Raises RecordError for anything else."""
    try:
        return number_of(value)
    except ValueError:
        of_column = f'column "{column}" ' if column else ""
        problem = f"{of_column}holds {value!r:.60}, not a number; correct the record"
        raise RecordError(where, problem) from None
