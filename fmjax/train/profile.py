"""A trace of a few training steps by JAX's profiler, for TensorBoard (xplane) and Perfetto."""

from __future__ import annotations

from pathlib import Path

import jax

from fmjax.contracts import PyTree
from fmjax.distributed.hosts import say
from fmjax.errors import UserError

# Steps after a start: the first ones compile, and fill the read-ahead buffers.
SKIPPED, TRACED = 5, 5


class Profile:
    """Traces steps 6 to 10 after a start into a folder; does nothing without one.

    Raises UserError if the folder is a file.
    """

    def __init__(self, folder: Path | None, start: int):
        if folder and folder.exists() and not folder.is_dir():
            raise UserError(f"--profile={folder}: is a file; name a folder for the trace")
        self.folder, self.first, self.last = folder, start + SKIPPED + 1, start + SKIPPED + TRACED
        self.tracing = self.done = False

    def before(self, step: int) -> None:
        """Call this before each step."""
        if self.folder and step == self.first:
            jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
            self.tracing = True

    def due(self, step: int) -> bool:
        """Returns whether the trace ends with a step."""
        return self.tracing and step == self.last

    def end(self, step: int, running: PyTree = ()) -> None:
        """Writes the trace after everything `running` on the device has ended."""
        jax.block_until_ready(running)
        jax.profiler.stop_trace()
        self.tracing, self.done = False, True
        viewers = "tensorboard --logdir, or ui.perfetto.dev"
        say(f"profile: steps {self.first} to {step} are in {self.folder} ({viewers})")

    def close(self, step: int) -> None:
        """Writes the partial trace if a run ends early, or prints that nothing was traced."""
        if self.tracing:
            self.end(step)
        elif self.folder and not self.done:
            why = f"training ended at step {self.first - 1} or earlier"
            say(f"profile: nothing was traced, as {why}; raise train.steps")
