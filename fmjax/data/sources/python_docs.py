"""The embedded corpus: the English of Python's own manual and of the standard library's docstrings,
read offline.

The manual is `pydoc_data.topics`; docstrings are read with `ast`, so no module is imported. A fifth
of the files is held out, for validation and test, by a hash of the file's name; a text that also
occurs in training files is not held out. The texts differ between versions of Python, so the
fingerprint contains the version.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

from fmjax.contracts import Record
from fmjax.data.records import RecordSource
from fmjax.data.sources.kinds import SourceKind, check_split
from fmjax.errors import UserError

SPLITS = ("train", "validation", "test")

# Folders of the library path that are not part of the library, contain tests, or are packaged
# separately on some systems.
SKIPPED = frozenset(
    (
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "turtledemo",
        "site-packages",
        "dist-packages",
    )
)
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
RULER = re.compile(r"\s*([*=~^#\"_+-])\1{2,}\s*")
# Fraction of letters and spaces below which a paragraph is considered a table, a signature or code.
LETTERS = 0.75


class Document(NamedTuple):
    """A docstring or a topic of the manual, one paragraph per line, and the file it comes from."""

    file: str
    text: str


def split_of(file: str) -> str:
    """Returns the split of a file: of twenty files, one is in "validation", three in "test", the
    others in "train"."""
    lot = int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big") % 20
    return "validation" if lot == 0 else "test" if lot < 4 else "train"


@functools.cache
def documents(split: str = "") -> tuple[Document, ...]:
    """Returns the documents of a split, or of all splits, in the order of their file names. No text
    occurs twice.

    Raises UserError for an unknown split, and if this Python comes without the sources of its
    library.
    """
    if split:
        check_split("python_docs", split, SPLITS)
        return tuple(document for document in documents() if split_of(document.file) == split)
    collecting = gc.isenabled()
    # Trees have no cycles, and collecting garbage with JAX loaded takes half as long again.
    gc.disable()
    try:
        return unique(Document(file, text) for file, raw in texts() if (text := clean(raw)))
    finally:
        if collecting:
            gc.enable()


def unique(found: Iterable[Document]) -> tuple[Document, ...]:
    """Returns the documents without repetition, by file; if a text is on both sides, only training
    files keep it."""
    first: dict[str, Document] = {}
    for document in sorted(found, key=lambda document: split_of(document.file) != "train"):
        first.setdefault(" ".join(document.text.casefold().split()), document)
    return tuple(sorted(first.values(), key=lambda document: document.file))


def texts() -> Iterator[tuple[str, str]]:
    """Yields (file, text): each topic of the manual, and each docstring of the standard library."""
    for name, text in sorted(topics.topics.items()):
        yield f"topics/{name}", text
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)
    )
    if not files:
        raise UserError(
            f"{root} does not contain the source files of Python's standard library, the embedded "
            "corpus; set data.files instead"
        )
    for path in files:
        for text in docstrings(path.read_bytes()):
            yield path.relative_to(root).as_posix(), text


def docstrings(source: bytes) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and functions; nothing for invalid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old escapes in the library's own strings
            nodes: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError):
        return
    while nodes:
        node = nodes.pop()
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
        # Only statements contain definitions: expressions, most of a tree, are not visited.
        for block in ("finalbody", "orelse", "handlers", "body"):
            nodes.extend(reversed(getattr(node, block, [])))


def clean(text: str) -> str:
    """Returns the prose of a text, one paragraph per line, without doctests, grammars, tables and
    code."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if ">>>" in block or "::=" in block:
            continue
        words = [
            word for line in block.split("\n") if not RULER.fullmatch(line) for word in line.split()
        ]
        paragraph = " ".join(words)
        plain = sum(character.isalpha() or character == " " for character in paragraph)
        if words and plain >= LETTERS * len(paragraph):
            paragraphs.append(paragraph)
    return "\n".join(paragraphs)


class PythonDocs(RecordSource):
    """The embedded corpus as a source of records: `text`, and the `file` it comes from.

    Raises UserError for an unknown split.
    """

    columns = ("text", "file")

    def __init__(self, files: None, split: str):
        self.split = split
        self.documents = documents(split)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Record:
        return self.documents[index]._asdict()

    def where(self, index: int) -> str:
        return f"python_docs {self.documents[index].file}"

    def fingerprint(self) -> Record:
        digest = hashlib.sha256("\0".join(document.text for document in self.documents).encode())
        version = ".".join(map(str, sys.version_info[:3]))
        return {
            "source": "python_docs",
            "split": self.split,
            "python": version,
            "sha256": digest.hexdigest(),
        }


SOURCES = (SourceKind("python_docs", PythonDocs, reads="nothing"),)
