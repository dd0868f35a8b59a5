"""Evaluation during training: which step is the best, and when there is no more progress."""

from __future__ import annotations

import math

from fmjax.contracts import PyTree
from fmjax.data.stream.examples import PARTS
from fmjax.distributed import hosts
from fmjax.errors import UserError
from fmjax.inference.evaluate import Collected, collect, make_predict
from fmjax.runs.checkpoint import Best
from fmjax.runs.evaluation import Evaluation, listed
from fmjax.runs.logs import EVALUATION
from fmjax.train.experiment import Experiment
from fmjax.train.recorder import Recorder
from fmjax.train.wrappers import main_part


def best_of(experiment: Experiment) -> Best | None:
    """Returns the metric that chooses the best step, if one does."""
    section = experiment.config["checkpoint"]
    return Best(section["best"], section["mode"]) if section.get("best") else None


class Judge:
    """Evaluates on the validation split, where there is one."""

    def __init__(self, experiment: Experiment, recorder: Recorder):
        stopping = experiment.config["train"]["early_stopping"]
        self.experiment, self.recorder = experiment, recorder
        self.patience, self.stopping = (
            int(stopping["patience"]),
            Best(stopping["metric"], stopping["mode"]),
        )
        self.best = best_of(experiment)
        built = experiment.built
        model, self.task, _ = main_part(built.model, built.task, experiment.abstract.spec)
        self.predict = make_predict(model, self.task, experiment.data.processors)
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.evaluated = -1  # its step
        self.collected: Collected | None = None  # its predictions

    def evaluate(self, params: PyTree, step: int) -> bool:
        """Evaluates the parameters of a step; returns whether they are the best so far."""
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
        improved = self._improved()
        if improved or self.best is None:
            self.recorder.keep(self._evaluation(step))
        return improved

    @property
    def leading(self) -> tuple[str, ...]:
        """The metrics to show beside the loss: the one that chooses the best step, and the task's."""
        return (*([self.best.metric] if self.best else []), *self.task.leading)

    def _improved(self) -> bool:
        """Returns whether the last evaluation is the best so far; no if no metric chooses it."""
        if self.best is None:
            return False
        *before, value = self._history(self.best)
        return value > max(before, default=-math.inf)

    def _evaluation(self, step: int) -> Evaluation:
        """Returns the last evaluation, with what the report shows of it."""
        details = self.task.details(*self.collected) if self.collected else {}
        self.collected = None
        chosen_by = self.best.metric if self.best else ""
        return Evaluation(step, self.metrics, self.leading, chosen_by, details)

    def metrics_at(self, step: int) -> dict[str, float] | None:
        """Returns the metrics of a step if it is the one that was evaluated last."""
        return self.metrics if self.evaluated == step else None

    def out_of_patience(self, step: int) -> bool:
        """Returns whether the last `patience` evaluations were all no better than the best before
        them; says so.
        """
        values = self._history(self.stopping) if self.patience else []
        ended = len(values) > self.patience and max(values[-self.patience :]) <= max(
            values[: -self.patience]
        )
        if ended:
            better = f"no better {self.stopping.metric} in {self.patience}"
            self.recorder.bar.note(f"early stopping at step {step}: {better}")
        return ended

    def _metrics_of(self, params: PyTree, split: str) -> dict[str, float]:
        batches, examples = (
            self.experiment.eval_batches(split),
            self.experiment.built.examples[split],
        )
        place = self.experiment.place
        collected = collect(self.predict, params, batches, examples, place, hosts.gather)
        if split == "validation":
            self.collected = collected
        metrics: dict[str, float] = self.task.metrics(*collected)
        return metrics

    def _history(self, chosen: Best) -> list[float]:
        """Returns a metric at each evaluation so far, those before a restart included.

        Negated if less is better.

        Raises UserError if the metric is undefined in the newest evaluation.
        """
        if self.metrics and chosen.metric not in self.metrics:
            raise UserError(
                f'"{chosen.metric}" is not defined on the validation data, as where one class alone '
                f"occurs; choose one of {', '.join(self.metrics)}"
            )
        name, sign = EVALUATION + chosen.metric, 1 if chosen.mode == "max" else -1
        return [sign * record[name] for record in self.recorder.records if name in record]
