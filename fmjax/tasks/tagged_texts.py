"""Texts with a tag for each word, in rows: the examples of token classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmjax import contracts
from fmjax.contracts import Example, Where
from fmjax.data.augment.texts import drop_tokens
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import RecordError, UserError
from fmjax.metrics.entities import OUTSIDE
from fmjax.tasks.token_rows import PADDED, pad_rows, widest_context, windows


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


def to_rows(
    sentences: Sequence[Sentence],
    tokenizer: Tokenizer,
    most: int,
    where: Where,
    overlong: str,
    stride: int,
) -> list[Row]:
    """Returns the rows of at most `most` tokens in which sentences are read.

    Raises UserError for a sentence that is too long, unless it is to be cut (`overlong="truncate"`)
    or read in windows that begin every `stride` tokens ("split").
    """
    room = most - tokenizer.special_count()
    if room < 1:
        raise UserError(
            f"data.max_length={most} leaves no room for a token besides the {most - room} special "
            "ones; raise it"
        )
    rows = []
    for index, (ids, begins, _) in enumerate(sentences):
        spans = np.array([[0, min(ids.size, room)]])
        if ids.size > room and overlong == "error":
            problem = f"{ids.size + most - room} tokens are more than data.max_length={most}"
            advice = "raise it, or choose task.overlong=split or truncate"
            raise RecordError(where(index), f"{problem}; {advice}", index)
        if ids.size > room and overlong == "split":
            spans = windows(ids.size, room, stride)
        seen = np.flatnonzero(begins < spans[-1, 1])
        reader = widest_context(spans)[begins[seen]]
        rows += [
            Row(index, begin, end, seen[reader == number])
            for number, (begin, end) in enumerate(spans.tolist())
        ]
    return rows


def places(row: Row, sentences: Sequence[Sentence], tokenizer: Tokenizer) -> np.ndarray:
    """Returns where in an assembled row the words stand that are read there."""
    return np.asarray(
        tokenizer.opening.size + sentences[row.sentence].begins[row.words] - row.begin
    )


class TaggedTexts(contracts.Examples):
    """Tagged texts in rows; `draw` replaces tokens by the unknown one with a probability (word
    dropout).
    """

    sized = (*PADDED, "labels", "label_weights")

    def __init__(
        self,
        tags: tuple[str, ...],
        pieces: str,
        sentences: list[Sentence],
        rows: list[Row],
        tokenizer: Tokenizer,
        max_length: int,
        dropout: float,
    ):
        """`tags` are the names of all tags; `pieces` says which tokens of a word have its tag."""
        self.tags, self.pieces, self.sentences, self.rows = tags, pieces, sentences, rows
        self.tokenizer, self.max_length, self.dropout = tokenizer, max_length, dropout
        self.lengths = np.array([row.end - row.begin for row in rows]) + tokenizer.special_count()
        # The tag of a word's further tokens.
        known = {label: number for number, label in enumerate(tags)}
        self.inside = [
            known.get(f"I-{label[2:]}" if label.startswith("B-") else label, known[label])
            for label in tags
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Returns `input_ids`, `token_type_ids`, `attention_mask`, `labels` and `label_weights`
        [L].
        """
        row = self.rows[index]
        sentence = self.sentences[row.sentence]
        assembled = self.tokenizer.assemble(sentence.ids[row.begin : row.end])
        padded = pad_rows([assembled], self.tokenizer.pad_id, self.max_length)
        example = {name: array[0] for name, array in padded.items()}
        labels, weights = np.zeros(self.max_length, np.int32), np.zeros(self.max_length, np.float32)
        at = places(row, self.sentences, self.tokenizer)
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
        guess = [np.full(sentence.tags.shape, OUTSIDE, object) for sentence in self.sentences]
        for number in np.flatnonzero(valid):
            row = self.rows[number]
            at = places(row, self.sentences, self.tokenizer)
            guess[row.sentence][row.words] = labels[tags[number][at]]
        truth = [labels[sentence.tags].tolist() for sentence in self.sentences]
        return truth, [tags.tolist() for tags in guess]
