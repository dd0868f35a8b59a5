"""What the parts of fmjax promise each other: models, tasks, examples, sources of records, and processors of columns.

A protocol is met by any class that has its methods; a base class gives what is optional its default. Nothing asks an object
whether it has an attribute: what may be absent is None, empty or zero here.

Dimensions: B batch, L length, T target length, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np

PyTree: TypeAlias = Any  # nested containers of arrays, or of their shapes
Value: TypeAlias = Any  # what a record holds in a column: text, number, list, bytes, array, ...
Record: TypeAlias = dict[str, Value]
Config: TypeAlias = dict[str, Any]  # a resolved config, or a section of one, as JSON holds it
Example: TypeAlias = dict[str, np.ndarray]
HostBatch: TypeAlias = Mapping[str, np.ndarray]
Batch: TypeAlias = Mapping[str, jax.Array]
Arrays: TypeAlias = dict[str, jax.Array]
Where: TypeAlias = Callable[[int], str]  # the name of a record or example by its index: "reviews.tsv line 12"
Heads: TypeAlias = Mapping[str, Mapping[str, Any]]  # the kinds of head, and the numbers of each: {"classify": {"classes": 2}}


class Source(Protocol):
    """Random access to the records of a split. Sources are pickled for Grain's workers."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a record's values."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Returns a record."""

    def value(self, index: int, name: str) -> Value:
        """Returns one value of a record, without reading the others where that saves time: a label without its image."""

    def where(self, index: int) -> str:
        """Returns where a record stands, for messages: "reviews.tsv line 12"."""

    def fingerprint(self) -> Record:
        """Returns what distinguishes these data from others, as JSON holds it: names, sizes and hashes, no folders."""


class Examples:
    """Random access to the fixed-shape examples of a split: a base class, whose optional attributes are None.

    Examples of texts that are padded at their end have `lengths`, and can be put into length buckets. Those of one label have
    `classes`, and can be resampled. Packed rows have `fill`. `order` is what decides which example comes when, if that is not a
    shuffle of all by the seed, as for a mixture.
    """

    lengths: np.ndarray | None = None  # [N], the number of tokens of each
    sized: tuple[str, ...] = ()  # the arrays whose last axis is the length
    classes: np.ndarray | None = None  # [N]
    fill: Mapping[str, float] | None = None  # the share of each array that is no padding

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example as the model sees it this time; random in `rng` alone."""
        return example


class Processor(Protocol):
    """What turns the values of a column of one kind into arrays, fitted to the training data or read from the weights' folder.

    It is stored in the run with a hash: a tokenizer, the size and normalization of images, the mean and deviation of numbers.
    """

    kind: ClassVar[str]  # the name of the kind, and of its file in fmjax/data/kinds
    unit: ClassVar[str]  # what throughput counts: tokens, images, seconds, rows

    @property
    def sha256(self) -> str:
        """The hash of all that decides what it makes of a value."""

    def save(self, folder: Path) -> None:
        """Writes its files into a folder, which exists or is made."""

    def sizes(self) -> dict[str, int]:
        """Returns the model settings that follow from it, such as {"vocab_size": 30522}."""

    def digest(self, value: Value) -> bytes:
        """Returns what two values that a person would call the same have in common, for the search for overlapping data."""


class Processors(Mapping[str, Processor]):
    """The processors of a run by column kind, such as "text" and "image"; read-only."""

    def __init__(self, processors: Mapping[str, Processor] | None = None):
        self._processors = dict(processors or {})

    def __getitem__(self, kind: str) -> Processor:
        return self._processors[kind]

    def __iter__(self) -> Any:
        return iter(self._processors)

    def __len__(self) -> int:
        return len(self._processors)


class Task:
    """What a model learns from a batch and how it is judged: a base class; `fmjax/tasks/README` has the order of calls.

    A task is a frozen dataclass made from the config (`Task(**config.task)`).
    """

    needs: ClassVar[str] = ""  # "generation", if evaluation reads what the model generates
    counted: ClassVar[tuple[str, ...]] = ()  # arrays that are 0 in padding alone; empty: segment_ids or attention_mask

    @property
    def reads(self) -> Mapping[str, str]:
        """The columns that it reads and the kind of each, such as {"text": "text", "label": "label"}."""
        raise NotImplementedError

    @property
    def heads(self) -> Heads:
        """The heads that it reads, and the numbers of each."""
        raise NotImplementedError

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of its metrics, of which one may be undefined on some data."""
        raise NotImplementedError

    @property
    def generation(self) -> Mapping[str, Any] | None:
        """The settings of generation, where predicting is generating; None elsewhere."""
        return None

    @property
    def splits(self) -> Mapping[str, str]:
        """Of a mixture: the split that each part trains on. Empty elsewhere."""
        return {}

    @property
    def parts(self) -> Mapping[str, Task]:
        """Of a mixture: the task of each part, the main one first. Elsewhere the task itself, under an empty name."""
        return {"": self}

    @property
    def signatures(self) -> Mapping[str, str]:
        """How metrics of texts are computed, by metric."""
        return {}

    def resolve(self, source: Any) -> Config:
        """Returns the settings that follow from the training data, such as label names, for the stored config."""
        return {}

    def sizes(self, processors: Processors) -> dict[str, int]:
        """Returns the model settings that follow from what it reads: vocabulary, image size, channels."""
        return {name: size for processor in processors.values() for name, size in processor.sizes().items()}

    def examples(self, source: Any, processors: Processors, max_length: int, train: bool) -> Examples:
        """Returns the examples of a split."""
        raise NotImplementedError

    def weights(self, batch: Batch) -> Arrays:
        """Returns one weight per term of the loss, of the whole global batch: so splitting a batch does not change the loss."""
        raise NotImplementedError

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns one sum per term; the loss is the sum over terms of sum / weight."""
        raise NotImplementedError

    def predictions(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns what metrics read, per example [B, ...]."""
        raise NotImplementedError

    def metrics(self, arrays: HostBatch, valid: np.ndarray, examples: Any = None) -> dict[str, float]:
        """Returns the metrics of all examples; row i of the arrays belongs to example i where `valid [N]` is 1."""
        raise NotImplementedError

    def inputs(self, examples: Sequence[Any], processors: Processors, max_length: int, where: Where) -> dict[str, Any]:
        """Returns a batch for prediction; names that begin with "_" stay on the host."""
        raise NotImplementedError

    def describe(self, outputs: HostBatch, batch: Mapping[str, Any], processors: Processors) -> list[dict[str, Any]]:
        """Returns what a person reads about each example."""
        raise NotImplementedError


class Model(Protocol):
    """A Linen module that maps a batch of named arrays to features and to the outputs of its heads by kind."""

    heads: Heads
    settings: Any  # the family's frozen dataclass `Settings`
    packs: ClassVar[bool]  # whether it reads packed pairs of source and target

    def one_row_batch(self) -> Batch:
        """Returns the smallest batch with all that a head might read, to initialize parameters with."""

    def forward_flops(self, batch: Mapping[str, Any]) -> float:
        """Returns the floating-point operations of a forward pass over a batch, or its shapes, by formula."""


@runtime_checkable
class Encodes(Protocol):
    """A model with an encoder whose memory a decoder reads."""

    def encode(self, batch: Batch) -> Arrays:
        """Returns the features of the encoder: `hidden [B,L,D]`."""


@runtime_checkable
class Generates(Protocol):
    """A model that decodes with a cache."""

    def decode(self, batch: Batch, memory: Any, cache: Any) -> tuple[Arrays, Any]:
        """Returns the features of the decoder and the cache that the next call continues from."""
