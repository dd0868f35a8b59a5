"""Records the metrics and rates of each step on the screen and in the log.

Ends a run that diverges.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax

from fmjax.contracts import Arrays
from fmjax.distributed import hosts
from fmjax.distributed.progress import Bar
from fmjax.errors import Diverged
from fmjax.runs import evaluation as evaluations
from fmjax.runs import folder as run_folder
from fmjax.runs.evaluation import Evaluation
from fmjax.runs.lock import Lock, TakenOver
from fmjax.runs.logs import MetricsLog, read_metrics
from fmjax.runs.orbax_items import repeated_requests
from fmjax.runs.report import write_report
from fmjax.train.experiment import Experiment
from fmjax.train.throughput import Clock, Cost

WINDOW = 10  # minimum number of steps for a rate


class Nonfinite(NamedTuple):
    """Steps that were skipped because their loss or gradient was not finite."""

    in_a_row: tuple[int, ...] = ()  # the most recent ones
    total: int = 0

    def after(self, step: int, left_out: bool) -> Nonfinite:
        return Nonfinite((*self.in_a_row, step) if left_out else (), self.total + left_out)


class Ended(NamedTuple):
    """A step and its metrics on the device, which may not be computed yet."""

    step: int
    cost: Cost
    metrics: Arrays


class Recorder:
    """Reads the metrics of a step while the next one is running, so that the device never waits for
    the host.
    """

    def __init__(
        self, experiment: Experiment, start: int, bar: Bar, nonfinite: Nonfinite, lock: Lock
    ):
        train = experiment.config["train"]
        self.experiment, self.bar, self.nonfinite = experiment, bar, nonfinite
        self.lock = lock
        self.every, self.most_nonfinite = (
            int(train.get("log_every", 0)),
            int(train.get("max_nonfinite", 10)),
        )
        workdir = experiment.workdir
        self.records: list[dict[str, Any]] = [
            record for record in read_metrics(workdir) if record["step"] <= start
        ]
        self.log = MetricsLog(workdir, start, lock.check) if hosts.first() else None
        self.clock = Clock(experiment.data.processors.unit, max(self.every, WINDOW))
        self.last: Ended | None = None  # not read yet
        self.begun = False
        self.opened = time.monotonic()

    def waiting(self) -> AbstractContextManager[None]:
        """Counts the time in the block as waiting for data."""
        return self.clock.waiting(self.last.metrics if self.last else {})

    def ended(self, step: int, cost: Cost, metrics: Arrays) -> None:
        """Takes the metrics of a step, and reads those of the previous one."""
        self.read()
        self.last = Ended(step, cost, metrics)
        if not self.begun:  # which starts the clock
            self.begun = True
            self.read()

    def read(self) -> None:
        """Reads the metrics of the last step, if not done yet. Shows them, and logs them when due.

        Raises Diverged, naming the first step, after `max_nonfinite` consecutive skipped steps.
        """
        if self.last is None:
            return
        (step, cost, on_device), self.last = self.last, None
        metrics = {name: float(value) for name, value in jax.device_get(dict(on_device)).items()}
        self.clock.count(cost)
        self.nonfinite = self.nonfinite.after(step, left_out=bool(metrics.pop("nonfinite")))
        if len(self.nonfinite.in_a_row) >= self.most_nonfinite:
            raise Diverged(
                f"loss or gradient not finite in {len(self.nonfinite.in_a_row)} consecutive steps, "
                f"from step {self.nonfinite.in_a_row[0]} on; lower optim.learning_rate, or clip "
                "with optim.clip_norm"
            )
        rates = self.clock.rates()
        speed = self._speed(rates)
        self.bar.advance(step, f"loss {metrics['loss']:.3f}{speed}")
        last = self.experiment.built.steps
        self.bar.progress(f"step {step:,} of {last:,}: loss {metrics['loss']:.4f}{speed}")
        if (self.every and step % self.every == 0) or step == last:
            self._log(step, metrics, rates)

    def computing(self, compiled: bool) -> AbstractContextManager[None]:
        """Returns the context for taking a step.

        If the step is `compiled` first, which takes long, reads the last metrics, shows that, and
        excludes the time from the rates.
        """
        if not compiled:
            return nullcontext()
        self.read()
        if self.begun:
            self.bar.busy("compiling for another length ...")
        else:
            self.bar.busy("compiling ...", line="compiling the training step ...")
        return self.clock.paused()

    def keep(self, evaluation: Evaluation) -> None:
        """Keeps an evaluation for the report, as that of the best step so far."""
        if self.log:
            self.lock.check()
            evaluations.write(self.experiment.workdir, evaluation)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps and logs a record."""
        self.records.append({"step": step, **values})
        if self.log:
            self.log.write(step, values)

    def upload(self) -> None:
        """Uploads the log of a run in a bucket.

        Raises OSError if that fails, and TakenOver if the run is another process's now.
        """
        self.lock.check(now=True)  # also without a log: what follows seals a step
        if self.log:
            self.log.upload()

    def abandon(self) -> None:
        """Closes the log of a run in a bucket without uploading the rest."""
        if self.log:
            self.log.close(upload=False)
            self.log = None

    def close(self) -> None:
        """Closes the log, stores the skipped bad records and the time, and writes the report.

        Raises TakenOver, and writes nothing, if the run is another process's now.
        """
        if self.log:
            try:
                self.lock.check()
            except TakenOver:
                self.abandon()
                raise
            self.log.close()
            run_folder.record_left_out(
                self.experiment.workdir, self.experiment.data.tolerance.found
            )
            counts = {split: len(part) for split, part in self.experiment.built.examples.items()}
            seconds = time.monotonic() - self.opened
            repeated = repeated_requests()
            run_folder.record_end(self.experiment.workdir, seconds, counts, repeated)
            if repeated:
                self.bar.note(f"{repeated:,} requests to the bucket failed and were repeated")
            write_report(self.experiment.workdir)

    def _log(self, step: int, metrics: Mapping[str, float], rates: Mapping[str, float]) -> None:
        rate = float(self.experiment.abstract.optimizer.learning_rate(step - 1))
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        counts: dict[str, float] = {"nonfinite_steps": self.nonfinite.total}
        if left_out := self.experiment.data.tolerance.found:
            counts["left_out"] = len(left_out)
        self.write(step, {**finite, "learning_rate": rate, **rates, **counts})

    def _speed(self, rates: Mapping[str, float]) -> str:
        """Returns the rates in the form shown beside the loss."""
        per_second = [rate for name, rate in rates.items() if name.endswith("_per_second")]
        speed = "".join(f"  {rate:,.0f} {self.clock.unit}/s" for rate in per_second)
        waited = rates.get("data_wait", 0.0)
        return speed + (f"  {waited:.0%} waiting for data" if waited >= 0.01 else "")
