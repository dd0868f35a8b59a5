"""Details of an evaluation for a report: a table of classes, their confusions, and the worst
examples. All are JSON values.

Letters: N examples, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TypeAlias

import numpy as np

from fmjax.contracts import Record

Entity: TypeAlias = tuple[str, Hashable]  # its kind and its location
WORST = 10  # number of listed examples
SAMPLES = 5  # number of examples that are listed however good they are
LONGEST = 400  # displayed characters of a text


def one_label(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Record:
    """Returns the table of classes and the confusion matrix.

    Args:
      labels: [N], from 0 to C-1.
      predicted: [N], likewise.
      names: the names of the C classes.

    Returns `classes`, see `class_table`, and `confusion`, C rows (true) of C counts (predicted).
    """
    every = np.arange(len(names))
    truth, guess = labels[:, None] == every, predicted[:, None] == every
    counts = truth.T.astype(np.int64) @ guess.astype(np.int64)
    return {"classes": class_table(truth, guess, names), "confusion": counts.tolist()}


def class_table(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> list[Record]:
    """Returns label, count, precision, recall and F1 of each class; 0 when dividing by zero.

    Args:
      truth: [N,C], whether an example has a class.
      predicted: [N,C], whether it is predicted.
      names: of the C classes.
    """
    # Imported here because the import takes a moment; see fmjax/metrics/classes.py.
    from sklearn.metrics import precision_recall_fscore_support

    # An extra empty column keeps scikit-learn from reading a single column as two classes.
    padded = [np.pad(array, ((0, 0), (0, 1))) for array in (truth, predicted)]
    measures = precision_recall_fscore_support(
        *padded, labels=np.arange(len(names)), average=None, zero_division=0
    )
    return [
        {"label": name, "count": int(count), "precision": p, "recall": r, "f1": f1}
        for name, p, r, f1, count in zip(names, *(part.tolist() for part in measures), strict=True)
    ]


def entity_table(truth: Collection[Entity], predicted: Collection[Entity]) -> list[Record]:
    """Returns label, count, precision, recall and F1 of each kind of entity.

    Args:
      truth: (kind, location) of each entity; the location may be anything that identifies it.
      predicted: likewise; those that are also in `truth` are correct.
    """
    true, found = Counter(dict.fromkeys(truth, 1)), Counter(dict.fromkeys(predicted, 1))
    counts = [Counter(kind for kind, _ in side) for side in (true, found, true & found)]
    rows = []
    for kind in sorted(counts[0] | counts[1]):
        count, said, right = (side[kind] for side in counts)
        precision, recall = right / said if said else 0.0, right / count if count else 0.0
        f1 = 2 * right / (count + said)
        rows.append(
            {"label": kind, "count": count, "precision": precision, "recall": recall, "f1": f1}
        )
    return rows


def worst(
    losses: np.ndarray,
    valid: np.ndarray,
    row: Callable[[int], Record],
    scores: np.ndarray | None = None,
) -> list[Record]:
    """Returns the results of `row` for the examples with the largest losses, with the loss of each.

    Args:
      losses: [N].
      valid: [N], 1 for a real example.
      row: returns the displayed values of example i.
      scores: [N], if given: the lowest scores come first, equal ones by their losses.
    """
    real = np.flatnonzero(valid > 0)
    keys = [-losses[real]] + ([] if scores is None else [scores[real]])
    order = real[np.lexsort(keys)][:WORST]
    return [{**row(int(index)), "loss": float(losses[index])} for index in order]


def samples(valid: np.ndarray, row: Callable[[int], Record]) -> list[Record]:
    """Returns what `row` says of a few examples, evenly spread; arguments as of `worst`."""
    real = np.flatnonzero(valid > 0)
    places = np.linspace(0, len(real) - 1, min(SAMPLES, len(real))).round().astype(int)
    return [row(int(index)) for index in real[places]]


def shortened(text: str) -> str:
    """Returns a text of at most LONGEST characters."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."
