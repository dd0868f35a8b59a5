"""The metric that chooses the best step or ends a run, and whether higher or lower values are
better, which the metric determines.
"""

from __future__ import annotations

from collections.abc import Collection

from fmjax.contracts import Config, Task
from fmjax.distributed.hosts import say
from fmjax.errors import UserError, nearest, one_of
from fmjax.runs.checkpoint_reader import Best

MODES = ("max", "min")


def best_step(config: Config, task: Task) -> Best | None:
    """Returns the metric whose best step is kept, or None. Raises UserError like `chosen`."""
    section = config["checkpoint"]
    metric = section.get("best")
    return (
        chosen("checkpoint.best", metric, "checkpoint.mode", section.get("mode"), task)
        if metric
        else None
    )


def stopped_by(config: Config, task: Task) -> Best | None:
    """Returns the metric for early stopping, or None. Raises UserError like `chosen`."""
    section = config["train"]["early_stopping"]
    if not section["patience"]:
        return None
    name = "train.early_stopping"
    return chosen(f"{name}.metric", section["metric"], f"{name}.mode", section.get("mode"), task)


def check_metrics(config: Config, task: Task) -> None:
    """Raises UserError, like `chosen`, for the metrics of the best step and of early stopping."""
    best_step(config, task)
    stopped_by(config, task)


def check_evaluated(config: Config, splits: Collection[str]) -> None:
    """Prints a line if no step can be the best because there is no validation data.

    Raises UserError if early stopping is on but nothing is evaluated during the run.
    """
    best = config["checkpoint"].get("best")
    if best and "validation" not in splits:
        say(
            f"checkpoint.best={best}: without validation data, no step can be chosen; only the "
            "newest steps are kept"
        )
    patience = config["train"]["early_stopping"]["patience"]
    if patience and "validation" not in splits:
        how = "set data.files.validation or data.hold_out"
        raise UserError(
            f"train.early_stopping.patience={patience}: early stopping needs validation data; {how}"
        )
    if patience and not config["train"].get("eval_every"):
        how = "set train.eval_every, the steps between two evaluations"
        raise UserError(
            f"train.early_stopping.patience={patience}: the run is evaluated only at its end; {how}"
        )


def stored_best(config: Config, task: Task) -> Best | None:
    """Returns the metric whose best step a run has kept. The metric determines the mode, even if an
    old config contradicts it.
    """
    metric = config["checkpoint"].get("best")
    return (
        Best(metric, task.measures.get(metric) or config["checkpoint"].get("mode") or "max")
        if metric
        else None
    )


def chosen(key: str, metric: str, mode_key: str, mode: str | None, task: Task) -> Best:
    """Returns a metric of the task, and whether its largest or its smallest value is the best.

    Raises UserError if the task has no such metric, if the config's `mode` contradicts the metric,
    or if the mode is neither known nor set."""
    measures = task.measures
    if metric not in measures:
        hint = nearest(metric, measures)
        raise UserError(
            f'{key}="{metric}" is not a metric of this task{hint}; it has {", ".join(measures)}'
        )
    known = measures[metric]
    if mode is not None:
        one_of(mode_key, mode, MODES)
    if known is None and mode is None:
        raise UserError(
            f'{key}="{metric}": it is unknown whether higher or lower is better; set {mode_key} to '
            "max or min"
        )
    if known is not None and mode not in (None, known):
        better = "less" if known == "min" else "more"
        raise UserError(
            f"{mode_key}={mode}: {better} {metric} is better; leave {mode_key} out, as it follows "
            "from the metric"
        )
    return Best(metric, known or mode or "max")
