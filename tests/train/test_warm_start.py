"""Starting from other weights: which rows of a classifier are which labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fmjax import pytree, tasks
from fmjax.inference.pretrained import Pretrained, load
from fmjax.train.warm_start import fit_heads, rows

GOLDEN = Path(__file__).parents[1] / "golden"
# A head of each kind, and the parameters that have a row for each class, with its axis.
HEADS = {
    "bert_classify": ({"name": "classify"}, ("head/classify/kernel", "head/classify/bias")),
    "roberta_classify": ({"name": "classify"}, ("head/classify/kernel", "head/classify/bias")),
    "bert_tag": ({"name": "tag"}, ("head/tag/kernel", "head/tag/bias")),
    "vision/vit_classify": (
        {"name": "image_classify", "image_size": 16},
        ("head/classify/kernel", "head/classify/bias"),
    ),
    "vision/deit_distilled": (
        {"name": "image_classify", "image_size": 16, "head": "classify_distilled"},
        tuple(
            f"head/classify_distilled/{token}/{leaf}"
            for token in ("class_token", "distillation_token")
            for leaf in ("kernel", "bias")
        ),
    ),
}


def source_of(case: str, *labels: str, **config: object) -> Pretrained:
    """Returns the weights of a golden folder, whose classes have these names."""
    names = {"id2label": {str(index): label for index, label in enumerate(labels)}}
    found = load(GOLDEN / case)
    return dataclasses.replace(found, config={**found.config, **names, **config})


def fitted(source: Pretrained, settings: dict, *labels: str) -> tuple[dict, list[str]]:
    """Returns the parameters for a run with these labels, by name, and what is said."""
    task = tasks.make({**settings, "labels": labels})
    params, lines = fit_heads(source.params, source, source.model.clone(heads=task.heads), task)
    return pytree.names(params), lines


@pytest.mark.parametrize("case", HEADS)
def test_rows_follow_the_names_of_labels(case):
    settings, leaves = HEADS[case]
    count = len(pytree.names(load(GOLDEN / case).params)[leaves[1]])
    theirs = [f"class {letter}" for letter in "cabde"[:count]]
    source = source_of(case, *theirs)
    found, [line] = fitted(source, settings, *sorted(theirs))
    order = [theirs.index(label) for label in sorted(theirs)]
    assert order != sorted(order)
    before = pytree.names(source.params)
    for name in leaves:
        np.testing.assert_array_equal(found[name], np.asarray(before[name])[..., order])
    for name in set(before) - set(leaves):
        assert found[name] is before[name]
    assert f"the run has {', '.join(sorted(theirs))}, the weights {', '.join(theirs)}" in line

    # The same order says nothing; other names leave the last layer out, so that it starts fresh.
    assert fitted(source, settings, *theirs)[1] == []
    found, [line] = fitted(source, settings, *theirs[:-1], "other")
    assert set(before) - set(found) == set(leaves)
    assert line.endswith(
        f"starts fresh: the run has {', '.join(theirs[:-1])}, other, the weights {', '.join(theirs)}"
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "order"),
    [
        (("entailment", "neutral"), ("NEUTRAL", "ENTAILMENT"), (1, 0)),
        (("0", "1"), ("LABEL_0", "LABEL_1"), (0, 1)),
        (("no", "yes"), ("LABEL_0", "LABEL_1"), None),
        (("no", "yes"), ("no", "yes", "maybe"), None),
        (("a", "A"), ("A", "a"), (1, 0)),
        (("a", "A"), ("A", "b"), None),
    ],
)
def test_which_labels_are_the_same(ours, theirs, order):
    assert rows(ours, theirs) == order


def test_classes_without_names_are_not_taken_by_number():
    source = source_of("bert_classify", "LABEL_0", "LABEL_1", "LABEL_2")
    found, [line] = fitted(source, {"name": "classify"}, "no", "perhaps", "yes")
    assert "head/classify/kernel" not in found and line.endswith(
        "; to keep it, write its labels into id2label in config.json"
    )


def test_a_regression_is_no_class():
    source = source_of("bert_classify", "x", problem_type="regression")
    regression = {"name": "classify", "kind": "regression"}
    assert fitted(source, regression)[1] == []
    found, [line] = fitted(source, {"name": "classify"}, "x")
    assert "head/classify/kernel" not in found and "the weights (a number)" in line


def test_the_parts_of_a_mixture_have_labels_of_their_own():
    source = source_of("bert_classify", "b", "c", "a")
    parts = {
        "first": {"name": "classify", "labels": ("a", "b", "c")},
        "second": {"name": "mlm", "split": "other"},
    }
    found, [line] = fitted_mixture(source, parts)
    before = pytree.names(source.params)["head/classify/bias"]
    np.testing.assert_array_equal(found["head/classify/bias"], before[[2, 0, 1]])
    assert line.startswith("head/classify has its rows by the labels' names")


def fitted_mixture(source: Pretrained, parts: dict) -> tuple[dict, list[str]]:
    task = tasks.make({"name": "mixture", "parts": parts})
    params, lines = fit_heads(source.params, source, source.model.clone(heads=task.heads), task)
    return pytree.names(params), lines
