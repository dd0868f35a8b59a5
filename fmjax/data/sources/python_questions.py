"""Questions about paragraphs that need no files: which words were removed from a sentence of
Python's manual?

The context is a paragraph of the embedded corpus. The question is one of its sentences in which
"what" replaces a few words, which are the answer. So the task is to find the sentence and compare;
no annotation is needed.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys

from fmjax.contracts import Record
from fmjax.data.records import RecordSource
from fmjax.data.sources.kinds import SourceKind
from fmjax.data.sources.prepositions import lot
from fmjax.data.sources.python_docs import documents

WORDS = (25, 120)  # minimum and maximum words of a context
SENTENCE = re.compile(r"(?<=\S\s)\S.*?[.?!](?=\s|$)|^.+?[.?!](?=\s|$)")
WORD = re.compile(r"[A-Za-z][\w-]*")


def question(file: str, context: str) -> Record | None:
    """Returns a question about one to three words of a sentence of the context, drawn by a hash of
    the text. None if no sentence has six words."""
    found = [
        sentence for sentence in SENTENCE.finditer(context) if len(WORD.findall(sentence[0])) >= 6
    ]
    if not found:
        return None
    drawn = int.from_bytes(lot({"text": context}, 0)[:8], "big")
    sentence = found[drawn % len(found)]
    words = list(WORD.finditer(context, *sentence.span()))
    length = 1 + drawn // 97 % 3
    first = drawn // 1009 % (len(words) - length + 1)
    begin, end = words[first].start(), words[first + length - 1].end()
    asked = context[sentence.start() : begin] + "what" + context[end : sentence.end()]
    answers = {"text": [context[begin:end]], "answer_start": [begin]}
    name = lot({"text": context}, 0).hex()[:16]
    return {
        "id": name,
        "file": file,
        "context": context,
        "question": asked.strip(),
        "answers": answers,
    }


@functools.cache
def questions(split: str) -> tuple[Record, ...]:
    """Returns a question about each paragraph of a split that has the right length."""
    paragraphs = [
        (file, paragraph) for file, text in documents(split) for paragraph in text.split("\n")
    ]
    asked = [
        question(file, text)
        for file, text in paragraphs
        if WORDS[0] <= len(text.split()) <= WORDS[1]
    ]
    return tuple({record["context"]: record for record in asked if record}.values())


class PythonQuestions(RecordSource):
    """The questions of a split as a source of records, as SQuAD's.

    Raises UserError for an unknown split.
    """

    columns = ("id", "file", "context", "question", "answers")

    def __init__(self, files: None, split: str):
        self.split = split
        self.records = questions(split)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def where(self, index: int) -> str:
        return f"python_questions {self.split} record {index} ({self.records[index]['file']})"

    def fingerprint(self) -> Record:
        digest = hashlib.sha256(
            "\0".join(r["question"] + r["context"] for r in self.records).encode()
        )
        version = ".".join(map(str, sys.version_info[:3]))
        return {
            "source": "python_questions",
            "split": self.split,
            "python": version,
            "sha256": digest.hexdigest(),
        }


SOURCES = (SourceKind("python_questions", PythonQuestions, reads="nothing"),)
