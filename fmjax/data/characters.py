"""Characters as file formats and Unicode define them: blanks between fields, and combining marks.

Python's own `str.split` and `str.strip` also split at no-break spaces and other blanks of Unicode,
which file formats treat as part of a word: "10\u00a0000" is one token of CoNLL.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator

BLANKS = " \t\n\v\f\r"  # white space in file formats
# Invisible characters inside words: soft hyphen, zero-width non-joiner and joiner, word joiner.
JOINERS = "\u00ad\u200c\u200d\u2060"
GAPS = re.compile(f"[{BLANKS}]+")


def is_blank(text: str) -> bool:
    """Returns whether a text consists only of a format's blanks."""
    return not text.strip(BLANKS)


def split_fields(text: str) -> list[str]:
    """Returns the fields of a text, which are separated by a format's blanks."""
    stripped = text.strip(BLANKS)
    return GAPS.split(stripped) if stripped else []


def numbered_lines(stream: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yields the number, from 1, and the text of each line of a stream that is read by line feeds.

    In one without line feeds, carriage returns end lines, as on old Macs.
    """
    for number, text in enumerate(stream, start=1):
        if number == 1 and "\r" in text and not text.endswith("\n"):
            lines = text.removesuffix("\r").split("\r")
            yield from enumerate((f"{line}\n" for line in lines), start=1)
        else:
            yield number, text


@functools.cache
def marks() -> str:
    """Returns the content of a regular expression's [...] for combining marks and joiners: vowel
    signs, accents, variation selectors (Unicode's categories Mn, Mc and Me)."""
    # Beyond U+1FFFF, the only marks are the variation selectors of plane 14.
    codes = (*range(0x20000), *range(0xE0100, 0xE01F0))
    runs: list[list[int]] = []
    for code in codes:
        if unicodedata.category(chr(code))[0] == "M":
            if runs and runs[-1][1] == code - 1:
                runs[-1][1] = code
            else:
                runs.append([code, code])
    return JOINERS + "".join(f"{chr(first)}-{chr(last)}" for first, last in runs)


def is_mark(letter: str) -> bool:
    """Returns whether a character is a combining mark, which modifies the preceding character."""
    return unicodedata.category(letter)[0] == "M"
