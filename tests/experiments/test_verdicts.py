"""Verdicts on claims: when they hold, and what the words say."""

from __future__ import annotations

import math

import pytest

from fmjax.experiments.entries import Claim, Experiment, Measured, Run, Written
from fmjax.experiments.verdicts import interval_of, number, verdict


def judged(value, claimed=None, floor=None, **claim):
    one = Claim("run", "accuracy", **({"tolerance": 0.02} | claim))
    experiment = Experiment("x", "X", {"run": Run("bert_mlm", "BERT")}, (one,))
    found = {} if value is None else {"run": Measured({"accuracy": (value,)})}
    found |= {} if floor is None else {"run/tfidf": Measured({"accuracy": (floor,)})}
    before = {} if claimed is None else {"run": Measured({"accuracy": (claimed,)})}
    return verdict(experiment, one, before, found)


PUBLISHED = {"published": 0.9, "source": "someone"}


@pytest.mark.parametrize(
    ("holds", "words", "options"),
    [
        (None, "not run yet", {"value": None, **PUBLISHED}),
        (None, "first measurement", {"value": 0.5}),
        (True, "", {"value": 0.79, "claimed": 0.8}),
        (True, "", {"value": 0.99, "claimed": 0.8}),
        (False, "worse than the claimed .800 by more than 0.02", {"value": 0.77, "claimed": 0.8}),
        (True, "", {"value": 0.785, "claimed": 0.8, "tolerance": 0.015}),
        (True, "", {"value": 0.77, "claimed": 0.6, "better": "lower", "tolerance": 0.2}),
        (False, "worse than the claimed .600 by more than 0.02", {"value": 0.77, "claimed": 0.6, "better": "lower"}),
        (True, "worse than the published value", {"value": 0.89, **PUBLISHED}),
        (True, "better than the published value", {"value": 0.91, **PUBLISHED}),
        (False, "worse than the published .900 by more than 0.02", {"value": 0.8, **PUBLISHED}),
        (True, "worse than the published value", {"value": 0.8, "claimed": 0.8, **PUBLISHED}),
        (True, "better than the published value", {"value": 0.95, "claimed": 0.8, **PUBLISHED}),
        (None, "first measurement; worse than its floor", {"value": 0.5, "floor": 0.6, "floors": ("tfidf",)}),
        (True, "better than its floor", {"value": 0.7, "claimed": 0.7, "floor": 0.6, "floors": ("tfidf",)}),
        (None, "first measurement", {"value": 0.5, "claimed": math.nan}),
        (False, "accuracy is not finite: the run diverged", {"value": math.nan, "claimed": 0.7, **PUBLISHED}),
    ],
)
def test_verdicts(holds, words, options):
    found = judged(**options)
    assert (found.holds, found.words) == (holds, words)


def test_intervals():
    over_seeds = Measured({"loss": (1.0, 1.1, 1.2)})
    assert interval_of(over_seeds, "loss") == "± .248, 3 seeds"  # 4.303 * 0.1 / sqrt(3)
    assert interval_of(Measured({"accuracy": (0.5,)}, examples=100), "accuracy") == "± .098, one seed"
    assert interval_of(Measured({"f1": (0.5,)}, examples=100), "f1") == "one seed"
    of_seeds = Measured({"accuracy": (0.27,), "f1": (0.132,)}, seeds=3, deviation={"accuracy": 0.007}, examples=100)
    assert interval_of(of_seeds, "accuracy") == "± .017, 3 seeds"  # 4.303 * .007 / sqrt(3)
    assert interval_of(of_seeds, "f1") == "3 seeds"
    assert interval_of(Measured({"loss": (1.0, math.nan)}), "loss") == ""


def test_numbers():
    shown = [number(value) for value in (0.8091, 0.9927, 1.7087, 23.31, -0.5, 0.0)]
    assert shown == [".809", ".9927", "1.709", "23.3", "-.500", ".000"]
    written = ("4.7", "1.88", ".8925", "0.270", "0.997", "1.70866", "5e-3", "88.5")
    assert [number(Written(text)) for text in written] == ["4.7", "1.88", ".8925", ".270", ".997", "1.709", ".005", "88.5"]
