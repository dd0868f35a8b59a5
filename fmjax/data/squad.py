"""Questions about paragraphs in SQuAD's files, versions 1.1 and 2.0 (Rajpurkar et al. 2016, arXiv:1606.05250; 2018)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fmjax.data.mapped import File
from fmjax.data.records import Record
from fmjax.errors import UserError


class Squad:
    """A record for each question: `id`, `title` (of the article), `context`, `question` and `answers`, a dictionary of the
    lists `text` and `answer_start` (in characters), empty where the context has no answer.

    Raises UserError, naming the place, for a file that is not of SQuAD's format.
    """

    columns = ("id", "title", "context", "question", "answers")

    def __init__(self, paths: Sequence[Path], split: str):
        self.split = split
        self.files = [File(path) for path in paths]
        self.records = [record for file in self.files for record in questions(file)]
        if not self.records:
            raise UserError(f"{', '.join(str(path) for path in paths)}: no questions for {split}; give a file that has some")
        self.fingerprint()  # before anything can change

    def __reduce__(self) -> tuple[type[Squad], tuple[list[Path], str]]:
        return Squad, ([file.path for file in self.files], self.split)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def where(self, index: int) -> str:
        return f'question {self.records[index]["id"]} of "{self.records[index]["title"]}"'

    def fingerprint(self) -> Record:
        return {"source": "squad", "split": self.split, "files": [file.fingerprint for file in self.files]}


def questions(file: File) -> Iterator[Record]:
    """Yields the questions of a file, in order."""
    try:
        content = json.loads(bytes(file.data))
    except ValueError as error:
        raise UserError(f"{file.path}: is not JSON ({error}); fetch it again") from error
    for article, here in items(content, "data", str(file.path)):
        title = value(article, "title", str, here)
        for paragraph, place in items(article, "paragraphs", here):
            context = value(paragraph, "context", str, place)
            for question, at in items(paragraph, "qas", place):
                answers = list(items(question, "answers", at))
                yield {
                    "id": value(question, "id", str, at),
                    "title": title,
                    "context": context,
                    "question": value(question, "question", str, at),
                    "answers": {
                        "text": [value(answer, "text", str, own) for answer, own in answers],
                        "answer_start": [value(answer, "answer_start", int, own) for answer, own in answers],
                    },
                }


def items(parent: Any, name: str, at: str) -> Iterator[tuple[Any, str]]:
    """Yields the items of a list in an object, each with its place for messages."""
    for number, item in enumerate(value(parent, name, list, at)):
        yield item, f"{at}, {name}[{number}]"


def value(parent: Any, name: str, kind: type, at: str) -> Any:
    """Returns a value of a JSON object. Raises UserError if it is not there or of another type."""
    found = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(found, kind):
        raise UserError(f'{at}: has no "{name}" ({kind.__name__}), as SQuAD\'s files have; correct the file, or give jsonl')
    return found
