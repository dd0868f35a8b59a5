"""Evaluation during training: finds the best step, and detects when there is no more progress."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fmjax.contracts import PyTree, Record
from fmjax.data.stream.examples import PARTS
from fmjax.distributed import hosts
from fmjax.inference.evaluate import Collected, collect, make_predict
from fmjax.runs.best import best_step, stopped_by
from fmjax.runs.checkpoint_reader import Best
from fmjax.runs.evaluation import Evaluation, listed
from fmjax.runs.logs import EVALUATION
from fmjax.train.experiment import Experiment
from fmjax.train.recorder import Recorder
from fmjax.train.wrappers import main_part

UNDEFINED = -math.inf  # worse than any value


def last_evaluation(records: Sequence[Record]) -> tuple[dict[str, float], int]:
    """Returns the metrics of the last evaluation, without those of single sources, and its step; or
    none and -1.
    """
    for record in reversed(records):
        found = {
            name.removeprefix(EVALUATION): value
            for name, value in record.items()
            if name.startswith(EVALUATION)
        }
        if whole := {name: value for name, value in found.items() if "/" not in name}:
            return whole, record["step"]
    return {}, -1


class Judge:
    """Evaluates on the validation split, if there is one."""

    def __init__(self, experiment: Experiment, recorder: Recorder):
        config, built = experiment.config, experiment.built
        self.experiment, self.recorder = experiment, recorder
        self.patience = int(config["train"]["early_stopping"]["patience"])
        self.stopping = stopped_by(config, built.task)
        self.best = best_step(config, built.task)
        model, self.task, _ = main_part(built.model, built.task, experiment.abstract.spec)
        self.predict = make_predict(model, self.task, experiment.data.processors)
        # Metrics of the last evaluation, including one before a restart, and its step.
        self.metrics, self.evaluated = last_evaluation(recorder.records)
        self.undefined: list[str] = []  # undefined metrics in the last message
        self.collected: Collected | None = None  # its predictions

    def evaluate(self, params: PyTree, step: int) -> bool:
        """Evaluates the parameters of a step. Returns whether they are the best so far."""
        splits = self.experiment.built.examples
        if "validation" not in splits:
            return False
        self.recorder.bar.busy("evaluating ...")
        self.metrics, self.evaluated = self._metrics_of(params, "validation"), step
        found = dict(self.metrics)
        for split in splits:
            if split.startswith(PARTS):
                part = split.removeprefix(PARTS)
                found |= {
                    f"{part}/{name}": value
                    for name, value in self._metrics_of(params, split).items()
                }
        self.recorder.write(step, {EVALUATION + name: value for name, value in found.items()})
        self.recorder.bar.note(f"step {step:,} validation: {listed(self.metrics, self.leading)}")
        self._note_undefined(step)
        improved = self._improved()
        # If the metric is undefined in all evaluations, the newest one is shown.
        chosen_by = (
            self.best.metric if self.best and max(self._history(self.best)) > UNDEFINED else ""
        )
        if improved or not chosen_by:
            self.recorder.keep(self._evaluation(step, chosen_by))
        return improved

    @property
    def leading(self) -> tuple[str, ...]:
        """The metrics to show beside the loss: the one that chooses the best step, and the
        task's.
        """
        return (*([self.best.metric] if self.best else []), *self.task.leading)

    def _improved(self) -> bool:
        """Returns whether the last evaluation is the best so far; False if no metric chooses it."""
        if self.best is None:
            return False
        *before, value = self._history(self.best)
        return value > max(before, default=-math.inf)

    def _evaluation(self, step: int, chosen_by: str) -> Evaluation:
        """Returns the last evaluation, with its details for the report."""
        details = self.task.details(*self.collected) if self.collected else {}
        self.collected = None
        return Evaluation(step, self.metrics, self.leading, chosen_by, details)

    def metrics_at(self, step: int) -> dict[str, float] | None:
        """Returns the metrics of a step if it was the last one evaluated."""
        return self.metrics if self.evaluated == step else None

    def out_of_patience(self, step: int) -> bool:
        """Returns whether none of the last `patience` evaluations was better than the best before
        them; if so, prints a line.
        """
        if self.stopping is None:
            return False
        values = self._history(self.stopping)
        before, last = values[: -self.patience], values[-self.patience :]
        best = max(before, default=UNDEFINED)
        ended = best > UNDEFINED and max(last) <= best
        if ended:
            better = f"{self.stopping.metric} has not improved in {self.patience} evaluations"
            self.recorder.bar.note(f"early stopping at step {step}: {better}")
        return ended

    def _note_undefined(self, step: int) -> None:
        """Prints which metrics are undefined in the last evaluation, if they differ from the one
        before.
        """
        undefined = [name for name in self.task.measures if name not in self.metrics]
        if undefined != self.undefined:
            names = ", ".join(undefined) or "none"
            why = ": only one class or value occurs, or the number is infinite" if undefined else ""
            self.recorder.bar.note(f"step {step}: undefined metrics: {names}{why}")
        self.undefined = undefined

    def _metrics_of(self, params: PyTree, split: str) -> dict[str, float]:
        batches, examples = (
            self.experiment.eval_batches(split),
            self.experiment.built.examples[split],
        )
        place = self.experiment.place
        collected = collect(self.predict, params, batches, examples, place, hosts.gather)
        if split == "validation":
            self.collected = collected
        return collected.metrics(self.task)

    def _history(self, chosen: Best) -> list[float]:
        """Returns a metric at each evaluation so far, including those before a restart.

        Negated if lower is better; below every number if the metric is undefined.
        """
        name, sign = EVALUATION + chosen.metric, 1 if chosen.mode == "max" else -1
        return [
            sign * record[name] if name in record else UNDEFINED
            for record in self.recorder.records
            if any(key.startswith(EVALUATION) for key in record)
        ]
