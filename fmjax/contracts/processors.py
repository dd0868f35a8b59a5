"""Processors of columns: what turns raw values into arrays."""

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
        """Yields each value and where its record stands, such as "reviews.tsv line 12"."""
        for index in range(len(self.source)):
            yield self.source[index][self.name], self.source.where(index)


class Processor:
    """Turns the values of the columns of one kind into arrays: a base class; `fmjax/data/kinds` has
    one file per kind.

    It is the named one, or follows from the task's settings, or is that of the weights that a run
    starts from, or is fitted to the training data. The run stores it, with a hash. Processors are
    pickled for Grain's workers."""

    kind: ClassVar[str]  # the name of its file
    what: ClassVar[str]  # in words: "tokenizer"
    reads: ClassVar[str]  # what it reads, in words: "texts"
    file: ClassVar[str]  # the name of (one of) its files
    unit: ClassVar[str] = ""  # what throughput counts: tokens, images, seconds, rows
    model_settings: ClassVar[tuple[str, ...]] = ()  # the names of `sizes`
    # Whether a folder of Hugging Face has its files beside the weights
    at_root: ClassVar[bool] = False

    @classmethod
    def named(cls, data: Config) -> Self | None:
        """Returns the one that the config's `data` section names, if it does."""
        return None

    @classmethod
    def fit(cls, columns: Sequence[Column], settings: Config, added: Sequence[Value] = ()) -> Self:
        """Returns one that fits columns of the training data, and values that the task `added`,
        such as a prefix.

        `settings` are those of the task about the kind (`Task.processing`), or else the config's
        `data` section."""
        raise NotImplementedError

    @classmethod
    def announcement(cls, settings: Config) -> str:
        """Returns a line to show before fitting, empty if that takes no time."""
        return ""

    @classmethod
    def restore(cls, folder: Path) -> Self:
        """Returns the one that `save` wrote. Raises UserError if its files are missing or
        damaged.
        """
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Writes its files into a folder, which is made if it is missing. Raises UserError if they
        cannot be written.
        """
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        """The hash of all that decides what it makes of a value."""
        raise NotImplementedError

    def load(self, value: Value, where: str) -> Value:
        """Returns a value of a record (a text, a number, bytes, a path, an array) as this kind has
        it: str, float, uint8 [H,W,C]. Raises RecordError, which names it by `where`, if it cannot
        be read."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int]:
        """Returns the model settings that follow from it, such as {"vocab_size": 30522}."""
        return {}

    def digest(self, value: Value) -> bytes:
        """Returns what is equal for two values that a person would call the same, for finding
        validation data that occur in the training data; empty if values of this kind are not
        compared."""
        return b""

    def pad(self, batch: HostBatch, sized: Sequence[str], most: int) -> dict[str, np.ndarray]:
        """Returns a batch for prediction in which arrays are padded so that few shapes are
        compiled.

        `sized` are the names of those whose last axis is a length, `most` the greatest length (0:
        no limit)."""
        return dict(batch)


P = TypeVar("P", bound=Processor)


class Processors(Mapping[str, Processor]):
    """The processors of a run by kind, such as "text" and "image"; read-only.

    In a mixture of tasks, a part whose images are read in another way than those of the main part
    has its own processor, "PART/image"."""

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
        """What throughput counts: the unit of the first kind that has one."""
        return next((processor.unit for processor in self.values() if processor.unit), "rows")

    def sizes(self) -> dict[str, int]:
        """Returns the model settings that follow from them: vocabulary, image size, channels."""
        shared = [processor for key, processor in self.items() if "/" not in key]
        return {name: size for processor in shared for name, size in processor.sizes().items()}
