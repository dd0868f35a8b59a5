"""Simple baselines for texts with one label, which a working Transformer should beat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer

from fmjax.metrics import classes as class_metrics

NEVER = -1e4  # the log-probability of a label that the training data lack
Records = Sequence[Mapping[str, Any]]


def around(record: Mapping[str, Any], reach: int = 3, mask: str = "[MASK]") -> dict[str, int]:
    """Returns features of the words beside the mask: each word with its distance, and the pair that
    encloses the mask.
    """
    words = record["text"].lower().split()
    place = next((index for index, word in enumerate(words) if mask.lower() in word), 0)
    near = {
        step: words[place + step] if 0 <= place + step < len(words) else ""
        for step in range(-reach, reach + 1)
        if step
    }
    return {f"{step}:{word}": 1 for step, word in near.items()} | {f"{near[-1]}|{near[1]}": 1}


def logistic_regression(features: Pipeline, train: Records, test: Records) -> dict[str, float]:
    """Returns the metrics of logistic regression on the given features."""
    classes = sorted({record["label"] for record in train})
    model = make_pipeline(features, LogisticRegression(max_iter=1000))
    model.fit(train, [record["label"] for record in train])
    return judge(model.predict_log_proba(test), classes, test)


def majority(train: Records, test: Records) -> dict[str, float]:
    """Returns the metrics of always predicting the most frequent label; its scores are the label
    frequencies.
    """
    counts = Counter(record["label"] for record in train)
    classes = sorted(counts)
    scores = np.log([[counts[name] / len(train) for name in classes]] * len(test))
    return judge(scores, classes, test)


def judge(scores: np.ndarray, classes: list[str], test: Records) -> dict[str, float]:
    """Returns classification metrics of log-probabilities [N,C].

    A label that is not among the classes counts as never predicted.
    """
    new = sorted({record["label"] for record in test} - set(classes))
    known = [*classes, *new]
    scores = np.concatenate([scores, np.full((len(test), len(new)), NEVER)], axis=1)
    labels = np.array([known.index(record["label"]) for record in test])
    return class_metrics.classification(scores.astype(np.float32), labels, np.ones(len(test)))


def tfidf() -> Pipeline:
    """TF-IDF of words and pairs of words."""
    texts = FunctionTransformer(lambda records: [record["text"] for record in records])
    return make_pipeline(texts, TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2))


def positions() -> Pipeline:
    """The words beside the mask, with their distances."""
    return make_pipeline(
        FunctionTransformer(lambda records: [around(record) for record in records]),
        DictVectorizer(),
    )
