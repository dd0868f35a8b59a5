"""Tasks: what a model learns from a batch and how it is evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fmjax.contracts.data import Examples, Source
from fmjax.contracts.facts import Fact
from fmjax.contracts.processors import Processors
from fmjax.contracts.types import (
    Arrays,
    Batch,
    Config,
    Heads,
    HostBatch,
    Measures,
    Record,
    Value,
    Where,
)


class Task:
    """Base class: what a model learns from a batch and how it is evaluated.

    A task is a frozen dataclass made from the config (`Task(**config.task)`). Optional attributes
    have their defaults here."""

    counted: ClassVar[
        tuple[str, ...]
    ] = ()  # arrays that are 0 only in padding; empty: segment_ids or attention_mask
    sized: ClassVar[tuple[str, ...]] = ()  # arrays of `inputs` whose last axis is a length
    # Heads whose logits `loss` and `predictions` read through `layers/vocabulary.py` alone: these
    # may be `VocabularyLogits`.
    chunked: ClassVar[tuple[str, ...]] = ()
    labels: tuple[str, ...] = ()  # the names of classes
    # The kind of labels: an example has one (single), several (multi), or a number (regression).
    kind: str = "single"

    @property
    def reads(self) -> Mapping[str, str]:
        """The columns that a processor reads, and the kind of each, such as {"text": "text"}."""
        raise NotImplementedError

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that training and evaluation read: those of `reads`, plus labels and other
        answers.
        """
        return tuple(self.reads)

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns that prediction reads: those of `reads`, without the text that the model
        should write.
        """
        return tuple(self.reads)

    @property
    def processing(self) -> Mapping[str, Config]:
        """By kind, the processor settings that the task determines, such as those of images."""
        return {}

    @property
    def adds(self) -> Mapping[str, tuple[Value, ...]]:
        """By kind, values that the task adds to those of its columns, such as a text prefix."""
        return {}

    @property
    def heads(self) -> Heads:
        """The heads that it reads, and the sizes of each."""
        raise NotImplementedError

    @property
    def measures(self) -> Measures:
        """Its metrics, and whether the largest or the smallest value is best. A metric may be
        undefined on some data.
        """
        raise NotImplementedError

    @property
    def leading(self) -> tuple[str, ...]:
        """The leading metrics, at most two, to show beside the loss."""
        return tuple(name for name in self.measures if name != "loss")[:2]

    @property
    def generation(self) -> Mapping[str, Any] | None:
        """The generation settings if prediction generates text; otherwise None."""
        return None

    @property
    def needs_generation(self) -> bool:
        """Whether evaluation reads what the model generates; `metrics` then gets `generated
        [N,T]`.
        """
        return False

    @property
    def splits(self) -> Mapping[str, str]:
        """In a mixture, the split that each part trains on. Otherwise empty."""
        return {}

    @property
    def tasks(self) -> Mapping[str, Task]:
        """In a mixture, the task of each part, the main one first. Otherwise the task itself, under
        an empty name.
        """
        return {"": self}

    @property
    def main(self) -> Task:
        """The task that evaluates a run and makes its predictions."""
        return next(iter(self.tasks.values()))

    @property
    def signatures(self) -> Mapping[str, str]:
        """How text metrics are computed, by metric."""
        return {}

    @property
    def packs_pairs(self) -> bool:
        """Whether training rows contain several source-target pairs."""
        return False

    @property
    def model_settings(self) -> Mapping[str, Any]:
        """Settings of the task that the model must share, such as {"patch_size": 16}."""
        return {}

    def resolve(self, source: Any) -> Config:
        """Returns the settings that are inferred from the training data, such as label names, for
        the stored config.

        Raises UserError if a column is missing, or a record, which it names, does not fit.
        """
        raise NotImplementedError

    def examples(
        self, source: Any, processors: Processors, max_length: int, train: bool
    ) -> Examples:
        """Returns the examples of a split."""
        raise NotImplementedError

    def facts(
        self, sample: Source, examples: Sequence[Examples], processors: Processors, max_length: int
    ) -> list[Fact]:
        """Returns facts about the training data to show before training: labels and their counts,
        truncated texts.

        Args:
          sample: a few thousand records of the training data.
          examples: the result of `examples` for all of them, for each source.
          processors: by kind.
          max_length: `data.max_length`.
        """
        return []

    def weights(self, batch: Batch) -> Arrays:
        """Returns one weight per term of the loss, for the whole global batch, so that splitting a
        batch does not change the loss.
        """
        raise NotImplementedError

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns one sum per term; the loss is the sum over terms of sum / weight."""
        raise NotImplementedError

    def predictions(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns the per-example arrays [B, ...] that `metrics` reads."""
        raise NotImplementedError

    def metrics(
        self, arrays: HostBatch, valid: np.ndarray, examples: Any = None
    ) -> dict[str, float]:
        """Returns the metrics of all examples; row i of the arrays belongs to example i where
        `valid [N]` is 1.
        """
        raise NotImplementedError

    def details(self, arrays: HostBatch, valid: np.ndarray, examples: Any = None) -> Record:
        """Returns what a report shows besides the metrics of the same arrays, as JSON values.

        May have `classes`, `confusion` (see `metrics/details.py`), `worst`, the worst examples, and
        `samples` of others.
        """
        return {}

    def inputs(
        self, examples: Sequence[Any], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Any]:
        """Returns a batch for prediction; names that begin with "_" stay on the host.

        Raises UserError, naming the example by `where(index)`, for one that cannot be read.
        """
        raise NotImplementedError

    def describe(
        self, outputs: HostBatch, batch: Mapping[str, Any], processors: Processors
    ) -> list[dict[str, Any]]:
        """Returns a readable prediction for each example. For a task that generates, `outputs` has
        `generated [B,T]`.
        """
        raise NotImplementedError
