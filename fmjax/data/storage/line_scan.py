"""Finds the lines of a mapped file, and which of them are blank, a megabyte at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fmjax.data.storage.mapped import BOM, MEGABYTE, File, lines
from fmjax.data.stream.tolerance import tolerates

# White space as `str.strip` knows it: single bytes, and other characters in UTF-8.
WHITE = np.zeros(256, bool)
WHITE[[*range(9, 14), *range(28, 33)]] = True
WIDE = re.compile(
    rb"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"
)


class LineTable(NamedTuple):
    """Consecutive lines: their begins and ends, int64 [lines], and which are not blank, bool."""

    begins: np.ndarray
    ends: np.ndarray
    filled: np.ndarray


def line_tables(file: File) -> Iterator[LineTable]:
    """Yields all lines of a file, as `mapped.lines` does, but many at a time.

    Raises RecordError for a line that is not UTF-8; if bad records may be skipped, it counts as
    filled.
    """
    begin = len(BOM) if file.data[: len(BOM)] == BOM else 0
    while begin < len(file.data):
        end = file.data.rfind(file.line_break, begin, begin + MEGABYTE) + 1
        end = end or file.data.find(file.line_break, begin + MEGABYTE) + 1 or len(file.data)
        content = file.read(begin, end)
        if not content.isascii():
            check_utf8(file, content)
            content = WIDE.sub(lambda found: b" " * len(found[0]), content)
        letters = np.frombuffer(content, np.uint8)
        ends = np.flatnonzero(letters == ord(file.line_break)) + 1
        if not ends.size or ends[-1] < letters.size:
            ends = np.append(ends, letters.size)
        begins = np.concatenate([[0], ends[:-1]])
        filled = np.logical_or.reduceat(~WHITE[letters], begins)
        yield LineTable(begins + begin, ends + begin, filled)
        begin = end


def check_utf8(file: File, content: bytes) -> None:
    """Raises RecordError, naming the line, if a part of a file is not UTF-8 and that is an
    error."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        if not tolerates():
            for _ in lines(file):  # raises the error
                pass


def paragraphs(file: File) -> Iterator[np.ndarray]:
    """Yields the begin and end, int64 [records, 2], of the groups of lines without a blank one."""
    begin, last = -1, 0  # begin of the current paragraph, -1 if there is none; end of the last line
    for begins, ends, filled in line_tables(file):
        before = np.concatenate([[begin >= 0], filled[:-1]])
        starts = begins[filled & ~before]
        starts = np.concatenate([[begin], starts]) if begin >= 0 else starts
        stops = np.concatenate([[last], ends[:-1]])[before & ~filled]
        yield np.stack([starts[: len(stops)], stops], axis=1)
        begin = int(starts[-1]) if len(starts) > len(stops) else -1
        last = int(ends[-1])
    if begin >= 0:
        yield np.array([[begin, last]])


def filled_lines(file: File) -> Iterator[np.ndarray]:
    """Yields the begin and end, int64 [records, 2], of lines that are not blank."""
    for begins, ends, filled in line_tables(file):
        yield np.stack([begins[filled], ends[filled]], axis=1)
