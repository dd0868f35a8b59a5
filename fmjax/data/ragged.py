"""Arrays of different sizes, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Ragged(NamedTuple):
    """The values of the arrays, one array after the other, and the size of each [N]."""

    values: np.ndarray
    sizes: np.ndarray


def ragged(arrays: Sequence[Any] | np.ndarray) -> Ragged:
    """Returns arrays [n], or sequences of numbers, as one."""
    sizes = np.array([len(array) for array in arrays], np.int64)
    return Ragged(np.concatenate([np.zeros(0, np.uint8), *arrays]), sizes)


def spread(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns the numbers from each of `begins` [N] on, `sizes` [N] of them, one after the other,
    int64."""
    ends = np.cumsum(sizes)
    count = int(ends[-1]) if ends.size else 0
    return np.asarray(np.arange(count) + np.repeat(begins - ends + sizes, sizes))
