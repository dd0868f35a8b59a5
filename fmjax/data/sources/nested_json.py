"""Questions about paragraphs in SQuAD's files, versions 1.1 and 2.0 (Rajpurkar et al. 2016,
arXiv:1606.05250; 2018).

Such a file is one JSON value. It is parsed as a whole when it is first opened, and rewritten into
the cache, with one line per paragraph and its questions. That copy is memory-mapped; memory holds
16 bytes per paragraph, and the last paragraph that was read.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from fmjax.config.json_files import parse_json
from fmjax.contracts import Record, Value
from fmjax.data.records import RecordSource, locate
from fmjax.data.sources.kinds import SourceKind
from fmjax.data.storage import cache
from fmjax.data.storage.mapped import File, lines, plain_name
from fmjax.errors import UserError

T = TypeVar("T")


class Squad(RecordSource):
    """One record per question: `id`, `title` (of the article), `context`, `question` and `answers`,
    a dictionary of the lists `text` and `answer_start` (in characters), empty if the context has no
    answer.

    Raises UserError, naming the place, for a file that is not in SQuAD's format.
    """

    columns = ("id", "title", "context", "question", "answers")

    def __init__(self, paths: Sequence[Path], split: str):
        self.split = split
        self.files = [rewritten(path) for path in paths]
        begins, bounds, firsts = array("q"), array("q", [0]), [0]
        for file in self.files:
            for line in lines(file):
                begins.append(line.begin)
                bounds.append(bounds[-1] + len(json.loads(line.text)["questions"]))
            firsts.append(len(begins))
        # The begin of each paragraph; the number of questions before each paragraph [paragraphs +
        # 1], and of paragraphs before each file.
        self.begins, self.bounds, self.firsts = (
            np.array(begins, np.int64),
            np.array(bounds, np.int64),
            np.array(firsts),
        )
        if not len(self):
            raise UserError(
                f"{', '.join(str(path) for path in paths)}: no questions for {split}; use a file "
                "that contains some"
            )
        # A paragraph and its number: questions are often read in order.
        self.last: tuple[int, Record] = (-1, {})
        self.fingerprint()  # computed now, before the files can change

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: int) -> Record:
        number, own = locate(self.bounds, index)
        paragraph = self.paragraph(number)
        record = paragraph | paragraph["questions"][own]
        return {name: record[name] for name in self.columns}

    def paragraph(self, number: int) -> Record:
        """Returns a paragraph: `title`, `context` and `questions`."""
        last, found = self.last  # read once, since other threads may change it
        if last != number:
            file, begin = self.files[locate(self.firsts, number)[0]], int(self.begins[number])
            found = json.loads(file.data[begin : file.data.find(b"\n", begin)])
            self.last = number, found
        return found

    def where(self, index: int) -> str:
        record = self[index]
        return f'question {record["id"]} of "{record["title"]}"'

    def fingerprint(self) -> Record:
        return {
            "source": "squad",
            "split": self.split,
            "files": [file.fingerprint for file in self.files],
        }


def rewritten(path: Path) -> File:
    """Returns a file's paragraphs as JSON lines in the cache.

    Raises UserError if it cannot be read or is malformed.
    """

    def make(stream: BinaryIO) -> None:
        for paragraph in paragraphs(File(path)):
            stream.write(json.dumps(paragraph).encode() + b"\n")

    try:
        mark = cache.digest(path)["sha256"][:32]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); correct the file"
        ) from error
    return File(path, cache.get_or_make(Path("squad", mark, f"{plain_name(path)}.jsonl"), make))


def paragraphs(file: File) -> Iterator[Record]:
    """Yields the paragraphs of a file that have questions, in order."""
    try:
        content = parse_json(bytes(file.data))
    except ValueError as error:
        raise UserError(f"{file.path}: is not JSON ({error}); fetch it again") from error
    for article, here in items(content, "data", str(file.path)):
        title = value(article, "title", str, here)
        for paragraph, place in items(article, "paragraphs", here):
            context = value(paragraph, "context", str, place)
            found = [question_of(question, at) for question, at in items(paragraph, "qas", place)]
            if found:
                yield {"title": title, "context": context, "questions": found}


def question_of(question: Value, at: str) -> Record:
    """Returns the question's part of a record.

    Raises UserError, naming the place, if it is malformed.
    """
    answers = list(items(question, "answers", at))
    return {
        "id": value(question, "id", str, at),
        "question": value(question, "question", str, at),
        "answers": {
            "text": [value(answer, "text", str, own) for answer, own in answers],
            "answer_start": [value(answer, "answer_start", int, own) for answer, own in answers],
        },
    }


def items(parent: Value, name: str, at: str) -> Iterator[tuple[Value, str]]:
    """Yields the items of a list in an object, each with its location for messages."""
    for number, item in enumerate(value(parent, name, list, at)):
        yield item, f"{at}, {name}[{number}]"


def value(parent: Value, name: str, kind: type[T], at: str) -> T:
    """Returns a value of a JSON object. Raises UserError if it is missing or of another type."""
    found = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(found, kind):
        raise UserError(
            f'{at}: has no "{name}" ({kind.__name__}), unlike SQuAD\'s files; '
            "correct the file, or convert it to JSON lines"
        )
    return found


SOURCES = (SourceKind("squad", Squad),)
