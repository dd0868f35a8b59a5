"""Texts with a tag for each word, in rows: the examples of token classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmjax import contracts
from fmjax.contracts import Example, Value, Where
from fmjax.data.augment.texts import drop_tokens
from fmjax.data.storage.tables import Table
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import RecordError, UserError, nearest
from fmjax.metrics.entities import OUTSIDE
from fmjax.tasks.token_rows import PADDED, pad_rows, widest_context, window_sizes, windows


class Sentence(NamedTuple):
    """A text's tokens `ids [N]`, where each of its words begins among them, and the words' tags as
    numbers, if known.
    """

    ids: np.ndarray
    begins: np.ndarray
    tags: np.ndarray


class Row(NamedTuple):
    """The tokens of a sentence from `begin` to before `end`, and the numbers of the words that are
    read there.
    """

    sentence: int
    begin: int
    end: int
    words: np.ndarray


def tag_numbers(
    sentences: Sequence[Sequence[str]], labels: Sequence[str], where: Where
) -> list[np.ndarray]:
    """Returns the tags of sentences as numbers. Raises RecordError for one that is no label."""
    numbers = {label: number for number, label in enumerate(labels)}
    for index, tags in enumerate(sentences):
        for tag in tags:
            if tag not in numbers:
                problem = (
                    f'tag "{tag}" is not one of {", ".join(labels[:20])}{nearest(tag, labels)}; '
                    "correct the record, or list all tags in task.labels"
                )
                raise RecordError(where(index), problem, index)
    return [np.array([numbers[tag] for tag in tags]) for tags in sentences]


@dataclasses.dataclass(frozen=True)
class Fit:
    """How sentences fit into rows of `max_length` tokens: too long ones are an error, cut
    (`overlong="truncate"`), or read in windows that begin every `stride` tokens ("split").

    Raises UserError if there is no room for a token.
    """

    tokenizer: Tokenizer
    max_length: int
    overlong: str
    stride: int

    def __post_init__(self) -> None:
        if self.room < 1:
            raise UserError(
                f"data.max_length={self.max_length} leaves no room for a token besides the "
                f"{self.max_length - self.room} special ones; raise it"
            )

    @property
    def room(self) -> int:
        return self.max_length - self.tokenizer.special_count()

    def spans(self, size: int, where: Where, index: int) -> np.ndarray:
        """Returns the begin and end [rows, 2] of the rows of a sentence of `size` tokens.

        Raises RecordError for one that is too long, and UserError for a stride that is.
        """
        if size <= self.room or self.overlong == "truncate":
            return np.array([[0, min(size, self.room)]])
        if self.overlong == "error":
            problem = (
                f"{size + self.max_length - self.room} tokens are more than "
                f"data.max_length={self.max_length}"
            )
            advice = "raise it, or choose task.overlong=split or truncate"
            raise RecordError(where(index), f"{problem}; {advice}", index)
        return windows(size, self.room, self.stride)

    def rows(self, index: int, sentence: Sentence, where: Where) -> list[Row]:
        """Returns the rows of a sentence, which has the number `index`."""
        spans = self.spans(sentence.ids.size, where, index)
        seen = np.flatnonzero(sentence.begins < spans[-1, 1])
        reader = widest_context(spans)[sentence.begins[seen]]
        return [
            Row(index, begin, end, seen[reader == number])
            for number, (begin, end) in enumerate(spans.tolist())
        ]


def places(row: Row, sentence: Sentence, tokenizer: Tokenizer) -> np.ndarray:
    """Returns where in an assembled row the words stand that are read there."""
    begins = sentence.begins[row.words].astype(np.int64)
    return np.asarray(tokenizer.opening.size + begins - row.begin)


class TaggedTexts(contracts.Examples):
    """Tagged texts in rows; `draw` replaces tokens by the unknown one with a probability (word
    dropout).
    """

    sized = (*PADDED, "labels", "label_weights")

    def __init__(self, tags: tuple[str, ...], pieces: str, table: Table, fits: Fit, dropout: float):
        """`tags` are the names of all tags; `pieces` says which tokens of a word have its tag."""
        self.tags, self.pieces, self.table, self.fits = tags, pieces, table, fits
        self.tokenizer, self.max_length, self.dropout = fits.tokenizer, fits.max_length, dropout
        sizes = table.sizes("ids")
        if fits.overlong == "split":
            counts, self.lengths = window_sizes(sizes, fits.room, fits.stride)
        else:
            counts, self.lengths = np.ones_like(sizes), np.minimum(sizes, fits.room)
        self.lengths = self.lengths + fits.tokenizer.special_count()
        self.ends = np.cumsum(counts)  # the number of rows up to the end of each sentence
        # The tag of a word's further tokens.
        known = {label: number for number, label in enumerate(tags)}
        self.inside = [
            known.get(f"I-{label[2:]}" if label.startswith("B-") else label, known[label])
            for label in tags
        ]

    def __reduce__(self) -> tuple[type[TaggedTexts], tuple[Value, ...]]:
        return TaggedTexts, (self.tags, self.pieces, self.table, self.fits, self.dropout)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def sentence(self, index: int) -> Sentence:
        return Sentence(*(self.table.value(name, index) for name in Sentence._fields))

    def row(self, index: int) -> tuple[Row, Sentence]:
        """Returns a row and its sentence. Raises IndexError beyond the last one."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        sentence = self.sentence(number)
        rows = self.fits.rows(number, sentence, str)
        return rows[index - int(self.ends[number])], sentence

    def __getitem__(self, index: int) -> Example:
        """Returns `input_ids`, `token_type_ids`, `attention_mask`, `labels` and `label_weights`
        [L].
        """
        row, sentence = self.row(index)
        assembled = self.tokenizer.assemble(sentence.ids[row.begin : row.end])
        padded = pad_rows([assembled], self.tokenizer.pad_id, self.max_length)
        example = {name: array[0] for name, array in padded.items()}
        labels, weights = np.zeros(self.max_length, np.int32), np.zeros(self.max_length, np.float32)
        at = places(row, sentence, self.tokenizer)
        if self.pieces == "all":
            ends = np.append(sentence.begins, sentence.ids.size)[row.words + 1]
            lasts = at + ends - sentence.begins[row.words]
            for first, last, tag in zip(at, lasts, sentence.tags[row.words], strict=True):
                last = min(last, self.tokenizer.opening.size + row.end - row.begin)
                labels[first:last], weights[first:last] = self.inside[tag], 1
        labels[at], weights[at] = sentence.tags[row.words], 1
        return example | {"labels": labels, "label_weights": weights}

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        if not self.dropout:
            return example
        ids = example["input_ids"]
        dropped = drop_tokens(ids, rng, tokenizer=self.tokenizer, share=self.dropout)
        return example | {"input_ids": dropped}

    def sentence_tags(
        self, tags: np.ndarray, valid: np.ndarray
    ) -> tuple[list[list[str]], list[list[str]]]:
        """Returns the true and the predicted tags of each sentence, from the best tag of each token
        [N,L].
        """
        labels = np.array(self.tags)
        truth = [labels[self.table.value("tags", number)] for number in range(len(self.table))]
        guess = [np.full(own.shape, OUTSIDE, object) for own in truth]
        for number in np.flatnonzero(valid).tolist():
            row, sentence = self.row(number)
            at = places(row, sentence, self.tokenizer)
            guess[row.sentence][row.words] = labels[tags[number][at]]
        return [own.tolist() for own in truth], [own.tolist() for own in guess]
