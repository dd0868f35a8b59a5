"""Exact match and F1 of answers as in SQuAD's official evaluation, versions 1.1 and 2.0, from 0 to
100.

Answers are compared without case, punctuation, the articles a, an, the, and with single spaces. The
score of an answer is that with the best of the question's references (Rajpurkar et al. 2016,
section 6.1; 2018, section 4 for questions without one).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fmjax.contracts import Measures
from fmjax.errors import UserError

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
ANSWERS: Measures = {"exact_match": "max", "f1": "max"}
# For data in which some questions have no answer.
HAS_ANSWER: Measures = {f"has_answer_{name}": best for name, best in ANSWERS.items()}
NO_ANSWER = "no_answer_exact_match"
PARTS: Measures = {**HAS_ANSWER, NO_ANSWER: "max"}


def normalised(answer: str) -> str:
    """Returns an answer in the form that is compared."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """Returns 1 if both are the same, else 0."""
    return float(normalised(answer) == normalised(reference))


def f1(answer: str, reference: str) -> float:
    """Returns the F1 of the answer's words, counted with multiplicity."""
    given, wanted = normalised(answer).split(), normalised(reference).split()
    same = sum((Counter(given) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(given), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def counted(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns the references that count: where some questions have no answer, version 2.0 does not
    count those of which nothing is left to compare.
    """
    unanswerable = not all(references)
    return [
        [text for text in texts if normalised(text)] if unanswerable else list(texts)
        for texts in references
    ]


def each(given: Sequence[str], kept: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns the exact match and F1 of each answer, [N,2], from 0 to 1; `kept` as `counted` has
    them.
    """
    scores = np.zeros((len(given), 2))
    for row, answer, texts in zip(scores, given, kept, strict=True):
        if texts:
            row[:] = (
                max(exact_match(answer, text) for text in texts),
                max(f1(answer, text) for text in texts),
            )
        else:
            row[:] = not normalised(answer)
    return scores


def answers(given: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the mean exact match and F1 over questions. Each has references, or none if it has no
    answer.

    "" means no answer. If some questions have no answer, both are also computed over those with and
    those without an answer (where F1 equals exact match). Raises UserError if there is no question.
    """
    if not references or len(given) != len(references):
        raise UserError(
            f"evaluation: {len(given)} answers to {len(references)} questions; pass one answer per "
            "question, and at least one"
        )
    unanswerable, kept = not all(references), counted(references)
    scores = each(given, kept)
    values = dict(zip(ANSWERS, 100 * scores.mean(axis=0), strict=True))
    answered = np.array([bool(texts) for texts in kept])
    if unanswerable and answered.any():
        values |= dict(zip(HAS_ANSWER, 100 * scores[answered].mean(axis=0), strict=True))
    if unanswerable:
        values[NO_ANSWER] = 100 * scores[~answered, 0].mean()
    return {name: float(value) for name, value in values.items()}
