"""Tagged words that need no files: the names in Python's manual, with BIO tags.

The words of a paragraph of the embedded corpus, with names split at their dots and brackets
removed: which of them are calls, dotted names or constants? The tags follow from the spelling of
the names, so no annotation is needed."""

from __future__ import annotations

import functools
import hashlib
import re
import sys

from fmjax.contracts import Record
from fmjax.data.records import RecordSource
from fmjax.data.sources.kinds import SourceKind
from fmjax.data.sources.python_docs import documents

MOST = 60  # words of a sentence
NAME = re.compile(r"(?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?P<call>\(\))?|\d+|[^\w\s]")


def tagged(paragraph: str) -> dict[str, list[str]]:
    """Returns the words of a paragraph and their tags: CALL, CONSTANT and NAME."""
    tokens: list[str] = []
    tags: list[str] = []
    for found in NAME.finditer(paragraph):
        parts = (found["name"] or found[0]).split(".") if found["name"] else [found[0]]
        name = found["name"] or ""
        kind = (
            "CALL" if found["call"] else "NAME" if len(parts) > 1 or "_" in name.strip("_") else ""
        )
        if not kind and len(name) > 2 and name.isupper():
            kind = "CONSTANT"
        tokens += parts
        tags += [f"{'I' if place else 'B'}-{kind}" if kind else "O" for place in range(len(parts))]
    return {"tokens": tokens, "tags": tags}


@functools.cache
def sentences(split: str) -> tuple[Record, ...]:
    """Returns the tagged paragraphs of a split that contain a name, each with its `file`, in
    order."""
    found = []
    for file, text in documents(split):
        for paragraph in text.split("\n"):
            record = tagged(paragraph)
            if len(record["tokens"]) <= MOST and len(set(record["tags"])) > 1:
                found.append(record | {"file": file})
    return tuple(found)


class PythonNames(RecordSource):
    """The tagged paragraphs of a split as a source of records.

    Raises UserError for an unknown split.
    """

    columns = ("tokens", "tags", "file")

    def __init__(self, files: None, split: str):
        self.split = split
        self.records = sentences(split)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def where(self, index: int) -> str:
        return f"python_names {self.split} record {index} ({self.records[index]['file']})"

    def fingerprint(self) -> Record:
        digest = hashlib.sha256(
            "\0".join(" ".join(r["tokens"] + r["tags"]) for r in self.records).encode()
        )
        version = ".".join(map(str, sys.version_info[:3]))
        return {
            "source": "python_names",
            "split": self.split,
            "python": version,
            "sha256": digest.hexdigest(),
        }


SOURCES = (SourceKind("python_names", PythonNames, reads="nothing"),)
