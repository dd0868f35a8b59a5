"""What a report shows of an evaluation, against scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from fmjax.metrics import details
from fmjax.tasks import classify


def test_classes_and_confusions_equal_scikit_learns():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, 60), rng.integers(0, 4, 60)  # the last class never occurs
    found = details.one_label(labels, predicted, ("a", "b", "c", "d"))
    assert found["confusion"] == sk.confusion_matrix(labels, predicted, labels=range(4)).tolist()
    measures = sk.precision_recall_fscore_support(labels, predicted, labels=range(4), zero_division=0)
    for row, name, p, r, f1, count in zip(found["classes"], "abcd", *measures, strict=True):
        assert row == {"label": name, "count": count, "precision": p, "recall": r, "f1": pytest.approx(f1)}


def test_the_worst_examples_are_real_ones():
    losses, valid = np.arange(20.0), np.ones(20)
    valid[19] = 0
    rows = details.worst(losses, valid, lambda index: {"example": index + 1})
    assert [row["example"] for row in rows] == list(range(19, 9, -1)) and rows[0]["loss"] == 18.0


def test_scores_come_before_losses_and_samples_are_spread():
    scores = np.array([1.0, 0.0, 0.5, 0.0])
    rows = details.worst(np.array([9.0, 1.0, 5.0, 2.0]), np.ones(4), lambda index: {"example": index}, scores)
    assert [row["example"] for row in rows] == [3, 1, 2, 0]
    valid = np.array([1] * 9 + [0])
    assert details.samples(valid, lambda index: {"example": index}) == [{"example": at} for at in (0, 2, 4, 6, 8)]
    assert details.samples(np.zeros(2), dict) == [] and len(details.samples(np.ones(3), lambda index: {"example": index})) == 3


@pytest.mark.parametrize(
    ("kind", "logits", "labels", "classes", "worst"),
    [
        ("single", [[2.0, 0.0], [3.0, 0.0]], [0, 1], [("no", 1), ("yes", 1)], ("yes", "no")),
        ("multi", [[1.0, 1.0], [-1.0, 1.0]], [[1, 0], [0, 1]], [("no", 1), ("yes", 1)], ("no", "no, yes")),
        ("regression", [[1.0], [4.0]], [1.5, 2.0], None, ("2", "4")),
    ],
)
def test_each_kind_of_label(kind, logits, labels, classes, worst):
    task = classify.Task(kind=kind, labels=() if kind == "regression" else ("no", "yes"))
    losses = np.array([1.0, 0.5]) if kind == "multi" else np.array([0.1, 2.0])
    arrays = {"logits": np.array(logits, np.float32), "labels": np.array(labels, np.float32 if kind != "single" else int)}
    found = task.details(arrays | {"losses": losses}, np.ones(2))
    json.dumps(found)
    assert (found["worst"][0]["label"], found["worst"][0]["predicted"]) == worst
    assert ([(row["label"], row["count"]) for row in found["classes"]] if classes else None) == classes
    assert ("confusion" in found) == (kind == "single")


def test_kinds_of_entities_are_counted_by_exact_matches():
    truth = [("PER", (0, 0, 2)), ("PER", (1, 0, 1)), ("LOC", (1, 3, 4))]
    predicted = [("PER", (0, 0, 2)), ("PER", (1, 0, 2)), ("ORG", (1, 3, 4))]
    assert details.entity_table(truth, predicted) == [
        {"label": "LOC", "count": 1, "precision": 0.0, "recall": 0.0, "f1": 0.0},
        {"label": "ORG", "count": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0},
        {"label": "PER", "count": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5},
    ]
