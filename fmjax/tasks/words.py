"""Splits texts into words for prediction, and checks that these are the words of training."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence

from fmjax.data.characters import BLANKS, marks
from fmjax.errors import UserError

SPLITS = ("words", "characters", "spaces")
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
SEEN = 10_000  # number of training words to compare
FEWEST = 20  # minimum number of words for a note
LEAST = 0.5  # fraction of the words that must be recovered

Span = tuple[int, int]  # begin and end in a text, in characters


@functools.cache
def pattern(split: str) -> re.Pattern[str]:
    """Returns the pattern of a word. "words": runs of letters and digits, and every other sign and
    Chinese character; "characters"; "spaces": separated by white space.

    Combining marks, such as vowel signs, belong to the character before them.
    """
    own = f"[{marks()}]*"
    if split == "characters":
        return re.compile(rf"\S{own}")
    if split == "spaces":
        return re.compile(f"[^{BLANKS}]+")
    letter = rf"[^\W{CHINESE}]"
    return re.compile(rf"[{CHINESE}]{own}|{letter}(?:{letter}|[{marks()}])*|[^\w\s]{own}")


def word_spans(text: str, split: str) -> list[Span]:
    """Returns the begin and end of each word of a text."""
    return [found.span() for found in pattern(split).finditer(text)]


def join(words: Sequence[str], split: str) -> tuple[str, list[Span]]:
    """Returns words as one text, with spaces between them unless they are characters, and the span
    of each word."""
    between = "" if split == "characters" else " "
    ends = list(itertools.accumulate((len(word) + len(between) for word in words), initial=0))
    spans = [(begin, begin + len(word)) for begin, word in zip(ends, words, strict=False)]
    return between.join(words), spans


def check_split(split: str, sentences: Iterable[Sequence[str]], refuse: bool) -> str:
    """Returns a note on training words that prediction would not recover; empty if there are few.

    Raises UserError if these are most words and `refuse` is set, since the model would get other
    words than in training.
    """
    seen = found = single = 0
    cut = ""  # an example
    for words in sentences:
        if seen >= SEEN:
            break
        seen += len(words)
        alone = [bool(pattern("characters").fullmatch(word)) for word in words]
        single += sum(alone)
        # Characters are adjacent in texts; words are separated.
        text, spans = join(words, "characters" if all(alone) else "words")
        given = set(word_spans(text, split))
        whole = [span in given for span in spans]
        found += sum(whole)
        cut = cut or next((word for word, kept in zip(words, whole, strict=True) if not kept), "")
    if seen < FEWEST or found > 0.99 * seen:
        return ""
    share = f"task.split={split}: {1 - found / seen:.1%} of the training words are not recovered"
    example = f'{share} in a text to predict on, as "{cut[:20]}"'
    if found < LEAST * seen:
        characters = single > LEAST * seen
        other = "characters" if characters else "words" if split == "characters" else "spaces"
        hint = " (bert_tag.py:words)" if other == "words" else ""
        example = f"{example}; set task.split={other}{hint}"
        if refuse:
            raise UserError(example)
    return example
