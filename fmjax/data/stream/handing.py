"""Hands what is read to worker processes in a file.

Python starts a process by writing into a pipe whose reading end it also holds itself. A worker that
dies before it has read that, as one does whose main script fails when it is imported, would leave
its parent writing for ever, deaf to signals, unless all fits into the pipe.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import cloudpickle


class Handed:
    """Random access to what is drawn, pickled as the path of a file that holds it."""

    def __init__(self, value: Any):
        self.value, self.path = value, ""

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: int) -> Any:
        return self.value[index]

    def draw(self, *drawn: Any) -> Any:
        return self.value.draw(*drawn)

    def __reduce__(self) -> tuple[Callable[[str], Handed], tuple[str]]:
        if not self.path:
            handle, self.path = tempfile.mkstemp(prefix="fmjax-reading-")
            with os.fdopen(handle, "wb") as file:
                cloudpickle.dump(self.value, file)
        return load, (self.path,)

    def close(self) -> None:
        """Removes the file, which workers have read by now."""
        if self.path:
            os.remove(self.path)
            self.path = ""


def load(path: str) -> Handed:
    """Returns what was handed over."""
    with open(path, "rb") as file:
        return Handed(cloudpickle.load(file))
