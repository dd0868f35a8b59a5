"""Rows of tokens for text tasks: pieces packed into rows, rows padded to one length, texts for
prediction, and the loss of a language-model head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeAlias

import jax
import numpy as np

from fmjax import contracts
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
from fmjax.data.sources.open import check_columns
from fmjax.data.tokenizers.assembling import Assembled
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError
from fmjax.layers.vocabulary import Logits, compare, cross_entropy_sum
from fmjax.metrics import classes as class_metrics

Row: TypeAlias = tuple[np.ndarray, np.ndarray]  # ids and token types [L]

NOTHING = np.zeros(0, np.int32)
PADDED = ("input_ids", "token_type_ids", "attention_mask")  # the result of `pad_rows`
TOO_LONG = "shorten the text, raise the limit, or choose task.overlong=truncate"
SHORTEN = "shorten the text"  # where a finished model predicts, its settings are what they are
BOTH_SIDES = (
    "attention_mask",
    "label_weights",
)  # `Task.counted` of an encoder-decoder


def tokenizer_of(processors: Processors) -> Tokenizer:
    """Returns the tokenizer among the processors of a task that reads texts."""
    return processors.of(TextProcessor).tokenizer


class TokenTask(contracts.Task):
    """A task whose model writes text: the language-model head predicts all `labels [B,T]` with
    nonzero `label_weights [B,T]`.
    """

    chunked: ClassVar[tuple[str, ...]] = ("lm",)

    @property
    def heads(self) -> Heads:
        return {"lm": {}}

    @property
    def measures(self) -> Measures:
        return class_metrics.TOKEN_LEVEL

    def resolve(self, source: Source) -> Config:
        """Returns no settings, since none depend on the data. Raises UserError if a column is
        missing.
        """
        check_columns(source, self.columns)
        return {}

    def weights(self, batch: Batch) -> Arrays:
        """Returns the number of predicted tokens in the batch."""
        return {"lm": batch["label_weights"].sum()}

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns the sum of the cross-entropies of predicted tokens."""
        return {"lm": cross_entropy_sum(outputs["lm"], batch["labels"], batch["label_weights"])}

    def predictions(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns per-row sums over predicted tokens: cross-entropies, their number, and the number
        of correct ones.
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
    """Returns the readable text of an assembled row, without the surrounding special tokens, but
    with [MASK] and others.
    """
    return tokenizer.decode(ids[tokenizer.opening.size : ids.size - tokenizer.closing.size])


def token_sums(logits: Logits, labels: jax.Array, weights: jax.Array) -> Arrays:
    """Returns per-row sums [B] over tokens [B,T] with weights: cross-entropies, weights, and the
    number of correct ones.
    """
    tokens, right = compare(logits, labels)
    correct = right * weights
    return {
        "losses": (tokens * weights).sum(-1),
        "weights": weights.sum(-1),
        "correct": correct.sum(-1),
    }


def windows(count: int, room: int, stride: int) -> np.ndarray:
    """Returns [windows, 2]: begin and end of spans of at most `room` tokens that begin every
    `stride` tokens (0: half of the room) and cover `count`. Raises UserError if tokens between them
    would be left out."""
    stride = stride or max(room // 2, 1)
    if not 0 < stride <= room:
        raise UserError(
            f"task.stride={stride}: windows of {room} tokens (data.max_length less the other "
            f"tokens of a row) can begin every 1 to {room} tokens; change one of them"
        )
    begins = np.arange(0, max(count - room, 0) + stride, stride)
    return np.stack([begins, np.minimum(begins + room, count)], axis=1)


def window_sizes(
    counts: np.ndarray, room: int | np.ndarray, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of `windows` of each text of `counts [N]` tokens, [N], and the sizes of
    all of them, text after text."""
    room = np.broadcast_to(room, counts.shape)
    strides = np.full_like(room, stride) if stride else np.maximum(room // 2, 1)
    each = 1 - -np.maximum(counts - room, 0) // strides
    text = np.repeat(np.arange(counts.size), each)
    number = np.arange(text.size) - np.repeat(np.cumsum(each) - each, each)
    return each, np.minimum(room[text], counts[text] - number * strides[text])


def widest_context(spans: np.ndarray) -> np.ndarray:
    """Returns, for each position covered by windows [windows, 2], the index of the window with the
    most context on the shorter side (as in BERT's run_squad.py); of equal ones, the first."""
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
                f'{where(number)}: is not text; pass a string, or an object with a "{column}"{has}'
            )
    return read


def keys_of(example: Value) -> str:
    """Returns the part of a message about the keys of an example that lacks one."""
    if not isinstance(example, Mapping) or not example:
        return ""
    return f" (it has {', '.join(map(str, example))}; predict.py --column names another)"


def check_length(size: int, most: int, place: str) -> None:
    """Raises UserError, naming the place, for a text with more tokens than prediction reads."""
    if size > most:
        raise UserError(
            f"{place}: has {size} tokens, more than the {most} that this model reads; shorten it"
        )


def packed_row(
    pieces: Sequence[np.ndarray],
    length: int,
    fill_id: int,
    before: np.ndarray = NOTHING,
    after: np.ndarray = NOTHING,
) -> Example:
    """Returns concatenated pieces, each between special tokens: `input_ids`, `segment_ids` (1, 2,
    ...; 0 is padding) and `position_ids` [length], which restart in every piece."""
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
    """Returns concatenated pairs: the arrays of `pair`, plus `segment_ids`, `position_ids` [S] and
    `decoder_segment_ids`, `decoder_position_ids` [T], with which each target only sees its own
    source."""
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
    """Returns a batch [rows, length] from (ids, token types) of several lengths; `length` is by
    default that of the longest row.
    """
    return padded(assembled(rows), pad_id, length)


def assembled(rows: Sequence[Row]) -> Assembled:
    """Returns rows as one."""
    ids, types = (np.concatenate([NOTHING, *side]) for side in zip(*rows, strict=True))
    return Assembled(ids, types, np.array([own.size for own, _ in rows]))


def padded(rows: Assembled, pad_id: int, length: int = 0) -> Example:
    """Returns the same as `pad_rows`."""
    real = np.arange(length or rows.sizes.max()) < rows.sizes[:, None]
    batch = {
        "input_ids": np.full(real.shape, pad_id, np.int32),
        "token_type_ids": np.zeros(real.shape, np.int32),
        "attention_mask": real.astype(np.int32),
    }
    batch["input_ids"][real] = rows.ids
    if rows.types.any():
        batch["token_type_ids"][real] = rows.types
    return batch


def enclosed(
    rows: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    most: int,
    truncate: bool,
    where: Where,
    limit: str,
    ending: Sequence[int] = (),
) -> Assembled:
    """Returns the ids of texts with the special tokens around them, followed by `ending`, in at
    most `most` tokens, truncated if allowed.

    Raises UserError, naming the text and the limiting setting, if truncation is not allowed or
    there is no room for text."""
    special = tokenizer.special_count() + len(ending)
    if most <= special:
        raise UserError(
            f"{limit}={most} leaves no room for a token besides the {special} special ones; raise "
            "it"
        )
    for number, ids in enumerate(rows):
        if ids.size + special > most and not truncate:
            raise UserError(
                f"{where(number)}: {ids.size + special} tokens exceed {limit}={most}; {TOO_LONG}"
            )
    return tokenizer.assemble_batch([ids[: most - special] for ids in rows], ending=ending)
