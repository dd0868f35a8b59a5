"""Simple baselines on the data of a run, which a working Transformer should beat.

A floor is a function (Sight) -> metrics, with the names that the run's task uses. It sees the
training data, and the data that the run is evaluated on.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import SGDClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from fmjax.contracts import Record, Source
from fmjax.data.kinds import image
from fmjax.errors import UserError
from fmjax.examples import baselines
from fmjax.inference.pretrained import Pretrained
from fmjax.metrics import answers, classes, entities, texts
from fmjax.tasks import classify, image_classify, qa, seq2seq, tag

Metrics = dict[str, float]
T = TypeVar("T")
SENTENCE_ENDS = ".?!"


class Sight(NamedTuple):
    """What a floor sees: a run, for its task and processors, and its data."""

    run: Pretrained
    train: Source
    test: Source


Floor = Callable[[Sight], Metrics]


def task_of(sight: Sight, kind: type[T]) -> T:
    """Returns the run's task. Raises UserError if the floor is for tasks of another kind."""
    if not isinstance(sight.run.task, kind):
        given = type(sight.run.task).__module__.rpartition(".")[2]
        raise UserError(f"a floor of a claim is not for the task {given}; name another")
    return sight.run.task


def records(source: Source) -> Iterator[Record]:
    """Yields the records of a source."""
    return (source[index] for index in range(len(source)))


def labeled(sight: Sight, source: Source) -> list[dict[str, str]]:
    """Returns the texts and labels of a classification task, as `text` and `label`."""
    task = task_of(sight, classify.Task)
    rows = [
        {"text": " ".join(str(row[name]) for name in task.texts), "label": str(row[task.label])}
        for row in records(source)
    ]
    return [row for row in rows if row["text"].strip() or task.blank != "drop"]


def majority(sight: Sight) -> Metrics:
    """The most frequent label."""
    return baselines.majority(labeled(sight, sight.train), labeled(sight, sight.test))


def regression(features: Callable[[], Pipeline]) -> Floor:
    """Returns logistic regression on features of texts."""

    def floor(sight: Sight) -> Metrics:
        train, test = labeled(sight, sight.train), labeled(sight, sight.test)
        return baselines.logistic_regression(features(), train, test)

    return floor


def characters() -> Pipeline:
    """TF-IDF of one to three characters."""
    read = FunctionTransformer(lambda rows: [row["text"] for row in rows])
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True, min_df=2)
    return make_pipeline(read, vectors)


def tfidf_similarity(sight: Sight) -> Metrics:
    """The cosine of the TF-IDF of two texts, scaled to the range of the scores."""
    task = task_of(sight, classify.Task)

    def column(source: Source, name: str) -> list[str]:
        return [str(row[name]) for row in records(source)]

    vectors = TfidfVectorizer(sublinear_tf=True)
    vectors.fit([text for name in task.texts for text in column(sight.train, name)])
    first, *other = (vectors.transform(column(sight.test, name)) for name in task.texts)
    cosine = np.asarray(first.multiply(other[0] if other else first).sum(axis=1)).ravel()
    scores = np.array([float(row[task.label]) for row in records(sight.test)])
    guess = cosine * scores.max()
    return classes.regression(guess.astype(np.float32), scores, np.ones(len(scores)))


def bigrams(sight: Sight) -> Metrics:
    """A character given the one before it, with one count added to each pair; nats per
    character."""
    train, test = ("".join(str(row["text"]) for row in records(part)) for part in sight[1:])
    known = {letter: at for at, letter in enumerate(sorted({*train, *test}))}
    counts = np.ones((len(known), len(known)))
    ids = [np.array([known[letter] for letter in text]) for text in (train, test)]
    np.add.at(counts, (ids[0][:-1], ids[0][1:]), 1)
    logs = np.log(counts / counts.sum(axis=1, keepdims=True))
    loss = -float(logs[ids[1][:-1], ids[1][1:]].mean())
    return {"loss": loss, "perplexity": math.exp(loss)}


def pixels(sight: Sight) -> Metrics:
    """Logistic regression on pixels, by stochastic gradient descent."""
    train, labels = pixels_of(sight, sight.train)
    scale = StandardScaler(copy=False)
    model = SGDClassifier(loss="log_loss", alpha=1e-3, average=True, max_iter=10, tol=None)
    model.set_params(random_state=0)
    model.fit(scale.fit_transform(train), labels)
    test, truth = pixels_of(sight, sight.test)
    scores = model.decision_function(scale.transform(test)).astype(np.float32)
    return classes.classification(scores, truth, np.ones(len(truth)))


def pixels_of(sight: Sight, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels [N,D] and the labels [N] of images."""
    task, processor = task_of(sight, image_classify.Task), sight.run.processors.of(image.Processor)
    names = {name: at for at, name in enumerate(map(str, task.labels))}
    rows = range(len(source))
    found = [
        processor.resized(source.value(row, task.image), source.where(row)).ravel() for row in rows
    ]
    labels = [names[str(source.value(row, task.label))] for row in rows]
    return np.stack(found).astype(np.float32), np.array(labels)


def frequent_tags(sight: Sight) -> Metrics:
    """The most frequent tag of each character or word in the training data."""
    task = task_of(sight, tag.Task)
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for index in range(len(sight.train)):
        for token, label in zip(*task.read(sight.train[index], ""), strict=True):
            counts[token][label] += 1
    best = {token: found.most_common(1)[0][0] for token, found in counts.items()}
    usual = sum(counts.values(), Counter()).most_common(1)[0][0]
    read = [task.read(sight.test[index], "") for index in range(len(sight.test))]
    guess = [[best.get(token, usual) for token in tokens] for tokens, _ in read]
    return entities.scores([tags for _, tags in read], guess)


def similar_sentence(sight: Sight) -> Metrics:
    """The sentence of the passage that is most similar to the question, by TF-IDF."""
    task = task_of(sight, qa.Task)
    rows = list(records(sight.test))
    vectors = TfidfVectorizer(sublinear_tf=True)
    vectors.fit([str(row[task.context]) for row in records(sight.train)])
    given = []
    for row in rows:
        parts = sentences(str(row[task.context]))
        near = vectors.transform(parts) @ vectors.transform([str(row[task.question])]).T
        given.append(parts[int(near.toarray().argmax())])
    known = [task.answers_of(sight.test, index) for index in range(len(rows))]
    return answers.answers(given, known)


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text, at least one."""
    found, begin = [], 0
    for at in range(1, len(text)):
        if text[at] == " " and text[at - 1] in SENTENCE_ENDS:
            found.append(text[begin:at])
            begin = at + 1
    return [*found, text[begin:]]


def neighbor(sight: Sight) -> Metrics:
    """The target of the training pair whose source is most similar, by TF-IDF."""
    task = task_of(sight, seq2seq.Task)
    sources, targets, asked, wanted = (
        [str(row[name]) for row in records(part)]
        for part in (sight.train, sight.test)
        for name in (task.source, task.target)
    )
    vectors = TfidfVectorizer(sublinear_tf=True)
    known, new = vectors.fit_transform(sources), vectors.transform(asked)
    near = [int((row @ known.T).toarray().argmax()) for row in new]
    guess = [targets[at] for at in near]
    return texts.texts(task.scores, guess, wanted, task.bleu_tokenize)


# How tables call them, and the functions.
FLOORS: dict[str, tuple[str, Floor]] = {
    "majority": ("majority label", majority),
    "tfidf": ("TF-IDF + logistic regression", regression(baselines.tfidf)),
    "tfidf_characters": ("TF-IDF of characters + logistic regression", regression(characters)),
    "positions": ("words beside the blank + logistic regression", regression(baselines.positions)),
    "tfidf_similarity": ("cosine of TF-IDF", tfidf_similarity),
    "bigrams": ("pairs of characters", bigrams),
    "pixels": ("logistic regression on pixels", pixels),
    "frequent_tags": ("most frequent tag of a character", frequent_tags),
    "similar_sentence": ("sentence most similar to the question", similar_sentence),
    "neighbor": ("translation of the nearest training sentence", neighbor),
}
