"""Processors of columns, which turn raw values into arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import numpy as np

from fmjax.contracts.data import Source
from fmjax.contracts.types import Config, HostBatch, Value


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a source."""

    source: Source
    name: str

    def values(self) -> Iterator[tuple[Value, str]]:
        """Yields each value and the location of its record, such as "reviews.tsv line 12"."""
        for index in range(len(self.source)):
            yield self.source[index][self.name], self.source.where(index)


class Processor:
    """Base class: turns the values of the columns of one kind into arrays. `fmjax/data/kinds` has
    one file per kind.

    A run's processor is named in the config, determined by the task's settings, taken from the
    weights that the run starts from, or fitted to the training data. The run stores it, with a
    hash. Processors are pickled for Grain's workers."""

    kind: ClassVar[str]  # the name of its file
    what: ClassVar[str]  # in words: "tokenizer"
    reads: ClassVar[str]  # what it reads, in words: "texts"
    file: ClassVar[str]  # the name of (one of) its files
    unit: ClassVar[str] = ""  # the unit of throughput: tokens, images, seconds, rows
    model_settings: ClassVar[tuple[str, ...]] = ()  # the names of `sizes`
    # whether Hugging Face folders have its files beside the weights
    at_root: ClassVar[bool] = False

    @classmethod
    def named(cls, data: Config) -> Self | None:
        """Returns the processor that the config's `data` section names, if any."""
        return None

    @classmethod
    def fit(cls, columns: Sequence[Column], settings: Config, added: Sequence[Value] = ()) -> Self:
        """Returns a processor fitted to columns of the training data, and to values `added` by the
        task, such as a prefix.

        `settings` are the task's settings for the kind (`Task.processing`), or else the config's
        `data` section."""
        raise NotImplementedError

    @classmethod
    def announcement(cls, settings: Config) -> str:
        """Returns a line to show before fitting; empty if fitting is fast."""
        return ""

    @classmethod
    def restore(cls, folder: Path) -> Self:
        """Returns the processor that `save` wrote. Raises UserError if its files are missing or
        damaged.
        """
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Writes its files into a folder, which is created if missing. Raises UserError if they
        cannot be written.
        """
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        """The hash of everything that determines its results."""
        raise NotImplementedError

    def load(self, value: Value, where: str) -> Value:
        """Returns a record's value (text, a number, bytes, a path, an array) in the form of this
        kind: str, float, uint8 [H,W,C]. Raises RecordError, with the location `where`, if it cannot
        be read."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int]:
        """Returns the model settings that it determines, such as {"vocab_size": 30522}."""
        return {}

    def digest(self, value: Value) -> bytes:
        """Returns a digest that is equal for values that a person would consider the same. It
        serves to find validation data that occurs in the training data. Empty if values of this
        kind are not compared."""
        return b""

    def pad(self, batch: HostBatch, sized: Sequence[str], most: int) -> dict[str, np.ndarray]:
        """Returns a batch for prediction in which arrays are padded so that few shapes are
        compiled.

        `sized` names the arrays whose last axis is a length; `most` is the maximum length (0: no
        limit)."""
        return dict(batch)


P = TypeVar("P", bound=Processor)


class Processors(Mapping[str, Processor]):
    """The processors of a run by kind, such as "text" and "image"; read-only.

    In a mixture of tasks, a part that reads images differently from the main part has its own
    processor, "PART/image"."""

    def __init__(self, *processors: Processor, named: Mapping[str, Processor] | None = None):
        self._processors = {processor.kind: processor for processor in processors} | dict(
            named or {}
        )

    def __getitem__(self, kind: str) -> Processor:
        return self._processors[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._processors)

    def __len__(self) -> int:
        return len(self._processors)

    def of(self, kind: type[P]) -> P:
        """Returns the processor of a class. Raises TypeError if there is none."""
        found = self.get(kind.kind)
        if not isinstance(found, kind):
            raise TypeError(
                f"no processor of the kind {kind.kind}; the kinds here: {', '.join(self) or 'none'}"
            )
        return found

    def part(self, name: str) -> Processors:
        """Returns the processors of a part of a mixture."""
        shared = {key: processor for key, processor in self.items() if "/" not in key}
        own = {
            key.partition("/")[2]: processor
            for key, processor in self.items()
            if key.startswith(f"{name}/")
        }
        return Processors(named=shared | own)

    @property
    def unit(self) -> str:
        """The unit of throughput: that of the first kind that has one."""
        return next((processor.unit for processor in self.values() if processor.unit), "rows")

    def sizes(self) -> dict[str, int]:
        """Returns the model settings that they determine: vocabulary, image size, channels."""
        shared = [processor for key, processor in self.items() if "/" not in key]
        return {name: size for processor in shared for name, size in processor.sizes().items()}
