"""Questions with windows of their contexts: the examples of extractive question answering."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from fmjax import contracts
from fmjax.contracts import Example, HostBatch, Value, Where
from fmjax.data.characters import is_mark
from fmjax.data.storage.tables import RAGGED, Column, Columns, Table, Values, ids
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import RecordError
from fmjax.tasks import token_rows
from fmjax.tasks.token_rows import PADDED, pad_rows, window_sizes, windows

SIZED = (*PADDED, "context_mask")


@dataclasses.dataclass(frozen=True)
class Context:
    """A text's tokens `ids [N]`, and where each begins and ends in it, in characters [N,2]; `read`
    returns the text."""

    ids: np.ndarray
    offsets: np.ndarray
    read: Callable[[], str]

    @property
    def text(self) -> str:
        return self.read()

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
        text = self.text
        begin, end = int(self.offsets[first, 0]), int(self.offsets[last, 1])
        following = int(self.offsets[last + 1, 0]) if last + 1 < len(self.offsets) else len(text)
        while end < following and is_mark(text[end]):
            end += 1
        inside = text[begin:end]
        begin += len(inside) - len(inside.lstrip())
        return begin, max(begin, end - (len(inside) - len(inside.rstrip())))


class Question(NamedTuple):
    """A question's tokens, its context's number, and the span of its first answer, if any."""

    ids: np.ndarray
    context: int
    span: tuple[int, int] | None = None  # first and last token


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


T_co = TypeVar("T_co", covariant=True)


class Indexed(Protocol[T_co]):
    """A list, or what is read from a table as if it were one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


class Windows(contracts.Examples):
    """Questions with windows of their contexts."""

    sized = SIZED

    def __init__(
        self,
        contexts: Indexed[Context],
        questions: Indexed[Question],
        rows: Indexed[Row],
        tokenizer: Tokenizer,
        max_length: int,
    ):
        self.contexts, self.questions, self.rows = contexts, questions, rows
        self.tokenizer, self.max_length = tokenizer, max_length
        marked = tokenizer.assemble(np.zeros(0, np.int32), np.array([-1], np.int32))[0]
        self.before = int(np.flatnonzero(marked == -1)[0])  # special tokens before the context

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
            row = self.rows[int(number)]
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


COLUMNS = {
    "span": Column("int32", 2),  # the first and last token of the answer, -1 if there is none
    "size": Column("int32"),  # of the context, in tokens
    "owner": Column("int64"),  # the row that holds the context, which following questions share
    "offsets": Column("uint32", RAGGED),
}


def columns(tokenizer: Tokenizer) -> Columns:
    """Returns the columns of a table of questions."""
    side = ids(tokenizer.vocab_size)
    return {**COLUMNS, "question": side, "context": side}


def values_of(contexts: Sequence[Context], questions: Sequence[Question], begin: int) -> Values:
    """Returns the rows of a table of questions, the first of which has the number `begin`."""
    first: dict[int, int] = {}
    owners = [first.setdefault(one.context, number) for number, one in enumerate(questions)]
    read = [contexts[one.context] for one in questions]
    held = [
        own if owner == number else None
        for number, (own, owner) in enumerate(zip(read, owners, strict=True))
    ]
    none = np.zeros(0, np.int32)
    return {
        "question": [one.ids for one in questions],
        "context": [none if own is None else own.ids for own in held],
        "offsets": [none if own is None else own.offsets.reshape(-1) for own in held],
        "size": np.array([own.ids.size for own in read]),
        "owner": begin + np.array(owners),
        "span": np.array([one.span or (-1, -1) for one in questions]),
    }


@dataclasses.dataclass(frozen=True)
class StoredContexts:
    """The contexts of a table, by the rows that hold them; `text` reads that of a record."""

    table: Table
    text: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Context:
        own, offsets = (self.table.value(name, index) for name in ("context", "offsets"))
        return Context(own, offsets.reshape(-1, 2).astype(np.int32), partial(self.text, index))


@dataclasses.dataclass(frozen=True)
class StoredQuestions:
    """The questions of a table."""

    table: Table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Question:
        first, last = self.table.value("span", index).tolist()
        owner = int(self.table.value("owner", index))
        return Question(
            self.table.value("question", index), owner, None if first < 0 else (first, last)
        )


class StoredRows:
    """The rows in which the questions of a table are read: as `to_rows`, by arithmetic."""

    def __init__(self, table: Table, room: int, stride: int):
        """`room` is that of a question and its context."""
        self.rooms, self.sizes = room - table.sizes("question"), table.numbers("size")
        self.stride = stride
        counts, filled = window_sizes(self.sizes, self.rooms, stride)
        self.ends = np.cumsum(counts)  # the number of rows up to the end of each question
        self.lengths = filled + np.repeat(room - self.rooms, counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        question = int(np.searchsorted(self.ends, index, side="right"))
        room = int(self.rooms[question])
        number = index - (int(self.ends[question - 1]) if question else 0)
        begin = number * (self.stride or max(room // 2, 1))
        return Row(question, begin, min(begin + room, int(self.sizes[question])))


class StoredWindows(Windows):
    """The windows of a table of questions. `text` and `answers` read the context and the answers of
    a record."""

    def __init__(
        self,
        table: Table,
        tokenizer: Tokenizer,
        max_length: int,
        stride: int,
        text: Callable[[int], str],
        answers: Callable[[int], tuple[str, ...]],
    ):
        special = tokenizer.special_count(pair=True)
        rows = StoredRows(table, max_length - special, stride)
        super().__init__(
            StoredContexts(table, text), StoredQuestions(table), rows, tokenizer, max_length
        )
        self.lengths = rows.lengths + special
        self._given = (table, tokenizer, max_length, stride, text, answers)

    def __reduce__(self) -> tuple[type[StoredWindows], tuple[Value, ...]]:
        return StoredWindows, self._given

    def references(self) -> list[tuple[str, ...]]:
        """Returns the texts of the answers to each question."""
        *_, answers = self._given
        return [answers(index) for index in range(len(self.questions))]
