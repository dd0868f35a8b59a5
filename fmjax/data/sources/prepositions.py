"""A task whose labels come from the text itself: predicting which preposition [MASK] replaces in a
window of the corpus.

It measures the gain of pretraining with few labels. The low-label setting is artificial, since
every preposition is a label.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

from fmjax.contracts import Record
from fmjax.data.records import RecordSource
from fmjax.data.sources.kinds import SourceKind, check_split
from fmjax.data.sources.python_docs import SPLITS, Document, documents
from fmjax.errors import UserError

LABELS = ("as", "at", "by", "for", "from", "in", "of", "on", "to", "with")
MASK = "[MASK]"

# Quoted words are left out: they are keywords of Python.
PREPOSITION = re.compile(rf"(\(?)({'|'.join(LABELS)})([,.;:)]*)", re.IGNORECASE)


class Splits(NamedTuple):
    """The drawn examples by split, and the number of examples in the files of each split."""

    examples: dict[str, list[dict[str, str]]]
    free: dict[str, int]


def prepositions(
    corpus: Iterable[Document], max_words: int = 18, min_words: int = 4
) -> list[dict[str, str]]:
    """Returns an example for each preposition: `text` in which a mask replaces it, `label`, and
    `file`.

    The text is a window of at most `max_words` words around it, from a document with at least
    `min_words`. No text occurs twice.
    """
    found: dict[str, dict[str, str]] = {}
    for file, text in corpus:
        words = text.split()
        if len(words) < min_words:
            continue
        for place, word in enumerate(words):
            if match := PREPOSITION.fullmatch(word):
                before, label, after = match.groups()
                begin = max(0, min(place - max_words // 2, len(words) - max_words))
                window = [
                    *words[begin:place],
                    before + MASK + after,
                    *words[place + 1 : begin + max_words],
                ]
                masked = " ".join(window)
                found.setdefault(masked, {"text": masked, "label": label.lower(), "file": file})
    return list(found.values())


@functools.cache
def preposition_splits(
    train: int = 3000, validation: int = 500, test: int = 3000, seed: int = 0
) -> Splits:
    """Returns examples drawn from the files of each split of the embedded corpus.

    A held-out text that also occurs in the training files is dropped, whether or not it was drawn
    there. Raises UserError if a split has fewer examples than requested.
    """
    wanted = dict(zip(SPLITS, (train, validation, test), strict=True))
    every = {split: prepositions(documents(split)) for split in SPLITS}
    seen = {example["text"] for example in every["train"]}
    drawn = {}
    for split, count in wanted.items():
        pool = [
            example for example in every[split] if split == "train" or example["text"] not in seen
        ]
        if count > len(pool):
            raise UserError(
                f"prepositions: {split}={count} examples are more than the {len(pool)} in the "
                "corpus; request fewer"
            )
        drawn[split] = sorted(pool, key=lambda example: lot(example, seed))[:count]
    return Splits(drawn, {split: len(examples) for split, examples in every.items()})


def lot(example: dict[str, str], seed: int) -> bytes:
    """Returns an example's sort key for the draw, which is the same in every version of Python."""
    return hashlib.sha256(f"{seed}\0{example['text']}".encode()).digest()


class Prepositions(RecordSource):
    """The drawn examples of a split as a source of records.

    Raises UserError for an unknown split.
    """

    columns = ("text", "label", "file")

    def __init__(self, files: None, split: str):
        check_split("prepositions", split, SPLITS)
        self.split = split
        self.examples = preposition_splits().examples[split]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Record:
        return self.examples[index]

    def where(self, index: int) -> str:
        return f"prepositions {self.split} record {index} ({self.examples[index]['file']})"

    def fingerprint(self) -> Record:
        digest = hashlib.sha256(
            "\0".join(f"{e['text']}\0{e['label']}" for e in self.examples).encode()
        )
        version = ".".join(map(str, sys.version_info[:3]))
        return {
            "source": "prepositions",
            "split": self.split,
            "python": version,
            "sha256": digest.hexdigest(),
        }


SOURCES = (SourceKind("prepositions", Prepositions, reads="nothing"),)
