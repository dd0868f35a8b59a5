"""Names of types that all parts share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import jax  # what reads and prepares data does without, since it takes seconds to import

PyTree: TypeAlias = Any  # nested containers of arrays, or of their shapes
Value: TypeAlias = Any  # what a record holds in a column: text, number, list, bytes, array, ...
Record: TypeAlias = dict[str, Value]
Config: TypeAlias = dict[str, Any]  # a resolved config, or a section of one, as JSON holds it
Example: TypeAlias = dict[str, np.ndarray]
# An example as it is read, of which `Examples.draw` makes arrays: an Example, but for mixtures.
Undrawn: TypeAlias = Any
HostBatch: TypeAlias = Mapping[str, np.ndarray]
Batch: TypeAlias = "Mapping[str, jax.Array]"
Arrays: TypeAlias = "dict[str, jax.Array]"
Where: TypeAlias = Callable[
    [int], str
]  # the name of a record or example by its index: "reviews.tsv line 12"
# The names of metrics, and which value of each is better: the largest, the smallest; None: it
# depends.
Measures: TypeAlias = Mapping[str, Literal["max", "min"] | None]
Heads: TypeAlias = Mapping[
    str, Mapping[str, Any]
]  # the kinds of head, and the numbers of each: {"classify": {"classes": 2}}
