"""A part of the embedded corpus: reading all of it, and training tokenizers on it, takes seconds."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

from fmjax.data.sources import (
    prepositions,
    python_docs,
    python_names,
    python_questions,
    python_sentences,
)

CACHES = (
    python_docs.documents,
    python_names.sentences,
    python_questions.questions,
    python_sentences.neighbors,
    python_sentences.labeled,
    python_sentences.choices,
)


@contextlib.contextmanager
def small() -> Iterator[None]:
    """Has only the topics of the manual in the corpus, and 80 sentences with prepositions."""
    from pydoc_data import topics

    found = [(f"topics/{name}", text) for name, text in sorted(topics.topics.items())]
    few = functools.partial(prepositions.preposition_splits, 40, 20, 20)
    forget()
    with (
        mock.patch.object(python_docs, "texts", lambda: iter(found)),
        mock.patch.object(prepositions, "preposition_splits", few),
    ):
        try:
            yield
        finally:
            forget()


def forget() -> None:
    """Lets go of what was read: in part here, or whole elsewhere."""
    for cache in CACHES:
        cache.cache_clear()
