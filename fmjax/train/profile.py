"""A trace of a few training steps by JAX's profiler, for TensorBoard (xplane) and Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from fmjax.distributed.hosts import say
from fmjax.errors import UserError

SKIPPED, TRACED = 5, 5  # steps, of a start: the first ones compile, and fill what reads ahead


class Profile:
    """Traces steps 6 to 10 of a start into a folder; does nothing without one. Raises UserError if that is no folder."""

    def __init__(self, folder: Path | None, start: int):
        if folder and folder.exists() and not folder.is_dir():
            raise UserError(f"--profile={folder}: is a file; name a folder for the trace")
        self.folder, self.first, self.last = folder, start + SKIPPED + 1, start + SKIPPED + TRACED
        self.tracing = self.done = False

    def before(self, number: int) -> None:
        """To be called before each step."""
        if self.folder and number == self.first:
            jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
            self.tracing = True

    def due(self, number: int) -> bool:
        """Whether the trace ends with a step."""
        return self.tracing and number == self.last

    def end(self, number: int, running: Any = ()) -> None:
        """Writes the trace, once what is `running` on the device has ended."""
        jax.block_until_ready(running)
        jax.profiler.stop_trace()
        self.tracing, self.done = False, True
        say(f"profile: steps {self.first} to {number} are in {self.folder} (tensorboard --logdir, or ui.perfetto.dev)")

    def close(self, number: int) -> None:
        """Writes what there is when a run ends early, or says that there is nothing."""
        if self.tracing:
            self.end(number)
        elif self.folder and not self.done:
            say(f"profile: nothing was traced, as no step after number {self.first - 1} was taken; raise train.steps")
