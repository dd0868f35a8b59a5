"""Span corruption (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4), and UL2's mixture of
denoisers (Tay et al. 2022, arXiv:2205.05131).

Spans of a text are removed. In the input a sentinel marks each gap; in the target each sentinel
precedes its span:

    input   Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    target  <extra_id_0> for inviting <extra_id_1> last </s>

`rows="packed"` cuts documents into pieces, several of which share a row (see
`data/stream/packing.py`), each with its own sentinels and told apart by `segment_ids`. The length
of target rows is chosen so that both sides are equally full. `rows="joined"` does what T5 did:
documents are concatenated and cut into rows. Either way an input has at most `data.max_length`
tokens after the spans are removed, and spans are drawn each time it is seen.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from fmjax import contracts
from fmjax.contracts import Config, Example, HostBatch, Processors, Record, Source, Value, Where
from fmjax.data.sources.open import check_columns
from fmjax.data.stream.packing import pack, pack_matched
from fmjax.data.tokenizers.sentencepieces import sentinel
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError, one_of
from fmjax.tasks import token_rows
from fmjax.tasks.corpus import Corpus, cut, tokenize
from fmjax.tasks.denoisers import Denoiser, corrupt, denoiser
from fmjax.tasks.token_rows import (
    TokenTask,
    check_length,
    given_texts,
    packed_pairs,
    pad_rows,
    pair,
    tokenizer_of,
)

ROWS = ("packed", "joined")
# The seven denoisers of UL2's table 1: R regular, X extreme, S sequential.
UL2 = ("R:3:0.15", "R:8:0.15", "X:3:0.5", "X:8:0.5", "X:64:0.15", "X:64:0.5", "S:0.25")


@dataclasses.dataclass(frozen=True)
class Task(TokenTask):
    """Settings of span corruption. A text's denoiser is drawn from `denoisers`: T5 has the one,
    `UL2` are seven.

    `mode_text` goes before each input, with the mode's letter for {mode}, as "[{mode}] "; the first
    denoiser's in predicting.
    """

    counted: ClassVar[tuple[str, ...]] = token_rows.BOTH_SIDES

    denoisers: tuple[str, ...] = ("R:3:0.15",)
    mode_text: str = ""
    column: str = "text"
    rows: str = "packed"
    max_new_tokens: int = 64  # of a prediction
    num_beams: int = 1

    def __post_init__(self) -> None:
        one_of("task.rows", self.rows, ROWS)
        if not self.denoisers:
            raise UserError("task.denoisers is empty; give at least one, such as R:3:0.15")
        for written in self.denoisers:
            denoiser(written)

    @property
    def reads(self) -> Mapping[str, str]:
        return {self.column: "text"}

    @property
    def adds(self) -> Mapping[str, tuple[Value, ...]]:
        modes = dict.fromkeys(denoiser(written).mode for written in self.denoisers)
        return {"text": tuple(map(self.mode_prefix, modes))} if self.mode_text else {}

    @property
    def generation(self) -> Config:
        """The settings of generation, which predicting needs and evaluation does not."""
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}

    def examples(
        self, source: Source, processors: Processors, max_length: int, train: bool
    ) -> Rows | PackedRows:
        """Tokenizes a source into rows whose inputs are `max_length` tokens."""
        check_columns(source, self.columns)
        tokenizer = tokenizer_of(processors)
        corpus = tokenize(source, self.column, tokenizer)
        corrupter = Corrupter(self, tokenizer, max_length)
        if self.rows == "joined":
            return Rows(corpus, corrupter)
        return PackedRows(corpus, corrupter)

    def mode_prefix(self, mode: str) -> str:
        """Returns the text that goes before the inputs of a mode."""
        return self.mode_text.replace("{mode}", mode)

    def opening(self, tokenizer: Tokenizer, mode: str) -> np.ndarray:
        """Returns the ids of what goes before the inputs of a mode."""
        written = self.mode_prefix(mode)
        return tokenizer.encode_batch([written])[0] if written else np.zeros(0, np.int32)

    def inputs(
        self, examples: Sequence[Value], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Value]:
        """Returns a batch from texts (or records with the task's column) in which sentinels, or the
        tokenizer's mask tokens, mark what is missing.
        """
        tokenizer = tokenizer_of(processors)
        read = given_texts(examples, self.column, where)
        marks = sentinels(tokenizer)
        opening = self.opening(tokenizer, denoiser(self.denoisers[0]).mode)
        rows = []
        for number, ids in enumerate(tokenizer.encode_batch(read)):
            masks = (
                ids == tokenizer.mask_id if "mask" in tokenizer.roles else np.zeros(ids.size, bool)
            )
            if masks.sum() > marks.size:
                raise UserError(
                    f"{where(number)}: has {masks.sum()} masks, more than the {marks.size} "
                    "sentinels; split it"
                )
            ids[masks] = marks[: masks.sum()]
            if not np.isin(ids, marks).any():
                raise UserError(
                    f"{where(number)}: has no {sentinel(0)}; put one where something is missing"
                )
            ids, _ = tokenizer.assemble(np.concatenate([opening, ids]))
            check_length(ids.size, max_length, where(number))
            rows.append((ids, np.zeros_like(ids)))
        batch = pad_rows(rows, tokenizer.pad_id)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def describe(
        self, outputs: HostBatch, batch: HostBatch, processors: Processors
    ) -> list[Record]:
        """Returns, for each text, the spans that were written for its sentinels, and the text with
        them put in.
        """
        tokenizer = tokenizer_of(processors)
        marks = sentinels(tokenizer)
        opening = self.opening(tokenizer, denoiser(self.denoisers[0]).mode).size
        described = []
        rows, masks = batch["input_ids"], batch["attention_mask"]
        for ids, real, row in zip(rows, masks, np.asarray(outputs["generated"]), strict=True):
            text = ids[real > 0][opening:]
            text = text[~tokenizer.special_mask[text] | np.isin(text, [*marks, tokenizer.unk_id])]
            spans = written_spans(row[1:], tokenizer, marks)
            places = [int(number) for number in text if number in marks]
            filled = {
                tokenizer.token(number): tokenizer.decode(spans.get(number, ())).strip()
                for number in places
            }
            whole = np.concatenate([spans.get(number, [number]) for number in text.tolist()])
            whole = whole.astype(np.int32)
            described.append({"text": tokenizer.decode(whole).strip(), "spans": filled})
        return described


def sentinels(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids of a tokenizer's sentinels, int32. Raises UserError if it has none."""
    ids = {token: number for number, token in enumerate(tokenizer.pieces.tokens)}
    found = [
        ids[name]
        for name in itertools.takewhile(ids.__contains__, map(sentinel, itertools.count()))
    ]
    if not found:
        raise UserError(
            f"the tokenizer has no sentinels such as {sentinel(0)}; use T5's, or "
            "data.tokenizer_kind=t5"
        )
    return np.array(found, np.int32)


def written_spans(
    row: np.ndarray, tokenizer: Tokenizer, marks: np.ndarray
) -> dict[int, np.ndarray]:
    """Returns the ids that follow each sentinel of a target up to its end, no special ones."""
    ends = np.flatnonzero(row == tokenizer.end_id)
    row = row[: ends[0]] if ends.size else row
    # A model may have more embeddings than the tokenizer has pieces; those beyond are no words.
    row = row[row < tokenizer.vocab_size]
    at = np.flatnonzero(np.isin(row, marks))
    parts = np.split(row, at)[1:]
    return {int(part[0]): part[1:][~tokenizer.special_mask[part[1:]]] for part in reversed(parts)}


class Corrupter:
    """Takes spans out of texts of at most `length` tokens; inputs and targets have one shape for
    all denoisers.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.special = tokenizer.special_count()
        self.denoisers = [denoiser(written) for written in task.denoisers]
        self.openings = [task.opening(tokenizer, each.mode) for each in self.denoisers]
        self.marks = sentinels(tokenizer)
        rooms = [max_length - self.special - opening.size for opening in self.openings]
        self.length = min(map(self.fitting, self.denoisers, rooms))
        self.target_length = self.special + max(
            each.longest(self.length)[1] for each in self.denoisers
        )
        spans = max(each.counts(self.length)[1] for each in self.denoisers)
        if spans > self.marks.size:
            raise UserError(
                f"data.max_length={max_length} makes {spans} spans in a row, more than the "
                f"tokenizer's {self.marks.size} sentinels; lower it, or make spans longer in "
                "task.denoisers"
            )

    @staticmethod
    def fitting(each: Denoiser, room: int) -> int:
        """Returns the length of the longest row whose input fits in `room`. Raises UserError if
        there is none of two tokens.
        """
        length = 2
        if room < each.longest(length)[0]:
            raise UserError(
                "data.max_length leaves no room for text beside special tokens and "
                "task.mode_text; raise it"
            )
        while each.longest(length + 1)[0] <= room:
            length += 1
        return length

    def sizes(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lengths of input and target of `length` tokens, at most and on average over
        denoisers.
        """
        around = self.special + np.array([[opening.size, 0] for opening in self.openings])
        counts = [each.counts(length) for each in self.denoisers]
        mean = np.array([(length - noise + spans, noise + spans) for noise, spans in counts])
        most = np.array([each.longest(length) for each in self.denoisers])
        return (most + around).max(axis=0), (mean + around).mean(axis=0)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns the input and the target of a text."""
        lot = int(rng.integers(len(self.denoisers)))
        kept, taken = corrupt(ids, self.denoisers[lot].draw(ids.size, rng), self.marks)
        source, _ = self.tokenizer.assemble(np.concatenate([self.openings[lot], kept]))
        target, _ = self.tokenizer.assemble(taken)
        return source, target


class Rows(contracts.Examples):
    """A text cut into rows; what is taken out of each is drawn."""

    def __init__(self, corpus: Corpus, corrupter: Corrupter):
        self.corpus, self.corrupter = corpus, corrupter
        spans = cut(np.array([0]), np.array([corpus.size]), corrupter.length)
        self.spans = spans[spans[:, 1] - spans[:, 0] >= 2]
        if not len(self.spans):
            raise UserError("the text is a single token; give data with more text")

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Example:
        """Returns the row's tokens, of which `draw` takes some out."""
        return {"tokens": self.corpus.read(*self.spans[index].tolist())}

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns `input_ids`, `attention_mask` [S], `labels` and `label_weights` [T]."""
        made = self.corrupter
        return pair(
            *made(example["tokens"], rng),
            (made.max_length, made.target_length),
            made.tokenizer.pad_id,
        )


class PackedRows(contracts.Examples):
    """Documents cut into pieces, which are packed into rows; what is taken out of each is drawn. A
    piece of one token, of which nothing can be taken out, goes with the one before it, and a
    document of one token is left out.
    """

    def __init__(self, corpus: Corpus, corrupter: Corrupter, target_length: int = 0):
        """`target_length` is that of a row, 0 being matched to the data."""
        self.corpus, self.corrupter = corpus, corrupter
        pieces = corpus.pieces(corrupter.length)
        size = pieces[:, 1] - pieces[:, 0]
        same = np.diff(corpus.documents_of(pieces)) == 0  # document as the piece before
        last = np.flatnonzero((size[1:] == 1) & (size[:-1] > 2) & same) + 1
        pieces[last, 0] -= 1
        pieces[last - 1, 1] -= 1
        self.pieces = pieces[pieces[:, 1] - pieces[:, 0] >= 2]
        if not len(self.pieces):
            raise UserError("no text has two tokens; give data with more text")
        size = self.pieces[:, 1] - self.pieces[:, 0]
        known, each = np.unique(size, return_inverse=True)
        most, mean = (
            np.stack(both)[each] for both in zip(*map(corrupter.sizes, known.tolist()), strict=True)
        )
        if target_length:
            self.plan = pack(most, (corrupter.max_length, target_length))
        else:
            self.plan, target_length = pack_matched(most, corrupter.max_length)
        self.row_lengths = (corrupter.max_length, target_length)
        fill = mean.sum(axis=0) / (self.plan.rows * np.array(self.row_lengths))
        self.fill = {"input_ids": float(fill[0]), "labels": float(fill[1])}

    @property
    def target_length(self) -> int:
        return self.row_lengths[1]

    def repacked(self, target_length: int) -> PackedRows:
        """Returns the same pieces in rows with another length of targets."""
        return PackedRows(self.corpus, self.corrupter, target_length)

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> Example:
        """Returns the tokens of the row's pieces, and where all but the first begin among them."""
        return self.corpus.side_by_side(self.pieces[self.plan.pieces(index)])

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the pieces without what is taken out, and that; see `packed_pairs`."""
        pairs = [self.corrupter(ids, rng) for ids in np.split(example["tokens"], example["begins"])]
        sources, targets = ([both[side] for both in pairs] for side in (0, 1))
        return packed_pairs(sources, targets, self.row_lengths, self.corrupter.tokenizer.pad_id)
