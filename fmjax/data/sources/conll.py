"""Tagged words in CoNLL's format: per line a token, other fields, and its tag; a blank line ends a
sentence."""

from __future__ import annotations

from collections.abc import Iterator

from fmjax.contracts import Record
from fmjax.data.sources.kinds import SourceKind
from fmjax.data.sources.lines import RecordFiles
from fmjax.data.storage.mapped import File, lines
from fmjax.data.stream.tolerance import tolerates
from fmjax.errors import RecordError

DOCUMENT = "-DOCSTART-"
UNTAGGED = "has one field, not a token and its tag; correct the line, or leave it blank"


class Conll(RecordFiles):
    """Sentences as `{"tokens": [...], "tags": [...]}`, from the first and the last field of each
    line.

    Fields are separated by tabs, or by white space in lines without tabs. Lines that begin with
    -DOCSTART- are left out.
    """

    kind = "conll"
    columns = ("tokens", "tags")

    def scan(self, file: File) -> Iterator[tuple[int, int]]:
        begin = end = 0  # of the sentence being gathered; equal if there is none
        for line in lines(file):
            if line.text.strip() and not line.text.startswith(DOCUMENT):
                if (
                    len(line.text.split(None, 1)) < 2
                    and len(fields(line.text)) < 2
                    and not tolerates()
                ):
                    raise RecordError(f"{file.path} line {line.number}", UNTAGGED)
                begin = line.begin if begin == end else begin
                end = line.end
            elif begin < end:
                yield begin, end
                begin = end
        if begin < end:
            yield begin, end

    def parse(self, text: str, index: int) -> Record:
        rows = [fields(line) for line in text.split("\n") if line.strip()]
        if any(len(row) < 2 for row in rows):
            raise RecordError(self.where(index), UNTAGGED, index)
        return {"tokens": [row[0] for row in rows], "tags": [row[-1] for row in rows]}


def fields(line: str) -> list[str]:
    """Returns the fields of a line."""
    line = line.rstrip("\r\n")
    return [part.strip() for part in line.split("\t")] if "\t" in line else line.split()


SOURCES = (SourceKind("conll", Conll, extensions=(".conll", ".bio")),)
