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
        """Returns one value of a record. Skips the others if that saves time, such as the image for
        a label.
        """

    def where(self, index: int) -> str:
        """Returns the location of a record, for messages: "reviews.tsv line 12"."""

    def fingerprint(self) -> Record:
        """Returns the identity of the data as JSON values: names, sizes and hashes, but no
        folders.
        """


class Order(Protocol):
    """The indices of examples in the order of training, computed on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int) -> int: ...


class Examples:
    """Random access to the fixed-shape examples of a split. A base class: optional attributes are
    None or empty.

    Examples whose texts are padded at the end have `lengths`, and can be put into length buckets.
    Examples with one label have `classes`, and can be resampled. Packed rows have `fill`."""

    lengths: np.ndarray | None = None  # [N], the number of tokens of each
    # [N], mean tokens per row if an example has several rows; otherwise lengths
    filled: np.ndarray | None = None
    # If an example has several arrays of tokens, such as a source and a target: by array, the
    # tokens of each example [N] and the length of a row; `lengths` are then those of the longest.
    sides: Mapping[str, tuple[np.ndarray, int]] = MappingProxyType({})
    max_length: int = 0  # of each
    sized: tuple[str, ...] = ()  # the arrays whose last axis is the length
    classes: np.ndarray | None = None  # [N]
    labels: np.ndarray | None = None  # [N, ...], for tasks whose examples have labels
    fill: Mapping[str, float] | None = None  # the fraction of each array that is not padding
    parts: Mapping[str, Examples] = MappingProxyType({})  # of a mixture, by source or task

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Undrawn:
        raise NotImplementedError

    def draw(self, example: Undrawn, rng: np.random.Generator) -> Example:
        """Returns the example as the model sees it this time. Only `rng` makes it random."""
        drawn: Example = example
        return drawn

    def drawn(self, indices: np.ndarray) -> Example | None:
        """Returns examples as one batch, [N, ...] each, as if each had been read, drawn and
        stacked; None if they have to be, because drawing is random or as fast one by one."""
        return None

    def where(self, index: int) -> str:
        """Returns where an example comes from, for messages: the location of its record, if it has
        one.
        """
        return f"training example {index:,}"

    def stand_in(self, index: int) -> int:
        """Returns the index of the example to try if example `index` cannot be read. Repeated calls
        go through several.
        """
        return (index + 1) % len(self)

    def text(self, index: int) -> str:
        """Returns the text of an example for a report; empty if it is not text."""
        return ""

    def order(self, seed: int) -> Order | None:
        """Returns the order of examples in training. None means a shuffle of all examples in each
        epoch."""
        return None

    @property
    def target_length(self) -> int:
        """The target length of packed rows if `repacked` can change it; otherwise 0."""
        return 0

    def repacked(self, target_length: int) -> Examples:
        """Returns the same texts in rows with another target length. Only if `target_length` is not
        0.
        """
        raise NotImplementedError

    def check_steps(self, steps: int, batch_size: int) -> None:
        """Raises UserError if there are not enough examples for this number of steps."""
