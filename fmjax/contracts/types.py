"""Type names that all parts share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import jax  # code that reads and prepares data does not import JAX, which takes seconds

PyTree: TypeAlias = Any  # nested containers of arrays or of their shapes
Value: TypeAlias = Any  # a record's value in a column: text, number, list, bytes, array, ...
Record: TypeAlias = dict[str, Value]
Config: TypeAlias = dict[str, Any]  # a resolved config, or a section of one, as JSON values
Example: TypeAlias = dict[str, np.ndarray]
# An example as read, which `Examples.draw` turns into arrays; an Example, except for mixtures.
Undrawn: TypeAlias = Any
HostBatch: TypeAlias = Mapping[str, np.ndarray]
Batch: TypeAlias = "Mapping[str, jax.Array]"
Arrays: TypeAlias = "dict[str, jax.Array]"
Where: TypeAlias = Callable[
    [int], str
]  # the location of a record or example, by its index: "reviews.tsv line 12"
# The names of metrics, and whether the largest or the smallest value is better; None: it depends.
Measures: TypeAlias = Mapping[str, Literal["max", "min"] | None]
Heads: TypeAlias = Mapping[
    str, Mapping[str, Any]
]  # the kinds of heads, and the sizes of each: {"classify": {"classes": 2}}
