"""The speed of a run, compared with the peak of its devices."""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import pytree
from fmjax.contracts import Arrays, HostBatch, Task
from fmjax.hardware import chip_of

# The tokens of a batch are in the first of these that exists.
COUNTED = ("segment_ids", "attention_mask")


def count_read(batch: HostBatch, task: Task) -> int:
    """Returns the number of tokens in a batch without padding, or the number of images or rows.

    Counts the tokens of both sides of an encoder-decoder, and of all parts of a mixture of tasks.
    """
    if task.splits:
        nested = pytree.unnames(batch)
        return sum(count_read(nested[part], own) for part, own in task.tasks.items())
    counted: Sequence[str] = task.counted or [name for name in COUNTED if name in batch][:1]
    tokens = sum(int((np.asarray(batch[name]) > 0).sum()) for name in counted)
    return tokens or len(next(iter(batch.values())))


@functools.cache
def peak_flops() -> float:
    """Returns the peak FLOP/s of all devices together.

    For accelerators, it comes from the data sheet. For a CPU, or an unlisted kind, it is the best
    of five fp32 matrix products of 1024 x 1024, timed once per process (some
    milliseconds).
    """
    if chip := chip_of(jax.devices()[0].device_kind):
        return chip.flops * jax.device_count()
    size = 1024
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # Simulated devices of one CPU share its cores, so they are not counted.
    return 2 * size**3 / best


class Cost(NamedTuple):
    """The amount that one or several steps read (tokens without padding, or images) and
    computed."""

    read: int
    flops: float


class Costs:
    """The cost of a step, by batch."""

    def __init__(self, model: Any, task: Task, batch_size: int):
        self.model, self.task, self.batch_size = model, task, batch_size
        self.flops: dict[tuple[tuple[int, ...], ...], float] = {}  # by the shapes of a batch

    def of(self, batch: HostBatch) -> tuple[Cost, bool]:
        """Returns the cost of a step with a batch, and whether its shapes are new, so that the step
        must be compiled.
        """
        shapes = tuple(array.shape for array in batch.values())
        new = shapes not in self.flops
        if new:
            sizes = {name: (self.batch_size, *array.shape[1:]) for name, array in batch.items()}
            spec = {
                name: jax.ShapeDtypeStruct(size, batch[name].dtype) for name, size in sizes.items()
            }
            self.flops[shapes] = 3 * self.model.forward_flops(spec)
        return Cost(count_read(batch, self.task), self.flops[shapes]), new


class Clock:
    """Counts steps and what they read, for the rates of pure training time.

    Evaluating, saving, and compiling for another batch length is `paused` time. A rate covers the
    last `window` steps: the host runs ahead, so it does not know when a single step ended.
    """

    def __init__(self, unit: str, window: int):
        self.peak, self.unit = peak_flops(), unit
        # The time, the amount read and computed by then, and the seconds of waiting for data.
        self.marks: collections.deque[tuple[float, Cost, float]] = collections.deque(
            maxlen=window + 1
        )
        self.lost = self.waited = 0.0

    def now(self) -> float:
        """Returns the seconds without paused time."""
        return time.perf_counter() - self.lost

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.lost += time.perf_counter() - begun

    def count(self, cost: Cost) -> None:
        """Notes that a step has ended.

        The first step only starts the clock, since it includes compilation.
        """
        before = self.marks[-1][1] if self.marks else None
        sums = Cost(before.read + cost.read, before.flops + cost.flops) if before else Cost(0, 0.0)
        self.marks.append((self.now(), sums, self.waited))

    @contextmanager
    def waiting(self, running: Arrays) -> Iterator[None]:
        """Counts the time in the block as waiting for data, unless the device is still `running` at
        its end.
        """
        begun = time.perf_counter()
        yield
        # The type has this method, but not in JAX's stubs.
        if all(array.is_ready() for array in running.values()):  # type: ignore[attr-defined]
            self.waited += time.perf_counter() - begun

    def rates(self) -> dict[str, float]:
        """Returns the rates; none before the second step.

        They are tokens (padding not counted) or images per second, model FLOP/s over peak FLOP/s,
        and an upper bound on the fraction of time spent waiting for data.
        """
        if len(self.marks) < 2:
            return {}
        (begin, before, idle_before), (end, after, idle_after) = self.marks[0], self.marks[-1]
        seconds = max(end - begin, 1e-9)
        speed, flops = (after.read - before.read) / seconds, (after.flops - before.flops) / seconds
        return {
            f"{self.unit}_per_second": speed,
            "mfu": flops / self.peak,
            "data_wait": (idle_after - idle_before) / seconds,
        }
