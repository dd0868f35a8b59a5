"""Small tasks on the embedded corpus that need no files, to try out kinds of labels.

`python_sentences` has the sentences of Python's own manual with the prepositions that occur in each
(several labels) and the number of its words (a number). `python_choices` asks which of four
sentences comes next. All labels follow from the text.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Callable, Sequence

from fmjax.contracts import Record
from fmjax.data.records import RecordSource
from fmjax.data.sources.kinds import SourceKind, check_split
from fmjax.data.sources.prepositions import LABELS, lot
from fmjax.data.sources.python_docs import SPLITS, documents

WORDS = (4, 24)  # minimum and maximum words of a sentence
CHOICES = 4
END = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")


@functools.cache
def neighbors(split: str) -> tuple[tuple[str, str, str], ...]:
    """Returns the file, a sentence and the one after it ("" at the end of a paragraph), in
    order.
    """
    found = []
    for file, text in documents(split):
        for paragraph in text.split("\n"):
            sentences = [one for one in END.split(paragraph) if fits(one)]
            found += [(file, *pair) for pair in zip(sentences, [*sentences[1:], ""], strict=False)]
    return tuple(found)


def fits(sentence: str) -> bool:
    return WORDS[0] <= len(sentence.split()) <= WORDS[1]


@functools.cache
def labeled(split: str) -> tuple[Record, ...]:
    """Returns each sentence once, with `labels`, a list, and `words`, a number."""
    records = {}
    for file, sentence, _ in neighbors(split):
        words = re.findall(r"[a-z]+", sentence.lower())
        labels = [label for label in LABELS if label in words]
        records[sentence] = {
            "text": sentence,
            "labels": labels,
            "words": len(sentence.split()),
            "file": file,
        }
    return tuple(records.values())


@functools.cache
def choices(split: str) -> tuple[Record, ...]:
    """Returns a `context`, four `endings`, and the index of the correct one, drawn by a hash."""
    pairs = [pair for pair in neighbors(split) if pair[2]]
    records = []
    for number, (file, context, following) in enumerate(pairs):
        drawn = int.from_bytes(lot({"text": f"{number}\0{context}"}, 0)[:8], "big")
        others = [
            pairs[(number + 1 + drawn // 97**n % (len(pairs) - 1)) % len(pairs)][2]
            for n in range(1, CHOICES)
        ]
        label = drawn % CHOICES
        endings = [*others[:label], following, *others[label:]]
        records.append({"context": context, "endings": endings, "label": label, "file": file})
    return tuple(records)


class PythonRecords(RecordSource):
    """The records of a split.

    Raises UserError for an unknown split.
    """

    def __init__(self, name: str, read: Callable[[str], Sequence[Record]], split: str):
        check_split(name, split, SPLITS)
        self.name, self.split, self.records = name, split, read(split)
        self.columns = tuple(self.records[0])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def where(self, index: int) -> str:
        return f"{self.name} {self.split} record {index} ({self.records[index]['file']})"

    def fingerprint(self) -> Record:
        digest = hashlib.sha256("\0".join(map(str, self.records)).encode())
        version = ".".join(map(str, sys.version_info[:3]))
        return {
            "source": self.name,
            "split": self.split,
            "python": version,
            "sha256": digest.hexdigest(),
        }


def open_sentences(files: None, split: str) -> PythonRecords:
    return PythonRecords("python_sentences", labeled, split)


def open_choices(files: None, split: str) -> PythonRecords:
    return PythonRecords("python_choices", choices, split)


SOURCES = (
    SourceKind("python_sentences", open_sentences, reads="nothing"),
    SourceKind("python_choices", open_choices, reads="nothing"),
)
