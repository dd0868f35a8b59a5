"""Text to text: translation, summarization, and other tasks that read one text and write another.

The encoder reads the source, the decoder predicts each token of the target from those before it.
Batches: `input_ids`, `attention_mask` [B,S], `labels` [B,T] unshifted, `label_weights` [B,T]; the
model adds its start token. With `pack`, several short pairs share a row in training (see
`data/stream/packing.py`): `segment_ids`, `position_ids` [B,S] and `decoder_segment_ids`,
`decoder_position_ids` [B,T] distinguish them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from fmjax import contracts
from fmjax.contracts import (
    Arrays,
    Batch,
    Column,
    Config,
    Example,
    Fact,
    HostBatch,
    Measures,
    Processors,
    Record,
    Source,
    Value,
    Where,
)
from fmjax.data.kinds.text import texts
from fmjax.data.ragged import Ragged
from fmjax.data.sources.open import check_columns
from fmjax.data.storage.tables import Table, Values, ids
from fmjax.data.stream.packing import pack, pack_matched
from fmjax.data.tokenizers.assembling import Assembled
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError, in_range, one_of
from fmjax.layers.vocabulary import cross_entropy_sum
from fmjax.metrics import classes as class_metrics
from fmjax.metrics import details
from fmjax.metrics import texts as text_metrics
from fmjax.tasks.facts import length_fact
from fmjax.tasks.row_tables import Part, row_key, row_table
from fmjax.tasks.token_rows import (
    BOTH_SIDES,
    NOTHING,
    TokenTask,
    enclosed,
    given_texts,
    packed_pairs,
    padded,
    readable,
    tokenizer_of,
)

OVERLONG = ("error", "truncate")
# Settings on which the rows do not depend.
NOT_OF_ROWS = (
    *("pack", "packed_target_length", "label_smoothing", "scores", "bleu_tokenize"),
    *("max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size"),
)


@dataclasses.dataclass(frozen=True)
class Task(TokenTask):
    """Settings of text to text. `prefix` is put before every source, such as T5's "translate
    English to German: ".

    `scores` evaluate generated text (see `text_metrics.SCORES`); without any, evaluation generates
    nothing."""

    counted: ClassVar[tuple[str, ...]] = BOTH_SIDES

    source: str = "source"
    target: str = "target"
    prefix: str = ""
    target_length: int = 128  # maximum tokens of a target, like data.max_length for a source
    overlong: str = "error"
    pack: bool = False  # for models that support packed pairs
    # target length of a packed row, whose source length is data.max_length; 0: fitted to the data
    packed_target_length: int = 0
    label_smoothing: float = 0.0
    scores: tuple[str, ...] = ("bleu", "chrf")
    bleu_tokenize: str = "13a"
    max_new_tokens: int = 0  # 0: target_length
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("overlong", OVERLONG), ("bleu_tokenize", text_metrics.TOKENIZERS)):
            one_of(f"task.{name}", vars(self)[name], choices)
        in_range("task.label_smoothing", self.label_smoothing, least=0, below=1)
        if self.target_length < 2:
            raise UserError(
                f"task.target_length={self.target_length}: must leave room for a token and the end "
                "token; raise it"
            )
        if self.packed_target_length and self.packed_target_length < self.target_length:
            raise UserError(
                f"task.packed_target_length={self.packed_target_length}: a row must have room for "
                f"at least one target, task.target_length={self.target_length}; raise it, or set "
                "it to 0 to fit it to the data"
            )
        text_metrics.measures(self.scores)

    @property
    def reads(self) -> Mapping[str, str]:
        return dict.fromkeys((self.source, self.target), "text")

    @property
    def input_columns(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def adds(self) -> Mapping[str, tuple[Value, ...]]:
        return {"text": (self.prefix,)} if self.prefix else {}

    @property
    def packs_pairs(self) -> bool:
        return self.pack

    @property
    def needs_generation(self) -> bool:
        return bool(self.scores)

    @property
    def generation(self) -> Config:
        """Arguments of generation."""
        beams = {
            name: vars(self)[name]
            for name in ("num_beams", "length_penalty", "no_repeat_ngram_size")
        }
        return {"max_new_tokens": self.max_new_tokens or self.target_length} | beams

    @property
    def measures(self) -> Measures:
        return {**class_metrics.TOKEN_LEVEL, **text_metrics.measures(self.scores)}

    @property
    def signatures(self) -> dict[str, str]:
        """How each score is computed, to report it with the score."""
        return text_metrics.signatures(self.scores, self.bleu_tokenize)

    def examples(
        self, source: Source, processors: Processors, max_length: int, train: bool
    ) -> Pairs | PackedPairs:
        """Tokenizes a source into pairs of `max_length` and `target_length` tokens.

        Raises UserError, naming the record, for values that are not text, and for texts that are
        too long and may not be truncated."""
        check_columns(source, self.columns)
        tokenizer = tokenizer_of(processors)
        side = ids(tokenizer.vocab_size)

        def make(part: Part) -> Values:
            references = list(texts(part, self.target))
            given = [f"{self.prefix}{text}" for text in texts(part, self.source)]
            source = self.cut(given, tokenizer, max_length, part.where)
            target = self.cut(references, tokenizer, self.target_length, part.where, target=True)
            return {
                "source": Ragged(source.ids, source.sizes),
                "target": Ragged(target.ids, target.sizes),
            }

        key = row_key(self, tokenizer, max_length, NOT_OF_ROWS)
        table = row_table(source, {"source": side, "target": side}, key, make)
        target = Column(source, self.target)
        pairs = Pairs(table, target, tokenizer, (max_length, self.target_length))
        return (
            PackedPairs(pairs, max_length, self.packed_target_length)
            if self.pack and train
            else pairs
        )

    def facts(
        self,
        sample: Source,
        examples: Sequence[contracts.Examples],
        processors: Processors,
        max_length: int,
    ) -> list[Fact]:
        """Returns how many sources and targets are truncated."""
        tokenizer = tokenizer_of(processors)
        sources = tokenizer.encode_batch(
            [f"{self.prefix}{text}" for text in texts(sample, self.source)]
        )
        targets = tokenizer.encode_targets(list(texts(sample, self.target)))
        special = tokenizer.special_count()
        sizes = [np.array([ids.size for ids in side]) + special for side in (sources, targets)]
        sizes[1] += len(end(tokenizer))
        return [
            length_fact(sizes[0], max_length, name="sources"),
            length_fact(sizes[1], self.target_length, "task.target_length", "targets"),
        ]

    def cut(
        self,
        read: Sequence[str],
        tokenizer: Tokenizer,
        most: int,
        where: Where,
        target: bool = False,
    ) -> Assembled:
        """Returns the ids of each source, or target, between special tokens, in at most `most`
        tokens; a target has an end token.
        """
        encode = tokenizer.encode_targets if target else tokenizer.encode_batch
        limit = "task.target_length" if target else "data.max_length"
        ending = end(tokenizer) if target else ()
        return enclosed(
            encode(read), tokenizer, most, self.overlong == "truncate", where, limit, ending
        )

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns the sum of the smoothed cross-entropies of target tokens."""
        labels, weights = batch["labels"], batch["label_weights"]
        return {"lm": cross_entropy_sum(outputs["lm"], labels, weights, self.label_smoothing)}

    def metrics(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> dict[str, float]:
        """Returns loss (nats per target token), perplexity and accuracy, and the scores of
        generated text.
        """
        values = super().metrics(arrays, valid, examples)
        if not self.scores:
            return values
        assert isinstance(examples, Pairs)
        hypotheses = [written(row, examples.tokenizer) for row in arrays["generated"][valid > 0]]
        return values | text_metrics.texts(
            self.scores, hypotheses, examples.references(), self.bleu_tokenize
        )

    def details(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> Record:
        """Returns the pairs with the largest losses per token, and a few others: source, reference
        and, if texts were generated, the output.
        """
        assert isinstance(examples, Pairs)

        def row(index: int) -> Record:
            tokenizer, (reference,) = examples.tokenizer, examples.references(index, index + 1)
            shown = {
                "source": readable(examples.table.value("source", index), tokenizer),
                "reference": reference,
            }
            if "generated" in arrays:
                shown["output"] = written(arrays["generated"][index], tokenizer)
            return {"example": index + 1} | {
                name: details.shortened(text) for name, text in shown.items()
            }

        each = arrays["losses"] / np.maximum(arrays["weights"], 1)
        return {
            "worst": details.worst(each, valid, row),
            "samples": details.samples(valid, row),
        }

    def inputs(
        self, examples: Sequence[Value], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Value]:
        """Returns a batch from texts, or records with the task's source column."""
        tokenizer = tokenizer_of(processors)
        sources = [f"{self.prefix}{text}" for text in given_texts(examples, self.source, where)]
        rows = self.cut(sources, tokenizer, max_length, where)
        batch = padded(rows, tokenizer.fill_id)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def describe(
        self, outputs: HostBatch, batch: HostBatch, processors: Processors
    ) -> list[Record]:
        """Returns the generated text of each example."""
        tokenizer = tokenizer_of(processors)
        return [{"text": written(row, tokenizer)} for row in np.asarray(outputs["generated"])]


class Pairs(contracts.Examples):
    """Tokenized sources and targets, one pair per example, without randomness. `target` is the
    column of target texts, and `row_lengths` are (S, T)."""

    sized = ("input_ids", *BOTH_SIDES, "labels")

    def __init__(
        self, table: Table, target: Column, tokenizer: Tokenizer, row_lengths: tuple[int, int]
    ):
        self.table, self.target = table, target
        self.tokenizer, self.row_lengths = tokenizer, row_lengths
        sizes = [table.sizes(side) for side in ("source", "target")]
        self.sides = dict(
            zip(("input_ids", "labels"), zip(sizes, row_lengths, strict=True), strict=True)
        )
        self.lengths = np.maximum(*sizes)
        self.kept: list[str] = []  # all target texts, once an evaluation has read them
        self.fill = {name: float(np.mean(own)) / most for name, (own, most) in self.sides.items()}

    def __reduce__(self) -> tuple[type[Pairs], tuple[Value, ...]]:
        return Pairs, (self.table, self.target, self.tokenizer, self.row_lengths)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Example:
        """Returns `input_ids`, `attention_mask` [S] and `labels`, `label_weights` [T]."""
        return {name: array[0] for name, array in self.drawn(np.array([index])).items()}

    def drawn(self, indices: np.ndarray) -> Example:
        """Returns examples as one batch."""
        source, target = (
            padded(Assembled(ids, NOTHING, sizes), self.tokenizer.fill_id, length)
            for (ids, sizes), length in zip(
                (self.table.rows(side, indices) for side in ("source", "target")),
                self.row_lengths,
                strict=True,
            )
        )
        return {
            "input_ids": source["input_ids"],
            "attention_mask": source["attention_mask"],
            "labels": target["input_ids"],
            "label_weights": target["attention_mask"].astype(np.float32),
        }

    def references(self, begin: int = 0, end: int | None = None) -> list[str]:
        """Returns the target texts from `begin` to before `end`."""
        if (begin, end) == (0, None):
            self.kept = self.kept or list(texts(self.target.source, self.target.name))
        return self.kept[begin:end] or list(texts(self.target.source, self.target.name, begin, end))


class PackedPairs(contracts.Examples):
    """Several pairs per example, by a plan. Targets have `target_length` tokens in total; 0 fits
    that to the data.
    """

    sized = Pairs.sized

    def __init__(self, pairs: Pairs, max_length: int, target_length: int):
        self.pairs = pairs
        sizes = np.stack([pairs.table.sizes(side) for side in ("source", "target")], axis=1)
        if target_length:
            self.plan = pack(sizes, (max_length, target_length))
        else:
            self.plan, target_length = pack_matched(sizes, max_length)
        self.row_lengths = (max_length, target_length)
        self.fill = dict(zip(pairs.sides, self.plan.fill, strict=True))

    @property
    def target_length(self) -> int:
        return self.row_lengths[1]

    def repacked(self, target_length: int) -> PackedPairs:
        """Returns the same pairs in rows with another target length."""
        return PackedPairs(self.pairs, self.row_lengths[0], target_length)

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> Example:
        """Returns the arrays of one pair, with the segments and positions of both sides."""
        pieces, table = self.plan.pieces(index).tolist(), self.pairs.table
        sources, targets = (
            [table.value(side, number) for number in pieces] for side in ("source", "target")
        )
        return packed_pairs(sources, targets, self.row_lengths, self.pairs.tokenizer.fill_id)


def end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the end token to add to a text, if the tokenizer adds none itself. Raises UserError
    if there is none.
    """
    around, _ = tokenizer.assemble(np.zeros(0, np.int32))
    ends = tokenizer.eos_id if tokenizer.end_id is None else tokenizer.end_id
    return () if around[-1:].tolist() == [ends] else (ends,)


def written(row: np.ndarray, tokenizer: Tokenizer) -> str:
    """Returns the text of a generated row: everything after the start token, up to the end token,
    without special tokens.
    """
    return tokenizer.written(row[1:]).strip()
