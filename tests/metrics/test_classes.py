"""Metrics against counts done by hand and scikit-learn; padded rows never count, order never matters."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax
from sklearn import metrics as sk

from fmjax.errors import UserError
from fmjax.metrics import classes as class_metrics


def ones(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


def draw(kind: str, seed: int, count: int = 20) -> tuple[np.ndarray, ...]:
    """Returns random arguments of a metric, without `valid`."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(count, 4)).astype(np.float32)
    match kind:
        case "binary":
            return numbers[:, :2], rng.integers(2, size=count)
        case "classification":
            return numbers, rng.integers(4, size=count).astype(np.int32)
        case "multilabel":
            return numbers, rng.integers(2, size=(count, 4)).astype(np.float32)
        case "regression":
            return numbers[:, 0], numbers[:, 1].round(1)
    weights = rng.integers(1, 5, size=count).astype(np.float32)
    return np.abs(numbers[:, 0]) * weights, weights, np.minimum(weights, 2)


def averages(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Returns every average of precision, recall and F1."""
    scores = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}
    return {
        f"{name}_{average}": score(labels, predicted, average=average, zero_division=0)
        for name, score in scores.items()
        for average in ("macro", "micro", "weighted")
    }


FUNCTIONS = {
    "binary": class_metrics.classification,
    "classification": class_metrics.classification,
    "multilabel": class_metrics.multilabel,
    "regression": class_metrics.regression,
    "token_level": class_metrics.token_level,
}
KINDS = pytest.mark.parametrize("kind", FUNCTIONS)


@KINDS
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), padded=st.integers(0, 5))
def test_padded_rows_and_order_do_not_count(kind: str, seed: int, padded: int) -> None:
    arrays = draw(kind, seed)
    expected = FUNCTIONS[kind](*arrays, ones(20))
    order = np.random.default_rng(seed + 1).permutation(20 + padded)
    # The rows that fill up a batch may hold anything.
    junk = [np.full_like(array[:padded], 9 if array.dtype.kind == "i" else np.nan) for array in arrays]
    filled = [np.concatenate(pair) for pair in zip(arrays, junk, strict=True)]
    valid = np.concatenate([ones(20), np.zeros(padded, np.float32)])
    found = FUNCTIONS[kind](*(array[order] for array in filled), valid[order])
    assert found == pytest.approx(expected, abs=1e-9)


@KINDS
def test_values_are_plain_floats_that_json_can_hold(kind: str) -> None:
    values = FUNCTIONS[kind](*draw(kind, 0), ones(20))
    assert values and all(type(value) is float for value in values.values())
    json.dumps(values, allow_nan=False)


@KINDS
def test_no_examples_and_numbers_that_are_not_finite_are_refused(kind: str) -> None:
    first, *rest = draw(kind, 0)
    with pytest.raises(UserError, match="no examples"):
        FUNCTIONS[kind](first, *rest, np.zeros(20))
    first[3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        FUNCTIONS[kind](first, *rest, ones(20))


def test_binary_by_hand() -> None:
    """Truth 1 1 1 0 0, said 1 1 0 1 0: TP 2, FN 1, FP 1, TN 1."""
    margins = np.array([3.0, 2.0, -1.0, 1.0, -2.0])
    shifts = np.array([0.0, -7, 5, 4, 3])  # of both logits of an example: without effect
    logits = np.stack([shifts, shifts + margins], axis=1).astype(np.float32)
    values = class_metrics.classification(logits, np.array([1, 1, 1, 0, 0]), ones(5))
    expected = {
        "accuracy": 3 / 5,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "f1": 2 / 3,
        **dict.fromkeys(("precision_micro", "recall_micro", "f1_micro"), 3 / 5),
        **dict.fromkeys(("precision_macro", "recall_macro", "f1_macro"), (2 / 3 + 1 / 2) / 2),
        **dict.fromkeys(("precision_weighted", "recall_weighted", "f1_weighted"), (3 * 2 / 3 + 2 * 1 / 2) / 5),
        "mcc": (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2),
        "roc_auc": 5 / 6,  # of the six pairs of a 1 and a 0, only (-1, 1) is in the wrong order
        "pr_auc": (1 + 1 + 3 / 4) / 3,
    }
    assert values == pytest.approx(expected)


def test_classification_is_that_of_sklearn() -> None:
    logits, labels = draw("classification", 3, 60)
    values = class_metrics.classification(logits, labels, ones(60))
    predicted, chances = logits.argmax(1), softmax(logits.astype(np.float64), axis=1)
    assert values == pytest.approx(
        {
            "accuracy": sk.accuracy_score(labels, predicted),
            **averages(labels, predicted),
            "roc_auc": sk.roc_auc_score(labels, chances, multi_class="ovr"),
            "pr_auc": sk.average_precision_score(labels, chances),
            "mcc": sk.matthews_corrcoef(labels, predicted),
        }
    )


def test_a_class_that_never_occurs_takes_no_part() -> None:
    """Of four classes, 0 and 3 occur as labels and 1 is said once by mistake; 2 is nowhere."""
    logits = np.full((4, 4), -5, np.float32)
    logits[[0, 1, 2, 3], [0, 1, 3, 3]] = 5
    labels = np.array([0, 0, 3, 3])
    values = class_metrics.classification(logits, labels, ones(4))
    assert values["f1_macro"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    chances = softmax(logits.astype(np.float64), axis=1)
    expected = np.mean([sk.roc_auc_score(labels == c, chances[:, c]) for c in (0, 3)])
    assert values["roc_auc"] == pytest.approx(expected)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("label", [0, 1])
def test_areas_are_left_out_where_one_class_is_all_there_is(classes: int, label: int) -> None:
    logits = np.eye(classes, dtype=np.float32)
    values = class_metrics.classification(logits, np.full(classes, label), ones(classes))
    assert values["accuracy"] == pytest.approx(1 / classes) and values["mcc"] == 0
    assert "roc_auc" not in values and "pr_auc" not in values
    assert ("f1" in values) == (classes == 2)


def test_binary_ranks_far_beyond_where_probabilities_are_all_one() -> None:
    logits = np.array([[0, 100.0], [0, 101], [0, 102]], np.float32)
    assert class_metrics.classification(logits, np.array([0, 1, 1]), ones(3))["roc_auc"] == 1.0


def test_multilabel_is_that_of_sklearn_over_columns_with_both_values() -> None:
    logits, labels = draw("multilabel", 1)
    labels[:, 2] = 0
    values = class_metrics.multilabel(logits, labels, ones(20))
    predicted, both = logits > 0, [0, 1, 3]
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        **averages(labels, predicted),
        "roc_auc": sk.roc_auc_score(labels[:, both], logits[:, both]),
        "pr_auc": sk.average_precision_score(labels[:, both], logits[:, both]),
    }
    assert values == pytest.approx(expected)


def test_multilabel_of_one_class_and_of_nothing_said() -> None:
    values = class_metrics.multilabel(np.array([[1.0], [1], [-1]]), np.array([[1.0], [0], [1]]), ones(3))
    shares = {"accuracy": 1 / 3} | dict.fromkeys(class_metrics.AVERAGED, 1 / 2)
    assert values == pytest.approx(shares | {"roc_auc": 1 / 4, "pr_auc": 7 / 12})
    nothing = class_metrics.multilabel(-np.ones((2, 2)), np.zeros((2, 2)), ones(2))
    assert nothing == {"accuracy": 1} | dict.fromkeys(class_metrics.AVERAGED, 0)


def test_regression_is_that_of_scipy() -> None:
    predictions, targets = draw("regression", 2)
    values = class_metrics.regression(predictions, targets, ones(20))
    expected = {
        "mse": sk.mean_squared_error(targets, predictions),
        "mae": sk.mean_absolute_error(targets, predictions),
        "pearson": stats.pearsonr(predictions.astype(np.float64), targets).statistic,
        "spearman": stats.spearmanr(predictions, targets).statistic,
    }
    assert values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("predictions", [[0.1, 0.1, 0.1], [0.3]])
def test_correlation_with_a_constant_is_left_out(predictions: list[float]) -> None:
    values = class_metrics.regression(np.array(predictions), np.arange(len(predictions)), ones(len(predictions)))
    assert set(values) == {"mse", "mae"}


def test_token_level_counts_tokens_not_examples() -> None:
    values = class_metrics.token_level(np.array([1.0, 9.0]), np.array([1.0, 3.0]), np.array([1.0, 0.0]), ones(2))
    assert values == pytest.approx({"loss": 2.5, "perplexity": math.exp(2.5), "accuracy": 0.25})


def test_token_level_without_tokens_is_refused_and_overflow_left_out() -> None:
    with pytest.raises(UserError, match="no token"):
        class_metrics.token_level(np.zeros(2), np.zeros(2), np.zeros(2), ones(2))
    assert set(class_metrics.token_level(np.array([1e4]), ones(1), ones(1), ones(1))) == {"loss", "accuracy"}


def test_metrics_of_bf16_are_those_of_its_values() -> None:
    logits, labels = draw("classification", 5)
    half = np.asarray(jnp.asarray(logits, jnp.bfloat16))
    full = half.astype(np.float32)
    assert class_metrics.classification(half, labels, ones(20)) == class_metrics.classification(full, labels, ones(20))
