"""Sources of records, and examples of a task."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from fmjax.contracts.types import Example, Record, Undrawn, Value


class Source(Protocol):
    """Random access to the records of a split. Sources are pickled for Grain's workers."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a record's values."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Returns a record."""

    def value(self, index: int, name: str) -> Value:
        """Returns one value of a record, without reading the others where that saves time: a label
        without its image.
        """

    def where(self, index: int) -> str:
        """Returns where a record stands, for messages: "reviews.tsv line 12"."""

    def fingerprint(self) -> Record:
        """Returns an identity of these data, as JSON holds it: names, sizes and hashes, no
        folders.
        """


class Order(Protocol):
    """The numbers of examples in the order of training, computed as they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int) -> int: ...


class Examples:
    """Random access to the fixed-shape examples of a split: a base class, whose optional attributes
    are None or empty.

    Examples of texts that are padded at their end have `lengths`, and can be put into length
    buckets. Those of one label have `classes`, and can be resampled. Packed rows have `fill`."""

    lengths: np.ndarray | None = None  # [N], the number of tokens of each
    # [N], the tokens of a row on average, where an example has several rows; else lengths
    filled: np.ndarray | None = None
    # Where an example has several arrays of tokens, as a source and a target: the tokens of each
    # example [N], and the length of a row, by array; `lengths` are then those of the longest.
    sides: Mapping[str, tuple[np.ndarray, int]] = MappingProxyType({})
    max_length: int = 0  # of each
    sized: tuple[str, ...] = ()  # the arrays whose last axis is the length
    classes: np.ndarray | None = None  # [N]
    labels: np.ndarray | None = None  # [N, ...], of tasks whose examples have labels
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
        """Returns where an example comes from, for messages: its record's place, if it is of
        one.
        """
        return f"training example {index:,}"

    def stand_in(self, index: int) -> int:
        """Returns the number of the example to try where example `index` cannot be read; repeated
        calls go through several.
        """
        return (index + 1) % len(self)

    def text(self, index: int) -> str:
        """Returns what a person reads of an example, in a report; empty where it is not text."""
        return ""

    def order(self, seed: int) -> Order | None:
        """Returns the order of examples in training; None: a shuffle of all in each epoch."""
        return None

    @property
    def target_length(self) -> int:
        """The length of the targets of packed rows, where `repacked` can change it; 0 elsewhere."""
        return 0

    def repacked(self, target_length: int) -> Examples:
        """Returns the same texts in rows with another length of targets; only where `target_length`
        is not 0.
        """
        raise NotImplementedError

    def check_steps(self, steps: int, batch_size: int) -> None:
        """Raises UserError if the examples are used up before so many steps."""
