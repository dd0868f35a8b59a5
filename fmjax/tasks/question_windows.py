"""Questions with windows of their contexts: the examples of extractive question answering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmjax import contracts
from fmjax.contracts import Example, HostBatch, Where
from fmjax.data.characters import is_mark
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import RecordError
from fmjax.tasks import token_rows
from fmjax.tasks.token_rows import PADDED, pad_rows, windows

SIZED = (*PADDED, "context_mask")


class Context(NamedTuple):
    """A text, its tokens `ids [N]`, and where each begins and ends in it, in characters [N,2]."""

    text: str
    ids: np.ndarray
    offsets: np.ndarray

    def tokens(self, begin: int, end: int) -> tuple[int, int] | None:
        """Returns the first and the last token of the characters from `begin` to before `end`; None
        if they have none.
        """
        touched = np.flatnonzero((self.offsets[:, 1] > begin) & (self.offsets[:, 0] < end))
        return (int(touched[0]), int(touched[-1])) if touched.size else None

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """Returns the begin and end, in characters, of the tokens from `first` to `last`, without
        white space around.

        Combining marks that a tokenizer drops, as a lower-cased WordPiece does, belong to the token
        before them.
        """
        begin, end = int(self.offsets[first, 0]), int(self.offsets[last, 1])
        following = (
            int(self.offsets[last + 1, 0]) if last + 1 < len(self.offsets) else len(self.text)
        )
        while end < following and is_mark(self.text[end]):
            end += 1
        inside = self.text[begin:end]
        begin += len(inside) - len(inside.lstrip())
        return begin, max(begin, end - (len(inside) - len(inside.rstrip())))


class Question(NamedTuple):
    """A question's tokens, its context's number, the texts of its answers, and the span of the
    first of them, if any.
    """

    ids: np.ndarray
    context: int
    answers: tuple[str, ...]
    span: tuple[int, int] | None  # first and last token


class Row(NamedTuple):
    """A question with the tokens of its context from `begin` to before `end`."""

    question: int
    begin: int
    end: int


def to_rows(
    contexts: Sequence[Context],
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    most: int,
    where: Where,
    stride: int,
) -> list[Row]:
    """Returns the rows of at most `most` tokens in which the questions are read; windows of a
    context begin every `stride` tokens.

    Raises UserError, naming the record, for a question that leaves no room for its context.
    """
    special = tokenizer.special_count(pair=True)
    rows = []
    for index, question in enumerate(questions):
        room = most - special - question.ids.size
        if room < 1:
            raise RecordError(
                where(index),
                f"a question of {question.ids.size} tokens and {special} special ones leave no "
                f"room in data.max_length={most}; raise it, or lower task.max_question",
                index,
            )
        spans = windows(contexts[question.context].ids.size, room, stride)
        rows += [Row(index, begin, end) for begin, end in spans.tolist()]
    return rows


class Windows(contracts.Examples):
    """Questions with windows of their contexts."""

    sized = SIZED

    def __init__(
        self,
        contexts: list[Context],
        questions: list[Question],
        rows: list[Row],
        tokenizer: Tokenizer,
        max_length: int,
    ):
        self.contexts, self.questions, self.rows = contexts, questions, rows
        self.tokenizer, self.max_length = tokenizer, max_length
        marked = tokenizer.assemble(np.zeros(0, np.int32), np.array([-1], np.int32))[0]
        self.before = int(np.flatnonzero(marked == -1)[0])  # special tokens before the context
        special = tokenizer.special_count(pair=True)
        self.lengths = np.array(
            [questions[row.question].ids.size + row.end - row.begin + special for row in rows]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def assembled(self, row: Row) -> token_rows.Row:
        """Returns the ids and token types of a row."""
        question = self.questions[row.question]
        return self.tokenizer.assemble(
            question.ids, self.contexts[question.context].ids[row.begin : row.end]
        )

    def place(self, row: Row) -> int:
        """Returns where in a row the context's token 0 stands, or would stand."""
        return self.before + self.questions[row.question].ids.size - row.begin

    def context_mask(self, row: Row, length: int) -> np.ndarray:
        """Returns [length]: 1 where the context stands."""
        tokens = np.arange(length) - self.place(row)
        return ((tokens >= row.begin) & (tokens < row.end)).astype(np.int32)

    def target(self, row: Row) -> tuple[int, int]:
        """Returns where in a row the answer begins and ends; 0 if it does not stand there whole."""
        span, place = self.questions[row.question].span, self.place(row)
        if span is None or span[0] < row.begin or span[1] >= row.end:
            return 0, 0
        return span[0] + place, span[1] + place

    def characters(self, row: Row, first: int, last: int) -> tuple[int, int]:
        """Returns the characters of the context from one place of a row to another."""
        place = self.place(row)
        return self.contexts[self.questions[row.question].context].characters(
            first - place, last - place
        )

    def __getitem__(self, index: int) -> Example:
        """Returns `input_ids`, `token_type_ids`, `attention_mask`, `context_mask` [L],
        `start_positions` and `end_positions`.
        """
        row = self.rows[index]
        padded = pad_rows([self.assembled(row)], self.tokenizer.pad_id, self.max_length)
        start, end = map(np.int32, self.target(row))
        example = {name: array[0] for name, array in padded.items()}
        example["context_mask"] = self.context_mask(row, self.max_length)
        return example | {"start_positions": start, "end_positions": end}

    def answers(
        self, arrays: HostBatch, valid: np.ndarray
    ) -> list[tuple[str, tuple[int, int], float, float]]:
        """Returns of each question the best span over its windows (text, characters, score) and the
        least score of none.
        """
        found = [("", (0, 0), -np.inf, np.inf)] * len(self.questions)
        for number in np.flatnonzero(valid):
            row = self.rows[number]
            text, span, best, null = found[row.question]
            if (score := float(arrays["scores"][number, 0])) > best:
                span = self.characters(
                    row, int(arrays["first"][number, 0]), int(arrays["last"][number, 0])
                )
                text, best = (
                    self.contexts[self.questions[row.question].context].text[slice(*span)],
                    score,
                )
            found[row.question] = (text, span, best, min(null, float(arrays["null"][number])))
        return found
