"""Which evaluation is the best so far, and when patience ends, by records that a restart has kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fmjax.train.judge import Judge


def judge(
    accuracies: list[float], patience: int = 0, mode: str = "max", best: str | None = "accuracy"
) -> Judge:
    """Returns a judge who has seen some evaluations before a restart."""
    config = {
        "train": {"early_stopping": {"metric": "accuracy", "mode": mode, "patience": patience}},
        "checkpoint": {"mode": mode} | ({"best": best} if best else {}),
    }
    records = [
        {"step": step, "eval/validation/accuracy": value} for step, value in enumerate(accuracies)
    ]
    notes: list[str] = []
    recorder: Any = SimpleNamespace(
        records=[{"step": 0, "loss": 1.0}, *records],
        bar=SimpleNamespace(note=notes.append, busy=lambda note: None),
        kept=[],
    )
    recorder.keep = recorder.kept.append
    recorder.write = lambda step, values: recorder.records.append({"step": step, **values})
    task = SimpleNamespace(needs_generation=False, leading=("f1",), measures={"accuracy": None}, chunked=())
    built = SimpleNamespace(model=SimpleNamespace(heads={}), task=task, examples={"validation": (), "train": ()})
    experiment: Any = SimpleNamespace(
        config=config,
        built=built,
        abstract=SimpleNamespace(spec={}),
        data=SimpleNamespace(processors={}),
    )
    return Judge(experiment, recorder)


def evaluated(made: Judge, monkeypatch: pytest.MonkeyPatch, **metrics: float) -> bool:
    monkeypatch.setattr(made, "_metrics_of", lambda params, split: metrics)
    return made.evaluate({}, 9)


@pytest.mark.parametrize(
    ("before", "mode", "now", "best"),
    [
        ([], "max", 0.1, True),
        ([0.5], "max", 0.5, False),
        ([0.5], "max", 0.6, True),
        ([0.5, 0.2], "min", 0.3, False),
        ([0.5], "min", 0.3, True),
    ],
)
def test_the_best_so_far(before, mode, now, best, monkeypatch):
    made = judge(before, mode=mode)
    assert evaluated(made, monkeypatch, accuracy=now) is best
    assert made.metrics_at(9) == {"accuracy": now} and made.metrics_at(8) is None
    assert made.recorder.records[-1] == {"step": 9, "eval/validation/accuracy": now}
    kept = [(one.step, one.chosen_by, one.leading) for one in made.recorder.kept]
    assert kept == [(9, "accuracy", ("accuracy", "f1"))] * best  # for the report


def test_without_a_chosen_metric_nothing_is_the_best(monkeypatch):
    assert evaluated(judge([], best=None), monkeypatch, accuracy=1.0) is False


def test_without_validation_data_nothing_is_evaluated():
    made = judge([])
    del made.experiment.built.examples["validation"]
    assert made.evaluate({}, 9) is False and made.metrics == {} and made.metrics_at(9) is None


@pytest.mark.parametrize(
    ("values", "patience", "ended"),
    [
        ([0.1, 0.2, 0.2], 2, False),
        ([0.2, 0.2, 0.2], 2, True),
        ([0.2, 0.1, 0.2, 0.1], 2, True),
        ([0.2, 0.1, 0.3, 0.1], 2, False),
        ([0.2, 0.1], 2, False),
        ([0.3, 0.2, 0.1], 0, False),
    ],
)
def test_patience(values, patience, ended):
    assert judge(values, patience).out_of_patience(7) is ended


def test_less_may_be_better():
    assert judge([0.1, 0.2, 0.3], 2, mode="min").out_of_patience(7)
    assert not judge([0.3, 0.2, 0.1], 2, mode="min").out_of_patience(7)


def test_a_metric_that_is_undefined_is_reported_once_and_the_run_goes_on(monkeypatch):
    made = judge([0.5, 0.4], patience=2)
    notes = made.recorder.bar.note.__self__
    assert not evaluated(made, monkeypatch, loss=1.0)
    assert not evaluated(made, monkeypatch, loss=1.0)
    said = [note for note in notes if "undefined" in note]
    assert len(said) == 1 and said[0].startswith("step 9: undefined metrics: accuracy: ")
    assert made.out_of_patience(9)  # an undefined value is no progress
    assert evaluated(made, monkeypatch, loss=1.0, accuracy=0.6) and not made.out_of_patience(9)
    assert notes[-1] == "step 9: undefined metrics: none"


def test_a_metric_that_was_never_defined_ends_no_run(monkeypatch):
    made = judge([], patience=1)
    for _ in range(3):
        assert not evaluated(made, monkeypatch, loss=1.0) and not made.out_of_patience(9)
    assert [one.chosen_by for one in made.recorder.kept] == [""] * 3  # the report shows the newest
