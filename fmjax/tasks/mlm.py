"""Masked language modeling, optionally with next-sentence prediction (Devlin et al. 2019, section
3.1).

Masks are drawn each time an example is seen (RoBERTa's dynamic masking), and logits are computed
only at the masked positions. Without next-sentence prediction, pieces of several documents share a
row (see `data/stream/packing.py`), and tokens attend only to their own piece (`segment_ids`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
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
    Record,
    Source,
    Value,
    Where,
)
from fmjax.data.sources.open import check_columns
from fmjax.data.stream.packing import pack
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError, in_range
from fmjax.layers.vocabulary import cross_entropy_sum
from fmjax.metrics import classes as class_metrics
from fmjax.tasks.corpus import Corpus, tokenize
from fmjax.tasks.token_rows import (
    PADDED,
    check_length,
    given_texts,
    packed_row,
    pad_rows,
    token_sums,
    tokenizer_of,
)


@dataclasses.dataclass(frozen=True)
class Task(contracts.Task):
    """Settings of masked language modeling. Of the chosen tokens, 80 % become the mask and 10 % a
    random token.
    """

    sized: ClassVar[tuple[str, ...]] = (*PADDED, "masked_positions")
    chunked: ClassVar[tuple[str, ...]] = ("mlm",)

    mask_rate: float = 0.15
    whole_word: bool = False
    nsp: bool = False
    column: str = "text"

    def __post_init__(self) -> None:
        in_range("task.mask_rate", self.mask_rate, above=0, below=1, hint="BERT uses 0.15")

    @property
    def reads(self) -> Mapping[str, str]:
        return {self.column: "text"}

    @property
    def heads(self) -> Heads:
        return {"mlm": {}, "nsp": {}} if self.nsp else {"mlm": {}}

    @property
    def measures(self) -> Measures:
        own: Measures = {"nsp_accuracy": "max"} if self.nsp else {}
        return {**class_metrics.TOKEN_LEVEL, **own}

    def resolve(self, source: Source) -> Config:
        """Returns no settings, since none depend on the data. Raises UserError if the text column
        is missing.
        """
        check_columns(source, self.columns)
        return {}

    def examples(
        self, source: Source, processors: Processors, max_length: int, train: bool
    ) -> Rows | Pairs:
        """Tokenizes a source into rows of `max_length` tokens."""
        check_columns(source, self.columns)
        tokenizer = tokenizer_of(processors)
        corpus = tokenize(source, self.column, tokenizer)
        kind = Pairs if self.nsp else Rows
        return kind(corpus, Masker(self, tokenizer, max_length), tokenizer, max_length)

    def weights(self, batch: Batch) -> Arrays:
        """Returns the number of masked tokens, and of pairs, in the batch."""
        weights = {"mlm": batch["masked_weights"].sum()}
        return weights | ({"nsp": jnp.float32(batch["nsp_labels"].shape[0])} if self.nsp else {})

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns the sums of the cross-entropies over masked tokens, and over pairs."""
        labels, weights = batch["masked_labels"], batch["masked_weights"]
        terms = {"mlm": cross_entropy_sum(outputs["mlm"], labels, weights)}
        return terms | (
            {"nsp": losses.softmax_cross_entropy(outputs["nsp"], batch["nsp_labels"]).sum()}
            if self.nsp
            else {}
        )

    def predictions(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns per-row sums over masked tokens, and the pair logits."""
        arrays = token_sums(outputs["mlm"], batch["masked_labels"], batch["masked_weights"])
        return arrays | (
            {"nsp": outputs["nsp"], "nsp_labels": batch["nsp_labels"]} if self.nsp else {}
        )

    def metrics(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> dict[str, float]:
        """Returns loss (nats per masked token), perplexity and accuracy; and the accuracy on
        pairs.
        """
        values = class_metrics.token_level(
            arrays["losses"], arrays["weights"], arrays["correct"], valid
        )
        if self.nsp:
            values["nsp_accuracy"] = class_metrics.classification(
                arrays["nsp"], arrays["nsp_labels"], valid
            )["accuracy"]
        return values

    def inputs(
        self, examples: Sequence[Value], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Value]:
        """Returns a batch from texts (or {"text": ...}) in which the tokenizer's mask token marks
        what to predict.
        """
        tokenizer = tokenizer_of(processors)
        rows = [
            tokenizer.assemble(ids)
            for ids in tokenizer.encode_batch(given_texts(examples, self.column, where))
        ]
        masked = [np.flatnonzero(ids == tokenizer.mask_id) for ids, _ in rows]
        for number, ((ids, _), places) in enumerate(zip(rows, masked, strict=True)):
            if not places.size:
                mask = tokenizer.token(tokenizer.mask_id)
                raise UserError(
                    f"{where(number)}: has no {mask}; put one where a word should be predicted"
                )
            check_length(ids.size, max_length, where(number))
        places_BM = np.zeros((len(rows), max(map(len, masked))), np.int32)
        for row, places in zip(places_BM, masked, strict=True):
            row[: places.size] = places
        return {**pad_rows(rows, tokenizer.pad_id), "masked_positions": places_BM}

    def describe(
        self, outputs: HostBatch, batch: HostBatch, processors: Processors
    ) -> list[Record]:
        """Returns, for each text, the five best tokens with their probabilities at each mask."""
        tokenizer = tokenizer_of(processors)
        # A model may have more embeddings than the tokenizer has pieces; the extra ones are not
        # words.
        scores = np.asarray(jax.nn.softmax(outputs["mlm"], axis=-1))[..., : tokenizer.vocab_size]
        counts = (np.asarray(batch["input_ids"]) == tokenizer.mask_id).sum(axis=1)
        best = np.argsort(-scores, axis=-1)[..., :5]
        return [
            {
                "masks": [
                    [
                        {"token": tokenizer.token(int(i)), "score": float(scores[row, m, i])}
                        for i in best[row, m]
                    ]
                    for m in range(count)
                ]
            }
            for row, count in enumerate(counts)
        ]


class Masker:
    """Draws which tokens of a row are masked, and their replacements."""

    def __init__(self, task: Task, tokenizer: Tokenizer, max_length: int):
        self.rate, self.whole_word, self.tokenizer = task.mask_rate, task.whole_word, tokenizer
        self.most = max(1, round(task.mask_rate * max_length))
        self.mask_id = tokenizer.mask_id
        self.special = tokenizer.special_mask
        self.ordinary = np.flatnonzero(~self.special).astype(np.int32)

    def choose(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the positions to mask, in order; special tokens, including padding, are never
        masked.
        """
        maskable = np.flatnonzero(~self.special[ids])
        wanted = min(self.most, max(1, round(self.rate * maskable.size))) if maskable.size else 0
        if self.whole_word:
            return self.choose_words(ids, maskable, wanted, rng)
        chosen = np.zeros(ids.size, bool)
        chosen[rng.permutation(maskable)[:wanted]] = True
        return np.flatnonzero(chosen)

    def choose_words(
        self, ids: np.ndarray, maskable: np.ndarray, wanted: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the positions of random words until `wanted` are taken. A word that would exceed
        this is skipped, as in BERT's create_pretraining_data.py."""
        word = np.cumsum(self.tokenizer.word_starts(ids)[maskable])
        words = np.split(maskable, np.flatnonzero(np.diff(word)) + 1)
        chosen: list[int] = []
        for index in rng.permutation(len(words)):
            if len(chosen) + words[index].size <= wanted:
                chosen.extend(words[index].tolist())
        return np.array(sorted(chosen), np.int64)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> Example:
        """Returns `input_ids` with masks, and the positions, labels and weights [M] of the masked
        tokens.
        """
        places = self.choose(ids, rng)
        count, labels = places.size, ids[places]
        lot = rng.random(count)
        noise = self.ordinary[rng.integers(self.ordinary.size, size=count)]
        masked = {
            "input_ids": ids.copy(),
            "masked_positions": np.zeros(self.most, np.int32),
            "masked_labels": np.zeros(self.most, np.int32),
            "masked_weights": np.zeros(self.most, np.float32),
        }
        masked["input_ids"][places] = np.where(
            lot < 0.8, self.mask_id, np.where(lot < 0.9, noise, labels)
        )
        masked["masked_positions"][:count] = places
        masked["masked_labels"][:count] = labels
        masked["masked_weights"][:count] = 1
        return masked


class Rows(contracts.Examples):
    """Documents cut into pieces, which are packed into rows."""

    def __init__(self, corpus: Corpus, masker: Masker, tokenizer: Tokenizer, max_length: int):
        self.corpus, self.masker, self.tokenizer, self.max_length = (
            corpus,
            masker,
            tokenizer,
            max_length,
        )
        self.before, self.after = tokenizer.opening, tokenizer.closing
        special = self.before.size + self.after.size
        self.pieces = corpus.pieces(max_length - special)
        self.plan = pack(self.pieces[:, 1] - self.pieces[:, 0] + special, max_length)
        self.fill = {"input_ids": self.plan.fill[0]}

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> Example:
        """Returns `input_ids`, `segment_ids`, `position_ids` [L], before masking."""
        pieces = [
            self.corpus.read(begin, end)
            for begin, end in self.pieces[self.plan.pieces(index)].tolist()
        ]
        return packed_row(pieces, self.max_length, self.tokenizer.pad_id, self.before, self.after)

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        return example | self.masker(example["input_ids"], rng)


class Pairs(contracts.Examples):
    """Pieces of documents split in two; half of the time, the second half is replaced by that of
    another document.

    The split is at the start of a word, not of a sentence, since a corpus need not have sentence
    boundaries."""

    def __init__(self, corpus: Corpus, masker: Masker, tokenizer: Tokenizer, max_length: int):
        self.corpus, self.masker, self.tokenizer, self.max_length = (
            corpus,
            masker,
            tokenizer,
            max_length,
        )
        empty = tokenizer.assemble(np.zeros(0, np.int32), np.zeros(0, np.int32))[0]
        pieces = corpus.pieces(max_length - empty.size)
        self.pieces = pieces[pieces[:, 1] - pieces[:, 0] >= 2]
        self.documents = corpus.documents_of(self.pieces)  # in ascending order
        if not len(self.documents) or self.documents[0] == self.documents[-1]:
            raise UserError(
                "task.nsp=true needs at least two documents of two tokens; add text, or set "
                "task.nsp=false"
            )

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> Example:
        """Returns the piece's index; the row itself is drawn."""
        return {"piece": np.asarray(index, np.int32)}

    def other(self, index: int, rng: np.random.Generator) -> int:
        """Returns a piece of another document. A document's pieces are consecutive, so it takes one
        draw.
        """
        own = self.documents[index]
        first = int(np.searchsorted(self.documents, own))
        count = int(np.searchsorted(self.documents, own, side="right")) - first
        lot = int(rng.integers(len(self.pieces) - count))
        return lot if lot < first else lot + count

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        index = int(example["piece"])
        tokens = self.corpus.read(*self.pieces[index].tolist())
        starts = np.flatnonzero(self.tokenizer.word_starts(tokens)[1:]) + 1
        split = int(rng.choice(starts)) if starts.size else tokens.size // 2
        first, second = tokens[:split], tokens[split:]
        random = rng.random() < 0.5
        if random:
            other = self.corpus.read(*self.pieces[self.other(index, rng)].tolist())
            # Starts from a word inside the piece, since the beginning of a piece would reveal the
            # replacement.
            inside = np.flatnonzero(self.tokenizer.word_starts(other)[1:]) + 1
            at = int(rng.choice(inside)) if inside.size else 0
            second = other[at : at + second.size]
        ids, types = self.tokenizer.assemble(first, second)
        row = {
            k: array[0]
            for k, array in pad_rows([(ids, types)], self.tokenizer.pad_id, self.max_length).items()
        }
        return (
            row | self.masker(row["input_ids"], rng) | {"nsp_labels": np.asarray(random, np.int32)}
        )
