"""Sections of long texts, to hold out a part of a single record, such as a book without blank
lines.

The text of all records is cut into sections of about the same length, at lines, sentences or else
spaces. Some of them, drawn by a hash of their numbers, are held out; the sections between them stay
together, so that the rest of a book is as coherent as possible.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import numpy as np

from fmjax.contracts import Record, Source
from fmjax.data.characters import is_mark
from fmjax.data.records import RecordSource, held_count, scrambled

SECTION = 1000  # minimum characters per section, if that leaves one to hold out
SHORTEST = 20  # mean characters per section
MOST_HELD = 10  # sections
# A text is cut after a match of one of these, the best first.
BORDERS = {
    "lines": re.compile(r"\n+"),
    "sentences": re.compile(r"[.!?…][\"'”’)\]]*\s+|[。！？][」』”’）]*"),
    "spaces": re.compile(r"\s+"),
}


class Span(NamedTuple):
    """A part of a record's text: the record's number, its first and one-past-last character."""

    number: int
    begin: int
    end: int


class Spans(RecordSource):
    """Parts of the texts of a source whose only column is `text`, without white space around them.

    `mark` is added to the fingerprint.
    """

    def __init__(self, source: Source, spans: list[Span], mark: Record):
        self.source, self.spans, self.mark, self.columns = source, spans, mark, source.columns

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Record:
        record, begin, end = self.spans[index]
        return {"text": self.source[record]["text"][begin:end].strip()}

    def where(self, index: int) -> str:
        record, begin, end = self.spans[index]
        return f"{self.source.where(record)} (characters {begin:,} to {end:,})"

    def fingerprint(self) -> Record:
        return self.source.fingerprint() | self.mark


def needs_sections(source: Source, share: float) -> bool:
    """Returns whether texts must be cut to hold out the given fraction."""
    return (
        tuple(source.columns) == ("text",)
        and 0 < share < 1
        and held_count(len(source), share) is None
    )


def hold_out_sections(source: Source, share: float) -> tuple[Spans, Spans, str] | None:
    """Splits off a fraction of a source's text. Returns the rest, the held-out text, and a line
    that says how it was cut; None if the text has fewer than 40 characters."""
    texts = [source[index]["text"] for index in range(len(source))]
    ends = np.cumsum([len(text) for text in texts])
    total = int(ends[-1])
    held = max(1, min(MOST_HELD, int(share * total / SECTION)))
    count = min(max(2, round(held / share)), total // SHORTEST)
    if count < 2:
        return None
    places, how = borders(texts, ends, count)
    count = len(places) - 1
    chosen = set(np.argsort(scrambled(count), kind="stable")[: min(held, count - 1)].tolist())
    parts: tuple[list[Span], list[Span]] = ([], [])
    for is_held, group in itertools.groupby(range(count), key=chosen.__contains__):
        numbers = list(group)
        parts[is_held].extend(spans_of(texts, ends, places[numbers[0]], places[numbers[-1] + 1]))
    if not all(parts):  # only white space on one side
        return None
    mark: Record = {"hold_out": share, "sections": count}
    rest, out = (
        Spans(source, spans, mark | {"part": part})
        for spans, part in zip(parts, ("rest", "held"), strict=True)
    )
    size = sum(end - begin for _, begin, end in out.spans)
    records = "record" if len(texts) == 1 else "records"
    note = (
        f"data.hold_out={share}: the training data has {len(texts)} {records}, so the text is cut "
        f"at {how} into {count} sections; {len(chosen)} {'is' if len(chosen) == 1 else 'are'} held "
        f"out for validation, {size:,} of {total:,} characters; neighbors stay joined, "
        f"which makes {len(rest)} train and {len(out)} validation records"
    )
    return rest, out, note


def borders(texts: list[str], ends: np.ndarray, count: int) -> tuple[list[int], str]:
    """Returns the begins of sections, and the end of the last one, in characters of all texts, and
    what they were cut at."""
    total = int(ends[-1])
    reach = max(1, total // count // 2)  # how far a border may move
    places, used = [0], {"records": 0} | dict.fromkeys(BORDERS, 0) | {"characters": 0}
    for number in range(1, count):
        wanted = number * total // count
        index = int(np.searchsorted(ends, wanted, side="right"))
        start = int(ends[index]) - len(texts[index])
        near = [place for place in (start, int(ends[index])) if abs(place - wanted) < reach]
        name, place = "records", near[0] if near else 0
        if not near:
            name, inside = best_border(texts[index], wanted - start, reach)
            place = start + inside
        if places[-1] < place < total:
            places.append(place)
            used[name] += 1
    return [*places, total], " and ".join(name for name, times in used.items() if times)


def best_border(text: str, wanted: int, reach: int) -> tuple[str, int]:
    """Returns the best kind of cut near a position, and its place."""
    begin, end = max(wanted - reach, 0), min(wanted + reach, len(text))
    for name, border in BORDERS.items():
        found = [match.end() for match in border.finditer(text, begin, end)]
        if found:
            return name, min(found, key=lambda place: abs(place - wanted))
    while wanted < len(text) and is_mark(text[wanted]):
        wanted += 1
    return "characters", wanted


def spans_of(texts: list[str], ends: np.ndarray, begin: int, end: int) -> list[Span]:
    """Returns the parts of records, those that are not blank, between two places in all texts."""
    spans = []
    for index in range(int(np.searchsorted(ends, begin, side="right")), len(texts)):
        start = int(ends[index]) - len(texts[index])
        if start >= end:
            break
        span = Span(index, max(begin - start, 0), min(end - start, len(texts[index])))
        if texts[index][span.begin : span.end].strip():
            spans.append(span)
    return spans
