"""Which values of a metric are better: that follows from the metric, for every metric of every task."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from fmjax import tasks
from fmjax.config.names import choices
from fmjax.errors import UserError
from fmjax.runs.best import best_step, check_evaluated, stopped_by, stored_best
from fmjax.runs.checkpoint import Best

LABELS = {"labels": ("a", "b")}
TASKS: dict[str, dict[str, Any]] = {
    "classify": {"name": "classify", **LABELS},
    "multi": {"name": "classify", "kind": "multi", **LABELS},
    "regression": {"name": "classify", "kind": "regression"},
    "image": {"name": "image_classify", **LABELS},
    "tag": {"name": "tag", "labels": ("NN", "VB")},
    "bio": {"name": "tag", "labels": ("O", "B-X")},
    "qa": {"name": "qa", "unanswerable": True},
    "choice": {"name": "choice"},
    "mlm": {"name": "mlm", "nsp": True},
    "clm": {"name": "clm"},
    "span_corruption": {"name": "span_corruption"},
    "denoise": {"name": "denoise"},
    "mae": {"name": "mae"},
    "seq2seq": {"name": "seq2seq", "scores": ("bleu", "chrf", "rouge", "error_rates", "exact_match")},
}
FALL = {"loss", "perplexity", "mse", "mae", "wer", "cer", "bits_per_byte", "bits_per_character"}


class Own:
    """A task of a package of one's own, of whose metric nothing is known."""

    measures: ClassVar = {"loss": "min", "calls": None}


def config(best: str | None, mode: str | None = None, **stopping: Any) -> dict[str, Any]:
    stopping = {"metric": "loss", "mode": mode, "patience": 0} | stopping
    return {"checkpoint": {"best": best, "mode": mode}, "train": {"early_stopping": stopping}}


@pytest.mark.parametrize("name", TASKS)
def test_the_direction_of_every_metric_follows_from_the_metric(name):
    task = tasks.make(TASKS[name])
    found = {metric: best_step(config(metric), task) for metric in task.measures}
    assert found == {metric: Best(metric, "min" if metric in FALL else "max") for metric in task.measures}
    stops = {metric: stopped_by(config(None, metric=metric, patience=1), task) for metric in task.measures}
    assert stops == found


def test_every_task_is_here():
    assert {*choices("fmjax.tasks", "Task")} - {"mixture"} == {made["name"] for made in TASKS.values()}


def test_none_is_chosen_unless_asked_for():
    task = tasks.make(TASKS["choice"])
    assert best_step(config(None), task) is None and stopped_by(config(None, metric="zz"), task) is None


def test_what_contradicts_the_metric_is_refused():
    task: Any = tasks.make(TASKS["choice"])
    assert best_step(config("loss", "min"), task) == Best("loss", "min")
    with pytest.raises(UserError, match="^checkpoint.mode=max: less loss is better; leave checkpoint.mode out"):
        best_step(config("loss", "max"), task)
    with pytest.raises(UserError, match="^train.early_stopping.mode=min: more accuracy is better; leave"):
        stopped_by(config(None, metric="accuracy", mode="min", patience=3), task)
    with pytest.raises(UserError, match='^checkpoint.mode="most": choose one of max, min'):
        best_step(config("loss", "most"), task)
    with pytest.raises(UserError, match=r'best="los" is not a metric of this task \(did you mean "loss"\?\); it has loss, acc'):
        best_step(config("los"), task)


def test_a_metric_of_which_nothing_is_known_needs_a_word():
    own: Any = Own()
    with pytest.raises(UserError, match='best="calls": it is unknown whether higher or lower is better; set checkpoint.mode'):
        best_step(config("calls"), own)
    assert best_step(config("calls", "min"), own) == Best("calls", "min")


def test_the_metric_decides_in_old_runs_too():
    task: Any = tasks.make(TASKS["choice"])
    assert stored_best(config("loss", "max"), task) == Best("loss", "min")  # the old default
    assert stored_best(config("accuracy", "max"), task) == Best("accuracy", "max")
    assert stored_best({"checkpoint": {"mode": "max"}}, task) is None


def test_early_stopping_needs_evaluations():
    made = config(None, patience=2)
    with pytest.raises(UserError, match="patience=2: early stopping needs validation data; set data.files.validation"):
        check_evaluated(made, {"train"})
    with pytest.raises(UserError, match="patience=2: the run is evaluated only at its end; set train.eval_every"):
        check_evaluated(made, {"train", "validation"})
    made["train"]["eval_every"] = 10
    check_evaluated(made, {"train", "validation"})
    check_evaluated(config(None), {"train"})


def test_a_best_step_needs_validation_data(capsys):
    check_evaluated(config("loss"), {"train", "validation"})
    assert capsys.readouterr().err == ""
    check_evaluated(config("loss"), {"train"})
    warned = capsys.readouterr().err
    assert warned.startswith("checkpoint.best=loss: without validation data, no step can be chosen; only the newest")
