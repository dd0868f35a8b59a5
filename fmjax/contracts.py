"""What the parts of fmjax promise each other: models, tasks, examples, sources of records, and processors of columns.

A protocol is met by any class that has its methods; a base class gives what is optional its default. Nothing asks an object
whether it has an attribute: what may be absent is None, empty or zero here.

Dimensions: B batch, L length, T target length, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias, TypeVar, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import jax  # what reads and prepares data does without, since it takes seconds to import

PyTree: TypeAlias = Any  # nested containers of arrays, or of their shapes
Value: TypeAlias = Any  # what a record holds in a column: text, number, list, bytes, array, ...
Record: TypeAlias = dict[str, Value]
Config: TypeAlias = dict[str, Any]  # a resolved config, or a section of one, as JSON holds it
Example: TypeAlias = dict[str, np.ndarray]
Undrawn: TypeAlias = Any  # an example as it is read, of which `Examples.draw` makes arrays: an Example, but for mixtures
HostBatch: TypeAlias = Mapping[str, np.ndarray]
Batch: TypeAlias = "Mapping[str, jax.Array]"
Arrays: TypeAlias = "dict[str, jax.Array]"
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


class Order(Protocol):
    """The numbers of examples in the order of training, computed as they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int) -> int: ...


class Examples:
    """Random access to the fixed-shape examples of a split: a base class, whose optional attributes are None or empty.

    Examples of texts that are padded at their end have `lengths`, and can be put into length buckets. Those of one label have
    `classes`, and can be resampled. Packed rows have `fill`.
    """

    lengths: np.ndarray | None = None  # [N], the number of tokens of each
    filled: np.ndarray | None = None  # [N], the tokens of a row on average, where an example has several rows; else lengths
    max_length: int = 0  # of each
    sized: tuple[str, ...] = ()  # the arrays whose last axis is the length
    classes: np.ndarray | None = None  # [N]
    fill: Mapping[str, float] | None = None  # the share of each array that is no padding
    parts: Mapping[str, Examples] = MappingProxyType({})  # of a mixture, by source or task

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Undrawn:
        raise NotImplementedError

    def draw(self, example: Undrawn, rng: np.random.Generator) -> Example:
        """Returns the example as the model sees it this time; random in `rng` alone."""
        drawn: Example = example
        return drawn

    def where(self, index: int) -> str:
        """Returns where an example comes from, for messages: its record's place, if it is of one."""
        return f"training example {index:,}"

    def order(self, seed: int) -> Order | None:
        """Returns which example comes when in training; None: a shuffle of all in each epoch."""
        return None

    @property
    def target_length(self) -> int:
        """The length of the targets of packed rows, where `repacked` can change it; 0 elsewhere."""
        return 0

    def repacked(self, target_length: int) -> Examples:
        """Returns the same texts in rows with another length of targets; only where `target_length` is not 0."""
        raise NotImplementedError

    def check_steps(self, steps: int, batch_size: int) -> None:
        """Raises UserError if the examples are used up before so many steps."""


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
    """Turns the values of the columns of one kind into arrays: a base class; `fmjax/data/kinds` has one file per kind.

    It is the named one, or follows from the task's settings, or is that of the weights that a run starts from, or is fitted
    to the training data. The run stores it, with a hash. Processors are pickled for Grain's workers.
    """

    kind: ClassVar[str]  # the name of its file
    what: ClassVar[str]  # in words: "tokenizer"
    reads: ClassVar[str]  # what it reads, in words: "texts"
    file: ClassVar[str]  # the name of (one of) its files
    unit: ClassVar[str] = ""  # what throughput counts: tokens, images, seconds, rows
    model_settings: ClassVar[tuple[str, ...]] = ()  # the names of `sizes`
    at_root: ClassVar[bool] = False  # whether a folder of Hugging Face has its files beside the weights

    @classmethod
    def named(cls, data: Config) -> Self | None:
        """Returns the one that the config's `data` section names, if it does."""
        return None

    @classmethod
    def fit(cls, columns: Sequence[Column], settings: Config, added: Sequence[Value] = ()) -> Self:
        """Returns one that fits columns of the training data, and values that the task `added`, such as a prefix.

        `settings` are those of the task about the kind (`Task.processing`), or else the config's `data` section.
        """
        raise NotImplementedError

    @classmethod
    def announcement(cls, settings: Config) -> str:
        """Returns a line to show before fitting, empty if that takes no time."""
        return ""

    @classmethod
    def restore(cls, folder: Path) -> Self:
        """Returns the one that `save` wrote. Raises UserError if its files are missing or damaged."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Writes its files into a folder, which is made if it is missing. Raises UserError if they cannot be written."""
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        """The hash of all that decides what it makes of a value."""
        raise NotImplementedError

    def load(self, value: Value, where: str) -> Value:
        """Returns a value of a record (a text, a number, bytes, a path, an array) as this kind has it: str, float, uint8
        [H,W,C]. Raises RecordError, which names it by `where`, if it cannot be read."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int]:
        """Returns the model settings that follow from it, such as {"vocab_size": 30522}."""
        return {}

    def digest(self, value: Value) -> bytes:
        """Returns what is equal for two values that a person would call the same, for finding validation data that occur in
        the training data; empty if values of this kind are not compared."""
        return b""

    def pad(self, batch: HostBatch, sized: Sequence[str], most: int) -> dict[str, np.ndarray]:
        """Returns a batch for prediction in which arrays are padded so that few shapes are compiled.

        `sized` are the names of those whose last axis is a length, `most` the greatest length (0: no limit).
        """
        return dict(batch)


P = TypeVar("P", bound=Processor)


class Processors(Mapping[str, Processor]):
    """The processors of a run by kind, such as "text" and "image"; read-only.

    In a mixture of tasks, a part whose images are read in another way than those of the main part has its own processor,
    "PART/image".
    """

    def __init__(self, *processors: Processor, named: Mapping[str, Processor] | None = None):
        self._processors = {processor.kind: processor for processor in processors} | dict(named or {})

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
            raise TypeError(f"no processor of the kind {kind.kind}, only {', '.join(self) or 'none'}")
        return found

    def part(self, name: str) -> Processors:
        """Returns the processors of a part of a mixture."""
        shared = {key: processor for key, processor in self.items() if "/" not in key}
        own = {key.partition("/")[2]: processor for key, processor in self.items() if key.startswith(f"{name}/")}
        return Processors(named=shared | own)

    @property
    def unit(self) -> str:
        """What throughput counts: the unit of the first kind that has one."""
        return next((processor.unit for processor in self.values() if processor.unit), "rows")

    def sizes(self) -> dict[str, int]:
        """Returns the model settings that follow from them: vocabulary, image size, channels."""
        shared = [processor for key, processor in self.items() if "/" not in key]
        return {name: size for processor in shared for name, size in processor.sizes().items()}


class Task:
    """What a model learns from a batch and how it is judged: a base class; `fmjax/tasks/README` has the order of calls.

    A task is a frozen dataclass made from the config (`Task(**config.task)`). What is optional has its default here.
    """

    counted: ClassVar[tuple[str, ...]] = ()  # arrays that are 0 in padding alone; empty: segment_ids or attention_mask
    sized: ClassVar[tuple[str, ...]] = ()  # arrays of `inputs` whose last axis is a length
    labels: tuple[str, ...] = ()  # the names of classes
    kind: str = "single"  # of labels: an example has one (single), several (multi), or a number (regression)

    @property
    def reads(self) -> Mapping[str, str]:
        """The columns that a processor reads, and the kind of each, such as {"text": "text"}."""
        raise NotImplementedError

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that training and evaluation read: those of `reads`, and labels and other answers."""
        return tuple(self.reads)

    @property
    def processing(self) -> Mapping[str, Config]:
        """The settings of kinds that the task decides itself, such as those of images, by kind."""
        return {}

    @property
    def adds(self) -> Mapping[str, tuple[Value, ...]]:
        """Values that the task adds to those of its columns, by kind, such as a prefix of texts."""
        return {}

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
    def needs_generation(self) -> bool:
        """Whether evaluation reads what the model generates; `metrics` then gets `generated [N,T]`."""
        return False

    @property
    def splits(self) -> Mapping[str, str]:
        """In a mixture, the split that each part trains on. Empty elsewhere."""
        return {}

    @property
    def tasks(self) -> Mapping[str, Task]:
        """In a mixture, the task of each part, the main one first. Elsewhere the task itself, under an empty name."""
        return {"": self}

    @property
    def main(self) -> Task:
        """The task that a run is judged by and predicts with."""
        return next(iter(self.tasks.values()))

    @property
    def signatures(self) -> Mapping[str, str]:
        """How metrics of texts are computed, by metric."""
        return {}

    @property
    def packs_pairs(self) -> bool:
        """Whether training rows hold several pairs of source and target."""
        return False

    @property
    def model_settings(self) -> Mapping[str, Any]:
        """Settings of the task that the model has to share, such as {"patch_size": 16}."""
        return {}

    def resolve(self, source: Any) -> Config:
        """Returns the settings that follow from the training data, such as label names, for the stored config.

        Raises UserError if a column is missing, or a record, which it names, does not fit.
        """
        raise NotImplementedError

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
        """Returns a batch for prediction; names that begin with "_" stay on the host.

        Raises UserError, naming the example by `where(index)`, for one that cannot be read.
        """
        raise NotImplementedError

    def describe(self, outputs: HostBatch, batch: Mapping[str, Any], processors: Processors) -> list[dict[str, Any]]:
        """Returns what a person reads about each example. Where predicting is generating, `outputs` has `generated [B,T]`."""
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

    encoder_inputs: ClassVar[tuple[str, ...]]  # arrays that `encode` reads, all with a row per example

    @property
    def start_id(self) -> int | None:
        """The token that the decoder begins with; None if only the settings of generation say it."""

    def encode(self, batch: Batch) -> Arrays:
        """Returns the memory: arrays with a row per example, such as `hidden [B,L,D]`."""


@runtime_checkable
class Generates(Protocol):
    """A Linen module that decodes with a cache; its `settings.positions` limits what it reads, 0 being no limit.

    A cache is a value of constant shape: "index", and arrays with a row per row of the batch (see layers/cache.py).
    """

    settings: Any

    def apply(self, variables: Mapping[str, PyTree], *args: PyTree, **kwargs: Any) -> PyTree:
        """Linen's: calls a method with parameters."""

    def empty_cache(self, rows: int, length: int) -> PyTree:
        """Returns a cache with room for `length` tokens per row."""

    def decode(self, batch: Batch, memory: PyTree, cache: PyTree) -> tuple[Arrays, PyTree]:
        """Returns the outputs for more tokens, and the cache with them; of the head `lm` logits [B,L,V].

        Reads `input_ids [B,L]` and, where given, `attention_mask [B,L]` (with an encoder `decoder_input_ids` and
        `decoder_attention_mask`) and `predicted_positions [B,M]`, where alone logits are wanted. `memory` is the encoder's.
        """
