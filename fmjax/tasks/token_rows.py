"""Rows of tokens, shared by text tasks: a tokenized corpus, pieces packed into rows, rows padded to
one length, texts for prediction, and the loss of a language-model head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np

from fmjax import contracts, losses
from fmjax.contracts import (
    Arrays,
    Batch,
    Config,
    Example,
    Heads,
    HostBatch,
    Measures,
    Processors,
    Source,
    Value,
    Where,
)
from fmjax.data.kinds.text import Processor as TextProcessor
from fmjax.data.kinds.text import texts
from fmjax.data.sources.open import check_columns
from fmjax.data.tokenizers import stored_ids
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError
from fmjax.metrics import classes as class_metrics

Row: TypeAlias = tuple[np.ndarray, np.ndarray]  # ids and token types [L]

NOTHING = np.zeros(0, np.int32)
PADDED = ("input_ids", "token_type_ids", "attention_mask")  # what `pad_rows` makes
TOO_LONG = "shorten the text, raise the limit, or choose task.overlong=truncate"
SHORTEN = "shorten the text"  # where a finished model predicts, its settings are what they are
BOTH_SIDES = (
    "attention_mask",
    "label_weights",
)  # `Task.counted` where there is an encoder and a decoder


def tokenizer_of(processors: Processors) -> Tokenizer:
    """Returns the tokenizer among the processors of a task that reads texts."""
    return processors.of(TextProcessor).tokenizer


class TokenTask(contracts.Task):
    """A task whose model writes: the language-model head predicts each of `labels [B,T]` that has a
    `label_weights [B,T]`.
    """

    @property
    def heads(self) -> Heads:
        return {"lm": {}}

    @property
    def measures(self) -> Measures:
        return class_metrics.TOKEN_LEVEL

    def resolve(self, source: Source) -> Config:
        """Returns no settings: none follow from the data. Raises UserError if a column is
        missing.
        """
        check_columns(source, self.columns)
        return {}

    def weights(self, batch: Batch) -> Arrays:
        """Returns the number of predicted tokens in the batch."""
        return {"lm": batch["label_weights"].sum()}

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns the sum of the cross-entropies of predicted tokens."""
        return {
            "lm": (
                losses.softmax_cross_entropy(outputs["lm"], batch["labels"])
                * batch["label_weights"]
            ).sum()
        }

    def predictions(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns per-row sums over predicted tokens: cross-entropies, their number, and how many
        are right.
        """
        return token_sums(outputs["lm"], batch["labels"], batch["label_weights"])

    def metrics(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> dict[str, float]:
        """Returns loss (nats per predicted token), perplexity and accuracy."""
        return class_metrics.token_level(
            arrays["losses"], arrays["weights"], arrays["correct"], valid
        )


def readable(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """Returns the text of an assembled row, for a person: without the special tokens around it, but
    with [MASK] and others.
    """
    return tokenizer.decode(ids[tokenizer.opening.size : ids.size - tokenizer.closing.size])


def token_sums(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> Arrays:
    """Returns per-row sums [B] over tokens [B,T] with weights: cross-entropies, weights, and how
    many are right.
    """
    tokens = losses.softmax_cross_entropy(logits, labels)
    correct = (logits.argmax(axis=-1) == labels) * weights
    return {
        "losses": (tokens * weights).sum(-1),
        "weights": weights.sum(-1),
        "correct": correct.sum(-1),
    }


@dataclasses.dataclass(frozen=True)
class Corpus:
    """`tokens [T]` of all documents without special tokens; document i ends before `bounds[i]`."""

    tokens: np.ndarray
    bounds: np.ndarray
    characters: int = 0  # of the text
    bytes: int = 0  # of the text in UTF-8

    @property
    def begins(self) -> np.ndarray:
        """[documents]: where each begins."""
        return np.concatenate([[0], self.bounds[:-1]])

    def pieces(self, most: int) -> np.ndarray:
        """Returns [pieces, 2]: begin and end of consecutive pieces of at most `most` tokens, none
        crossing a document.

        Raises UserError if `most` leaves no room for a token.
        """
        if most < 1:
            raise UserError(
                "data.max_length leaves no room for a token beside the special ones; raise it"
            )
        return cut(self.begins, self.bounds, most)

    def enclosed(self, before: np.ndarray, after: np.ndarray) -> Corpus:
        """Returns the documents that have a token, each between special tokens."""
        kept = self.bounds > self.begins
        begins, ends = self.begins[kept], self.bounds[kept]
        places = np.repeat(
            np.stack([begins, ends], axis=1), [before.size, after.size], axis=1
        ).reshape(-1)
        tokens = np.insert(self.tokens, places, np.tile(np.concatenate([before, after]), len(ends)))
        bounds = ends + (before.size + after.size) * np.arange(1, len(ends) + 1)
        return dataclasses.replace(self, tokens=tokens, bounds=bounds)


def cut(begins: np.ndarray, ends: np.ndarray, most: int) -> np.ndarray:
    """Returns [pieces, 2]: begin and end of consecutive pieces of at most `most`, none crossing a
    border between spans.
    """
    spans = [
        np.stack([starts := np.arange(begin, end, most), np.minimum(starts + most, end)], axis=1)
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
    ]
    return np.concatenate(spans) if spans else np.zeros((0, 2), np.int64)


def windows(count: int, room: int, stride: int) -> np.ndarray:
    """Returns [windows, 2]: begin and end of spans of at most `room` places that begin every
    `stride` (0: half of the room) and cover `count`. Raises UserError if places between them would
    be left out."""
    stride = stride or max(room // 2, 1)
    if not 0 < stride <= room:
        raise UserError(
            f"task.stride={stride}: windows of {room} tokens (data.max_length without what else "
            "stands there) can begin every "
            f"1 to {room}; change one of them"
        )
    begins = np.arange(0, max(count - room, 0) + stride, stride)
    return np.stack([begins, np.minimum(begins + room, count)], axis=1)


def widest_context(spans: np.ndarray) -> np.ndarray:
    """Returns, for each place that windows [windows, 2] cover, the number of that in which it has
    the most places on its poorer side (as BERT's run_squad.py); of equal ones, the first."""
    places = np.arange(spans[-1, 1])
    poorer = np.minimum(places - spans[:, :1], spans[:, 1:] - 1 - places)
    return np.asarray(np.where(poorer >= 0, poorer, -1).argmax(axis=0))


def given_texts(examples: Sequence[Value], column: str, where: Where) -> list[str]:
    """Returns the texts of examples: strings, or objects that have them in a column. Raises
    UserError, naming the example.
    """
    read: list[Value] = [
        example.get(column) if isinstance(example, Mapping) else example for example in examples
    ]
    for number, text in enumerate(read):
        if not isinstance(text, str):
            has = keys_of(examples[number])
            raise UserError(
                f"{where(number)}: is not a text; give a string, or an object with a "
                f'"{column}"{has}'
            )
    return read


def keys_of(example: Value) -> str:
    """Returns what a message says of the keys of an example that lacks one."""
    if not isinstance(example, Mapping) or not example:
        return ""
    return f" (it has {', '.join(map(str, example))}; predict.py --column names another)"


def check_length(size: int, most: int, place: str) -> None:
    """Raises UserError, naming the place, for a text of more tokens than are read when
    predicting.
    """
    if size > most:
        raise UserError(
            f"{place}: has {size} tokens, more than {most}, the most that this model reads; "
            "shorten it"
        )


def tokenize(source: Source, column: str, tokenizer: Tokenizer, chunk: int = 4096) -> Corpus:
    """Tokenizes a column of every record, a chunk of records at a time; ids by the same tokenizer
    that the records hold are read.

    Raises UserError if a record's text is not a string or no record has a token.
    """
    tokens: list[np.ndarray] = []
    lengths: list[int] = []
    characters = size = 0
    ready = stored_ids.are_of(source, column, tokenizer.sha256)
    for begin in range(0, len(source), chunk):
        if ready:
            read, ids = read_tokens(
                source, tokenizer, range(begin, min(begin + chunk, len(source)))
            )
        else:
            read = list(texts(source, column, begin, begin + chunk))
            ids = tokenizer.encode_batch(read)
        tokens.extend(ids)
        lengths.extend(map(len, ids))
        characters += sum(map(len, read))
        size += sum(len(text.encode()) for text in read)
    bounds = np.cumsum(np.array(lengths, np.int64))
    if not len(bounds) or not bounds[-1]:
        raise UserError(
            f'column "{column}" has no text in any of {len(source)} records; give a data set with '
            "text"
        )
    return Corpus(np.concatenate(tokens).astype(np.int32), bounds, characters, size)


def read_tokens(
    source: Source, tokenizer: Tokenizer, indices: range
) -> tuple[list[str], list[np.ndarray]]:
    """Returns the texts of records and the ids [N] that they hold. Raises UserError, naming the
    record, for damaged ones.
    """
    records = [source[index] for index in indices]
    ids = [
        stored_ids.read(source, index, record, tokenizer.sha256)
        for index, record in zip(indices, records, strict=True)
    ]
    return [record["text"] for record in records], ids


def side_by_side(tokens: np.ndarray, pieces: np.ndarray) -> Example:
    """Returns the `tokens` of pieces [N,2] of a text, one behind the other, and where all but the
    first begin (`begins`).
    """
    parts = [tokens[begin:end] for begin, end in pieces.tolist()]
    return {
        "tokens": np.concatenate(parts),
        "begins": np.cumsum([part.size for part in parts])[:-1],
    }


def packed_row(
    pieces: Sequence[np.ndarray],
    length: int,
    fill_id: int,
    before: np.ndarray = NOTHING,
    after: np.ndarray = NOTHING,
) -> Example:
    """Returns pieces side by side, each between special tokens: `input_ids`, `segment_ids` (1, 2,
    ...; 0 is padding) and `position_ids` [length], which start again at every piece."""
    row = {
        name: np.zeros(length, np.int32) for name in ("input_ids", "segment_ids", "position_ids")
    }
    sizes = np.array([piece.size for piece in pieces]) + (before.size + after.size)
    ends = np.cumsum(sizes)
    used = int(ends[-1])
    row["input_ids"][:used] = np.concatenate(
        [part for piece in pieces for part in (before, piece, after)]
    )
    row["input_ids"][used:] = fill_id
    row["segment_ids"][:used] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    row["position_ids"][:used] = np.arange(used) - np.repeat(ends - sizes, sizes)
    return row


def pair(source: np.ndarray, target: np.ndarray, lengths: tuple[int, int], fill_id: int) -> Example:
    """Returns the arrays of a source and a target: `input_ids`, `attention_mask` [S], `labels` and
    `label_weights` [T], of lengths (S, T)."""
    row = packed_pairs([source], [target], lengths, fill_id)
    return {name: row[name] for name in ("input_ids", "attention_mask", "labels", "label_weights")}


def packed_pairs(
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    lengths: tuple[int, int],
    fill_id: int,
) -> Example:
    """Returns pairs side by side: besides what `pair` has, `segment_ids`, `position_ids` [S] and
    `decoder_segment_ids`, `decoder_position_ids` [T], by which each target sees its own source."""
    source, target = (
        packed_row(sources, lengths[0], fill_id),
        packed_row(targets, lengths[1], fill_id),
    )
    return {
        "input_ids": source["input_ids"],
        "attention_mask": (source["segment_ids"] > 0).astype(np.int32),
        "labels": target["input_ids"],
        "label_weights": (target["segment_ids"] > 0).astype(np.float32),
        "segment_ids": source["segment_ids"],
        "position_ids": source["position_ids"],
        "decoder_segment_ids": target["segment_ids"],
        "decoder_position_ids": target["position_ids"],
    }


def pad_rows(rows: Sequence[Row], pad_id: int, length: int = 0) -> Example:
    """Returns a batch [rows, length] from (ids, token types) of several lengths; by default that of
    the longest.
    """
    length = length or max(ids.size for ids, _ in rows)
    batch = {
        "input_ids": np.full((len(rows), length), pad_id, np.int32),
        "token_type_ids": np.zeros((len(rows), length), np.int32),
        "attention_mask": np.zeros((len(rows), length), np.int32),
    }
    for row, (ids, types) in enumerate(rows):
        batch["input_ids"][row, : ids.size] = ids
        batch["token_type_ids"][row, : ids.size] = types
        batch["attention_mask"][row, : ids.size] = 1
    return batch


def enclosed(
    rows: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    most: int,
    truncate: bool,
    where: Where,
    limit: str,
    ending: Sequence[int] = (),
) -> list[np.ndarray]:
    """Returns the ids of texts with the special tokens around them and `ending` behind, in at most
    `most` tokens, the text cut where it may be.

    Raises UserError, naming the text and the setting that is the limit, if it may not be, or there
    is no room for any."""
    special = tokenizer.special_count() + len(ending)
    if most <= special:
        raise UserError(
            f"{limit}={most} leaves no room for a token beside the {special} special ones; raise it"
        )
    for number, ids in enumerate(rows):
        if ids.size + special > most and not truncate:
            raise UserError(
                f"{where(number)}: {ids.size + special} tokens are more than {limit}={most}; "
                f"{TOO_LONG}"
            )
    return [
        np.append(tokenizer.assemble(ids[: most - special])[0], ending).astype(np.int32)
        for ids in rows
    ]
