"""How fast a run goes, against what its devices could do."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import pytree
from fmjax.contracts import HostBatch, Task
from fmjax.hardware import chip_of

COUNTED = ("segment_ids", "attention_mask")  # of a batch of tokens, the first that is there


def count_read(batch: HostBatch, task: Task) -> int:
    """Returns how many tokens that are not padding a batch has, on both sides of an encoder-decoder and in all parts of a mixture
    of tasks; of images and rows of a table, how many."""
    if task.splits:
        nested = pytree.unnames(batch)
        return sum(count_read(nested[part], own) for part, own in task.tasks.items())
    counted: Sequence[str] = task.counted or [name for name in COUNTED if name in batch][:1]
    return sum(int((np.asarray(batch[name]) > 0).sum()) for name in counted) or len(next(iter(batch.values())))


def peak_flops() -> tuple[float, str]:
    """Returns the peak FLOP/s of all devices together, and where the figure comes from.

    A data sheet gives it for accelerators; for a CPU, or a kind not listed, it is the best of five fp32 matrix products of
    1024 x 1024 timed here and now (some milliseconds).
    """
    kind = jax.devices()[0].device_kind
    if chip := chip_of(kind):
        return chip.flops * jax.device_count(), f"data sheet of {kind}"
    size = 1024
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # The fake devices of one CPU share its cores, so they are not counted.
    return 2 * size**3 / best, f"fp32 matrix product timed on {kind}"


class Cost(NamedTuple):
    """What a step, or several, read (tokens that are no padding, or images) and computed."""

    read: int
    flops: float


class Clock:
    """Counts steps and what they read, tokens or images, for rates of training alone: evaluating and saving, and compiling for
    another length of batch, is `paused` time.

    A rate is over the last `window` steps: when a single step ended is not known to the host, which runs ahead.
    """

    def __init__(self, unit: str, window: int):
        (self.peak, self.origin), self.unit = peak_flops(), unit
        # The time, what was read and computed by then, and how long was waited for it.
        self.marks: collections.deque[tuple[float, Cost, float]] = collections.deque(maxlen=window + 1)
        self.lost = self.waited = 0.0

    def now(self) -> float:
        return time.perf_counter() - self.lost

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.lost += time.perf_counter() - begun

    def count(self, cost: Cost) -> None:
        """Notes that a step has ended. The first to be noted only starts the clock: it was being compiled."""
        before = self.marks[-1][1] if self.marks else None
        sums = Cost(before.read + cost.read, before.flops + cost.flops) if before else Cost(0, 0.0)
        self.marks.append((self.now(), sums, self.waited))

    @contextmanager
    def waiting(self, running: Mapping[str, Any]) -> Iterator[None]:
        """Counts the time as waited for data, unless what is `running` on the device is not ready at its end either."""
        begun = time.perf_counter()
        yield
        if all(array.is_ready() for array in running.values()):
            self.waited += time.perf_counter() - begun

    def rates(self) -> dict[str, float]:
        """Returns tokens (padding not counted), or images, a second, model FLOP/s over peak FLOP/s, and which share of the time,
        at most, was waited for data, once there are any."""
        if len(self.marks) < 2:
            return {}
        (begin, before, idle_before), (end, after, idle_after) = self.marks[0], self.marks[-1]
        seconds = max(end - begin, 1e-9)
        speed, flops = (after.read - before.read) / seconds, (after.flops - before.flops) / seconds
        return {f"{self.unit}_per_second": speed, "mfu": flops / self.peak, "data_wait": (idle_after - idle_before) / seconds}
