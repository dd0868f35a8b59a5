"""Passes examples to worker processes in a file.

Python starts a process by writing into a pipe, and holds the reading end of the pipe itself. If a
worker dies before reading, for example because its main script fails on import, its parent would
block on writing forever and ignore signals, unless everything fits into the pipe.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np


class Handed:
    """Random access to examples, pickled as the path of a file that contains them."""

    def __init__(self, value: Any):
        self.value, self.path = value, ""

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: int) -> Any:
        return self.value[index]

    def draw(self, *drawn: Any) -> Any:
        return self.value.draw(*drawn)

    def drawn(self, numbers: np.ndarray) -> Any:
        return self.value.drawn(numbers)

    def __reduce__(self) -> tuple[Callable[[str], Handed], tuple[str]]:
        if not self.path:
            handle, self.path = tempfile.mkstemp(prefix="fmjax-reading-")
            with os.fdopen(handle, "wb") as file:
                cloudpickle.dump(self.value, file)
        return load, (self.path,)

    def close(self) -> None:
        """Removes the file, which all workers have read."""
        if self.path:
            os.remove(self.path)
            self.path = ""


def load(path: str) -> Handed:
    """Returns the examples."""
    with open(path, "rb") as file:
        return Handed(cloudpickle.load(file))
