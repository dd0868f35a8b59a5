"""Tagged words in CoNLL's format: per line a token, other fields, and its tag; a blank line ends a
sentence."""

from __future__ import annotations

from collections.abc import Iterator

from fmjax.contracts import Record
from fmjax.data.characters import BLANKS, is_blank, split_fields
from fmjax.data.sources.kinds import SourceKind
from fmjax.data.sources.lines import RecordFiles
from fmjax.data.storage.mapped import File, lines
from fmjax.data.stream.tolerance import tolerates
from fmjax.errors import RecordError

DOCUMENT = "-DOCSTART-"
BROKEN = "has a carriage return inside; end each line with a line feed"
UNTAGGED = "has one field, not a token and its tag; correct the line, or leave it blank"


class Conll(RecordFiles):
    """Sentences as `{"tokens": [...], "tags": [...]}`, from the first and the last field of each
    line.

    Fields are separated by tabs, or by ASCII white space in lines without tabs; a no-break space is
    part of a word. Lines that begin with -DOCSTART- are left out.
    """

    kind = "conll"
    columns = ("tokens", "tags")

    def scan(self, file: File, facts: Record) -> Iterator[tuple[int, int]]:
        begin = end = 0  # bounds of the current sentence; equal if there is none
        for line in lines(file):
            if not is_blank(line.text) and not line.text.startswith(DOCUMENT):
                problem = "" if tolerates() else wrong(line.text)
                if problem:
                    raise RecordError(f"{file.path} line {line.number}", problem)
                begin = line.begin if begin == end else begin
                end = line.end
            elif begin < end:
                yield begin, end
                begin = end
        if begin < end:
            yield begin, end

    def parse(self, text: str, index: int) -> Record:
        lines = [line for line in text.split("\n") if not is_blank(line)]
        for problem in filter(None, map(wrong, lines)):
            raise RecordError(self.where(index), problem, index)
        rows = [fields(line) for line in lines]
        return {"tokens": [row[0] for row in rows], "tags": [row[-1] for row in rows]}


def fields(line: str) -> list[str]:
    """Returns the fields of a line."""
    line = line.rstrip("\r\n")
    if "\t" in line:
        return [part.strip(BLANKS) for part in line.split("\t")]
    return split_fields(line)


def wrong(line: str) -> str:
    """Returns what is wrong with a line, or ""."""
    if "\r" in line.rstrip("\r\n"):
        return BROKEN
    return UNTAGGED if len(fields(line)) < 2 else ""


SOURCES = (SourceKind("conll", Conll, extensions=(".conll", ".bio")),)
