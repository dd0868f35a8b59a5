"""Metrics of a whole evaluation, computed on the host from per-example arrays gathered from all
devices.

AUC, F1 and rank correlations are not sums over batches, so they see all examples at once. `valid
[N]` is 1 for a real row and 0 for one that pads the last batch, which is dropped first. Sums are in
float64.

A metric that is undefined for the data (the AUC of a class that never occurs, the correlation with
a constant) is left out, so every value is a finite number and metrics.jsonl is valid JSON. As in
scikit-learn, precision, recall, F1 and MCC are 0 when dividing by zero.

Functions import SciPy and scikit-learn when they are called: every command imports this module, and
those two take longer to import than JAX.

Letters: N examples, C classes, K columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fmjax.contracts import Measures
from fmjax.errors import UserError

# The metrics of the functions below, and which value is better.
LOSS: Measures = {"loss": "min"}
ACCURACY: Measures = {"accuracy": "max"}
AREAS: Measures = {"roc_auc": "max", "pr_auc": "max"}
TWO_CLASSES: Measures = {"precision": "max", "recall": "max", "f1": "max"}
AVERAGED: Measures = {
    f"{name}_{average}": best
    for average in ("macro", "micro", "weighted")
    for name, best in TWO_CLASSES.items()
}
CLASSIFICATION: Measures = {**ACCURACY, "mcc": "max", **AVERAGED, **AREAS}
MULTILABEL: Measures = {**ACCURACY, **AVERAGED, **AREAS}
REGRESSION: Measures = {"mse": "min", "mae": "min", "pearson": "max", "spearman": "max"}
TOKEN_LEVEL: Measures = {**LOSS, "perplexity": "min", **ACCURACY}
BITS: Measures = {"bits_per_byte": "min", "bits_per_character": "min"}


def classification(logits: np.ndarray, labels: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """Returns the metrics for one label per example: logits [N,C], labels [N] from 0 to C-1.

    accuracy, mcc, and `averaged` over the classes that occur in labels or predictions, which is
    scikit-learn's default. roc_auc, pr_auc: see `areas`; for two classes those of class 1,
    otherwise the mean over all classes that occur, each against the rest. With two classes, also
    precision, recall and f1 of class 1.
    """
    from scipy.special import log_softmax
    from sklearn.metrics import matthews_corrcoef

    logits, labels = real_rows(valid, logits, labels)
    predicted = logits.argmax(axis=1)
    occurring = np.union1d(labels, predicted)
    values = {
        "accuracy": np.mean(predicted == labels),
        # scikit-learn also returns 0 for a single class, with a warning.
        "mcc": matthews_corrcoef(labels, predicted) if occurring.size > 1 else 0.0,
    }
    values |= averaged(labels, predicted, occurring)
    if logits.shape[1] != 2:
        one_hot = labels[:, None] == np.arange(logits.shape[1])
        return defined(values | areas(one_hot, log_softmax(logits, axis=1)))
    truth, values = labels == 1, values | of_classes(labels, predicted, [1], "macro")
    return defined(values | areas(truth[:, None], logits[:, 1:] - logits[:, :1]))


def multilabel(logits: np.ndarray, labels: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """Returns the metrics for any number of labels per example: logits [N,C], labels [N,C] of 0 and
    1.

    A class is predicted if its logit is above 0. accuracy: the fraction of examples with all C
    classes correct; `averaged` over all C; roc_auc, pr_auc: see `areas`, over the classes that only
    some examples have.
    """
    logits, labels = real_rows(valid, logits, labels)
    truth, predicted = labels > 0.5, logits > 0
    values = {"accuracy": np.mean((truth == predicted).all(axis=1))}
    # scikit-learn would read a single column as two classes; an extra empty column prevents that.
    wide = ((0, 0), (0, 1))
    values |= averaged(np.pad(truth, wide), np.pad(predicted, wide), np.arange(truth.shape[1]))
    return defined(values | areas(truth, logits))


def averaged(labels: np.ndarray, predicted: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """Returns precision, recall and F1 over the given classes: macro, the mean over classes;
    weighted, by the number of examples; micro, over all decisions."""
    values: dict[str, float] = {}
    for average in ("macro", "micro", "weighted"):
        found = of_classes(labels, predicted, classes, average)
        values |= {f"{name}_{average}": value for name, value in found.items()}
    return values


def of_classes(
    labels: np.ndarray, predicted: np.ndarray, classes: Sequence[int] | np.ndarray, average: str
) -> dict[str, float]:
    """Returns precision, recall and F1 over some classes, with one kind of average."""
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(
        labels, predicted, labels=classes, average=average, zero_division=0
    )
    return dict(zip(TWO_CLASSES, scores, strict=False))


def areas(truth: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Returns the means over columns of the areas under two curves: truth (bool) and scores [N,K].

    roc_auc: of the receiver operating characteristic; pr_auc: of precision over recall, as average
    precision (no interpolation). A column without both values has no curve and is left out. Without
    any curve, the keys are left out.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    columns = [
        column for column in range(truth.shape[1]) if 0 < truth[:, column].sum() < len(truth)
    ]
    if not columns:
        return {}
    pairs = [(truth[:, column], scores[:, column]) for column in columns]
    return {
        "roc_auc": float(np.mean([roc_auc_score(*pair) for pair in pairs])),
        "pr_auc": float(np.mean([average_precision_score(*pair) for pair in pairs])),
    }


def regression(predictions: np.ndarray, targets: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """Returns mse, mae, pearson and spearman (ties get their mean rank) of predictions [N] and
    targets [N]."""
    from scipy.stats import rankdata

    predictions, targets = real_rows(valid, predictions, targets)
    values = {
        "mse": np.mean((predictions - targets) ** 2),
        "mae": np.mean(np.abs(predictions - targets)),
        "pearson": correlation(predictions, targets),
        "spearman": correlation(rankdata(predictions), rankdata(targets)),
    }
    return defined(values)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Returns Pearson's correlation of two arrays [N]; NaN if one of them is constant."""
    return np.corrcoef(a, b)[0, 1] if np.ptp(a) and np.ptp(b) else math.nan


def token_level(
    losses_sum: np.ndarray, weights: np.ndarray, correct: np.ndarray, valid: np.ndarray
) -> dict[str, float]:
    """Returns loss (nats per predicted token), perplexity and accuracy, with equal weight for every
    token.

    Takes, for each example [N], the sum of its tokens' losses, the number of predicted tokens, and
    the number of correct ones. Raises UserError if no token is predicted.
    """
    losses_sum, weights, correct = real_rows(valid, losses_sum, weights, correct)
    total = weights.sum()
    if not total:
        raise UserError("evaluation: this split has no token to predict; use longer texts")
    loss = losses_sum.sum() / total
    with np.errstate(over="ignore"):
        return defined(
            {"loss": loss, "perplexity": np.exp(loss), "accuracy": correct.sum() / total}
        )


def bits(losses_sum: np.ndarray, valid: np.ndarray, size: int, characters: int) -> dict[str, float]:
    """Returns the bits per UTF-8 byte of a text of `size` bytes, and per character.

    Takes the sum of the losses of each example's tokens, in nats: with an arithmetic coder, the
    whole text takes their sum divided by log 2 bits. Unlike the loss per token, this can be
    compared between vocabularies.
    """
    (losses_sum,) = real_rows(valid, losses_sum)
    total = losses_sum.sum() / math.log(2)
    return {"bits_per_byte": float(total / size), "bits_per_character": float(total / characters)}


def real_rows(valid: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """Returns the rows of the arrays where `valid` is above 0. Other than integer arrays become
    float64.

    Raises UserError if there are none, or if a value is not finite, since metrics would be
    misleading.
    """
    real = np.asarray(valid) > 0
    if not real.any():
        raise UserError("evaluation: this split has no examples; add some")
    rows = [np.asarray(array)[real] for array in arrays]
    rows = [array if array.dtype.kind in "biu" else array.astype(np.float64) for array in rows]
    if not all(np.isfinite(array).all() for array in rows):
        raise UserError(
            "evaluation: the model's outputs are not finite numbers; lower optim.learning_rate"
        )
    return rows


def defined(values: dict[str, float]) -> dict[str, float]:
    """Returns the values that are numbers, as plain floats."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
