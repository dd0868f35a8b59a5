"""Denoising (BART; Lewis et al. 2020, arXiv:1910.13461, section 2.2): the decoder restores a text
that is corrupted for the encoder.

    text    <s> The dog sleeps. It dreams of a long walk. </s>
    input   <s> It <mask> a long <mask>. The <mask> dog sleeps. </s>
    target  <s> The dog sleeps. It dreams of a long walk. </s>

The sentences of each document are shuffled first. Then spans with Poisson-distributed lengths are
drawn, and a single mask replaces each span, also an empty one. Several documents, or pieces of long
ones, share a row (see `data/stream/packing.py`); each is corrupted separately, has its own special
tokens, and is distinguished by `segment_ids`. The noise is drawn each time a row is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from fmjax import contracts
from fmjax.contracts import Config, Example, HostBatch, Processors, Record, Source, Value, Where
from fmjax.data.sources.open import check_columns
from fmjax.data.stream.packing import pack
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError, in_range
from fmjax.tasks import token_rows
from fmjax.tasks.corpus import Corpus, tokenize
from fmjax.tasks.token_rows import (
    TokenTask,
    check_length,
    given_texts,
    packed_pairs,
    pad_rows,
    tokenizer_of,
)

STOPS = (".", "!", "?", "。", "！", "？")
CLOSING = "\"')]»”’」』"  # characters that may follow a stop


@dataclasses.dataclass(frozen=True)
class Task(TokenTask):
    """Settings of denoising: the fraction of masked tokens and the mean length of spans (text
    infilling), and the fraction of a document's sentences that are permuted. The last two are for
    prediction, which writes the whole text."""

    counted: ClassVar[tuple[str, ...]] = token_rows.BOTH_SIDES

    mask_rate: float = 0.3
    mean_span: float = 3.0
    permute: float = 1.0
    column: str = "text"
    max_new_tokens: int = 128
    num_beams: int = 1

    def __post_init__(self) -> None:
        in_range("task.mask_rate", self.mask_rate, least=0, below=1, hint="BART uses 0.3")
        in_range("task.mean_span", self.mean_span, least=1, most=100, hint="in tokens; BART uses 3")
        in_range(
            "task.permute",
            self.permute,
            least=0,
            most=1,
            hint="the fraction of sentences that are permuted",
        )
        if not self.mask_rate and not self.permute:
            raise UserError(
                "task.mask_rate=0 and task.permute=0 leave the text unchanged; raise one of them"
            )

    @property
    def reads(self) -> Mapping[str, str]:
        return {self.column: "text"}

    @property
    def generation(self) -> Config:
        """The generation settings, which prediction needs and evaluation does not."""
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}

    def examples(
        self, source: Source, processors: Processors, max_length: int, train: bool
    ) -> Rows:
        """Tokenizes a source into rows of `max_length` tokens."""
        check_columns(source, self.columns)
        tokenizer = tokenizer_of(processors)
        return Rows(
            tokenize(source, self.column, tokenizer),
            Noise(self, tokenizer),
            tokenizer,
            max_length,
        )

    def inputs(
        self, examples: Sequence[Value], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Value]:
        """Returns a batch from texts (or records with the task's column), in which mask tokens
        stand for missing text.
        """
        tokenizer = tokenizer_of(processors)
        rows = [
            tokenizer.assemble(ids)
            for ids in tokenizer.encode_batch(given_texts(examples, self.column, where))
        ]
        for number, (ids, _) in enumerate(rows):
            check_length(ids.size, max_length, where(number))
        batch = pad_rows(rows, tokenizer.pad_id)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def describe(
        self, outputs: HostBatch, batch: HostBatch, processors: Processors
    ) -> list[Record]:
        """Returns the generated text of each example."""
        tokenizer = tokenizer_of(processors)
        return [
            {"text": tokenizer.written(row[1:]).strip()} for row in np.asarray(outputs["generated"])
        ]


class Noise:
    """Draws the corruption of a text."""

    def __init__(self, task: Task, tokenizer: Tokenizer):
        self.task = task
        self.mask_id = tokenizer.mask_id if task.mask_rate else 0
        self.stops = (
            sentence_ends(tokenizer) if task.permute else np.zeros(tokenizer.vocab_size, bool)
        )

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the corrupted tokens, which are never more than before."""
        tokens = permuted(ids, self.stops[ids], self.task.permute, rng)
        if not self.task.mask_rate:
            return tokens
        lengths = spans(max(round(tokens.size * self.task.mask_rate), 1), self.task.mean_span, rng)
        return infilled(tokens, lengths, self.mask_id, rng)


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """Returns bool [vocabulary]: the tokens that end a sentence, by punctuation only, as in the
    paper.
    """
    texts = [tokenizer.decode([number]) for number in range(tokenizer.vocab_size)]
    return np.array([text.rstrip().rstrip(CLOSING).endswith(STOPS) for text in texts])


def permuted(
    tokens: np.ndarray, ends: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Returns the tokens [N] with a fraction of the sentences permuted; `ends` [N] marks where each
    ends.
    """
    sentences = np.split(tokens, np.flatnonzero(ends[:-1]) + 1)
    order = np.arange(len(sentences))
    chosen = rng.permutation(order)[: round(share * order.size)]
    order[chosen] = rng.permutation(chosen)
    return np.concatenate([sentences[number] for number in order])


def spans(total: int, mean: float, rng: np.random.Generator) -> np.ndarray:
    """Returns lengths of spans, Poisson-distributed, that add up to `total`; the last one takes the
    remainder.

    Some may be 0, but there are at most `total` of them, so replacing each by a mask does not
    lengthen the text."""
    ends = np.minimum(np.cumsum(rng.poisson(mean, total)), total)
    ends[-1] = total
    count = int(np.searchsorted(ends, total)) + 1
    return rng.permutation(np.diff(ends[:count], prepend=0))


def infilled(
    tokens: np.ndarray, lengths: np.ndarray, mask_id: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns the tokens with each span replaced by one mask. Spans are at random, non-overlapping
    positions, in the given order.
    """
    left = np.ones(
        tokens.size - lengths.sum() + lengths.size, np.int64
    )  # number of original tokens for each input token
    places = np.sort(rng.choice(left.size, lengths.size, replace=False))
    left[places] = lengths
    begins = np.minimum(np.cumsum(left) - left, tokens.size - 1)
    kept: np.ndarray = tokens[begins]
    kept[places] = mask_id
    return kept


class Rows(contracts.Examples):
    """Documents cut into pieces, which are packed into rows and corrupted at each draw."""

    def __init__(self, corpus: Corpus, noise: Noise, tokenizer: Tokenizer, max_length: int):
        self.corpus, self.noise, self.tokenizer, self.max_length = (
            corpus,
            noise,
            tokenizer,
            max_length,
        )
        special = tokenizer.special_count()
        self.pieces = corpus.pieces(max_length - special)
        self.plan = pack(self.pieces[:, 1] - self.pieces[:, 0] + special, max_length)
        # Spans are removed from the input, so its number of tokens is random.
        self.fill = {"labels": self.plan.fill[0]}

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> Example:
        """Returns the tokens of the row's pieces, and the begin of each piece but the first."""
        return self.corpus.side_by_side(self.pieces[self.plan.pieces(index)])

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the corrupted and the original pieces; see `packed_pairs`."""
        texts = np.split(example["tokens"], example["begins"])
        sources = [self.tokenizer.assemble(self.noise(ids, rng))[0] for ids in texts]
        targets = [self.tokenizer.assemble(ids)[0] for ids in texts]
        return packed_pairs(
            sources, targets, (self.max_length, self.max_length), self.tokenizer.pad_id
        )
