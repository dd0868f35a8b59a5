"""The evaluation that the report and the last line of a run are about."""

from __future__ import annotations

import pytest

from fmjax.runs import evaluation
from fmjax.runs.evaluation import Evaluation, listed, short


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (0.50049, "0.5005"),
        (1.23456, "1.235"),
        (45.678, "45.678"),
        (1234.5, "1,234"),
        (1.5e-7, "1.5e-07"),
        (2e12, "2e+12"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_the_loss_comes_first_and_each_metric_once():
    metrics = {"accuracy": 0.5, "mcc": 0.1, "loss": 2.0, "f1": 0.25}
    assert listed(metrics, ("f1", "accuracy", "f1", "absent")) == "loss 2.000, f1 0.2500, accuracy 0.5000"


def test_the_headline_says_whether_a_metric_chose_the_step():
    metrics = {"loss": 1.0, "accuracy": 0.5}
    assert Evaluation(1500, metrics).headline() == "step 1,500, validation loss 1.000"
    chosen = Evaluation(1500, metrics, (), "accuracy")
    assert chosen.headline() == "best step 1,500, validation loss 1.000, accuracy 0.5000"


def test_an_evaluation_is_stored_whole(tmp_path):
    assert evaluation.read(tmp_path) is None
    kept = Evaluation(3, {"loss": 1.0}, ["accuracy"], "loss", {"worst": [{"text": "世界"}]})
    evaluation.write(tmp_path, kept)
    assert evaluation.read(tmp_path) == kept
