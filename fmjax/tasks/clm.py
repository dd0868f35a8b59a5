"""Causal language modeling: predict each token from those before it (Radford et al. 2019).

`rows="packed"` cuts documents into pieces, several of which share a row (see
`data/stream/packing.py`). Tokens attend only to their own piece (`segment_ids`) and predict the
next token; the last one predicts the end. A document is preceded by the tokens that the tokenizer
puts before a text, or else by the token that ends documents. `rows="offset"` reads the data as one
long text, and each example starts at a random position, as in nanoGPT. In evaluation, rows never
overlap: every token is predicted once, except a first token with nothing before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fmjax import contracts
from fmjax.contracts import (
    Config,
    Example,
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
from fmjax.errors import UserError, in_range, one_of
from fmjax.metrics import classes as class_metrics
from fmjax.tasks.corpus import Corpus, cut, tokenize
from fmjax.tasks.token_rows import (
    NOTHING,
    TokenTask,
    check_length,
    given_texts,
    packed_row,
    tokenizer_of,
)

ROWS = ("packed", "offset")


@dataclasses.dataclass(frozen=True)
class Task(TokenTask):
    """Settings of causal language modeling. The last five are for prediction, which continues a
    text.
    """

    rows: str = "packed"
    column: str = "text"
    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: always the most likely token
    top_k: int = 0  # sample from this many tokens; 0: all tokens
    top_p: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        one_of("task.rows", self.rows, ROWS)
        in_range(
            "task.temperature",
            self.temperature,
            least=0,
            hint="0 always takes the most likely token",
        )

    @property
    def reads(self) -> Mapping[str, str]:
        return {self.column: "text"}

    @property
    def measures(self) -> Measures:
        return {**class_metrics.TOKEN_LEVEL, **class_metrics.BITS}

    @property
    def generation(self) -> Config:
        """The settings for continuing a prompt."""
        drawn = {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams} | (
            drawn if self.temperature else {}
        )

    def before(self, tokenizer: Tokenizer) -> np.ndarray:
        """Returns the special tokens before a text."""
        opening = tokenizer.opening
        return opening if opening.size or self.rows == "offset" else after(tokenizer)

    def examples(
        self, source: Source, processors: Processors, max_length: int, train: bool
    ) -> Rows:
        """Tokenizes a source into rows of `max_length` tokens, each with the token that follows it.

        Raises UserError if no document is long enough to predict a token.
        """
        check_columns(source, self.columns)
        tokenizer = tokenizer_of(processors)
        read = tokenize(source, self.column, tokenizer)
        corpus = read.enclosed(self.before(tokenizer), after(tokenizer))
        begins, ends = corpus.begins, corpus.bounds
        if self.rows == "offset":
            # The last document may have been cut anywhere, so it has no end token.
            begins, ends = np.array([0]), np.array([corpus.size - after(tokenizer).size])
        # The last token is only predicted.
        pieces = cut(begins, ends - 1, max_length)
        if not len(pieces):
            raise UserError(
                f'column "{self.column}": none of {len(source)} records has two tokens; use '
                "longer texts"
            )
        kind = Offsets if self.rows == "offset" and train else Rows
        return kind(corpus, pieces, max_length, tokenizer.fill_id)

    def metrics(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> dict[str, float]:
        """Returns loss (nats per token), perplexity and accuracy; and bits per byte and per
        character of the whole split.
        """
        assert isinstance(examples, Rows)
        values = super().metrics(arrays, valid, examples)
        return values | class_metrics.bits(
            arrays["losses"], valid, examples.corpus.bytes, examples.corpus.characters
        )

    def inputs(
        self, examples: Sequence[Value], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Value]:
        """Returns a batch of texts (or {"text": ...}) to continue, padded on the left."""
        tokenizer = tokenizer_of(processors)
        opening = self.before(tokenizer)
        texts = given_texts(examples, self.column, where)
        rows = [np.concatenate([opening, ids]) for ids in tokenizer.encode_batch(texts)]
        rows = [row if row.size else after(tokenizer) for row in rows]
        for number, row in enumerate(rows):
            if not row.size:
                raise UserError(
                    f"{where(number)}: is empty, and the tokenizer has no start token; pass text"
                )
            check_length(row.size, max_length, where(number))
        width = max(row.size for row in rows)
        lefts = [np.arange(width) >= width - row.size for row in rows]
        batch = {
            name: np.zeros((len(rows), width), np.int32) for name in ("input_ids", "attention_mask")
        }
        for index, (row, real) in enumerate(zip(rows, lefts, strict=True)):
            batch["input_ids"][index] = tokenizer.fill_id
            batch["input_ids"][index, real] = row
            batch["attention_mask"][index] = real
        return batch

    def describe(
        self, outputs: HostBatch, batch: HostBatch, processors: Processors
    ) -> list[Record]:
        """Returns the continuation of each text, up to its end token."""
        tokenizer, width = tokenizer_of(processors), batch["input_ids"].shape[1]
        return [
            {"text": tokenizer.written(row[width:])} for row in np.asarray(outputs["generated"])
        ]


def after(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the token that ends a document, if the tokenizer has one."""
    return NOTHING if tokenizer.end_id is None else np.array([tokenizer.end_id], np.int32)


class Rows(contracts.Examples):
    """Rows of tokens with the token that follows each; they contain `pieces` [N,2] one after the
    other."""

    def __init__(self, corpus: Corpus, pieces: np.ndarray, max_length: int, fill_id: int):
        self.corpus, self.pieces, self.max_length, self.fill_id = (
            corpus,
            pieces,
            max_length,
            fill_id,
        )
        self.plan = pack(pieces[:, 1] - pieces[:, 0], max_length)
        self.fill = {"input_ids": self.plan.fill[0]}

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> Example:
        """Returns `input_ids`, `segment_ids`, `position_ids`, `labels` (the next tokens) and
        `label_weights` [L].
        """
        return self.row(self.pieces[self.plan.pieces(index)].tolist())

    def row(self, pieces: Sequence[Sequence[int]]) -> Example:
        """Returns the row of some pieces."""
        read = [self.corpus.read(begin, end + 1) for begin, end in pieces]
        row = packed_row([tokens[:-1] for tokens in read], self.max_length, self.fill_id)
        following = np.concatenate([tokens[1:] for tokens in read])
        labels = np.pad(following, (0, self.max_length - following.size))
        return row | {
            "labels": labels,
            "label_weights": (row["segment_ids"] > 0).astype(np.float32),
        }


class Offsets(Rows):
    """The same number of rows, each from a random position in the text."""

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        last = int(self.pieces[-1, 1])
        begin = int(rng.integers(max(last - self.max_length, 0) + 1))
        return self.row([(begin, min(begin + self.max_length, last))])
