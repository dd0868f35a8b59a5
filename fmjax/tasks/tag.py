"""Token classification: a tag for each word of a text that is split into words; named entities by
BIO tags.

A word's tag is read at its first token, wherever the tokenizer cuts it (Devlin et al. 2019, section
5.3). Entities are found and judged by seqeval: leniently, as conlleval does (an I- that follows no
B- begins an entity), or strictly (it is none). Tags may also be of the schemes BIOES, BILOU and
their kin (`metrics/entities.py`); those of no scheme, such as parts of speech, are judged one by
one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from seqeval import metrics as seqeval

from fmjax import contracts, losses
from fmjax.contracts import (
    Arrays,
    Batch,
    Config,
    Fact,
    Heads,
    HostBatch,
    Measures,
    Processors,
    Record,
    Source,
    Value,
    Where,
)
from fmjax.data.characters import split_fields
from fmjax.data.kinds.label import known_name
from fmjax.data.sources.open import check_columns
from fmjax.data.storage.tables import RAGGED, Column, Values, ids
from fmjax.distributed.hosts import say
from fmjax.errors import RecordError, UserError, in_range, one_of
from fmjax.metrics import classes as class_metrics
from fmjax.metrics import details
from fmjax.metrics import entities as entity_metrics
from fmjax.metrics.entities import OUTSIDE
from fmjax.tasks.facts import count_fact, length_fact
from fmjax.tasks.imbalance import LOSS, Balance
from fmjax.tasks.row_tables import Part, remembered, row_key, row_table, settings
from fmjax.tasks.tagged_texts import Fit, Sentence, TaggedTexts, places, tag_numbers
from fmjax.tasks.token_rows import PADDED, pad_rows, tokenizer_of
from fmjax.tasks.words import SPLITS, check_split, join, word_spans

CHOICES = {
    "split": SPLITS,
    "pieces": ("first", "all"),
    "mode": ("default", "strict"),
    "overlong": ("error", "truncate", "split"),
}


@dataclasses.dataclass(frozen=True)
class Task(Balance, contracts.Task):
    """Settings of token classification. `labels` are found in the training data where they are not
    given.

    `pieces` says which tokens of a word are trained on; `split`, how a text becomes words when
    predicting; `scheme`, how strict tags are read, found in the training data where the labels
    alone do not tell. A text of too many tokens is an error, is cut, or is read in windows that
    begin every `stride` tokens, each word where it has the most context. Words that were cut off
    count as outside.
    """

    sized: ClassVar[tuple[str, ...]] = PADDED

    tokens: str = "tokens"
    tags: str = "tags"
    labels: tuple[str, ...] = ()
    pieces: str = "first"
    mode: str = "default"
    scheme: str | None = None
    split: str = "words"
    overlong: str = "error"
    stride: int = 0  # 0: half of what has room
    token_dropout: float = 0.0  # share of the tokens that become the unknown one

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            one_of(f"task.{name}", vars(self)[name], choices)
        if self.scheme is not None:
            one_of("task.scheme", self.scheme, entity_metrics.SCHEMES)
        in_range("task.token_dropout", self.token_dropout, least=0, below=1)
        self.check_balance(self.labels)
        if self.mode == "strict" and self.labels and not self.bio:
            raise UserError(
                f"task.mode=strict reads BIO tags, unlike {', '.join(self.labels[:10])}; choose "
                "default"
            )

    @property
    def reads(self) -> Mapping[str, str]:
        return {self.tokens: "text"}

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.tokens, self.tags)

    @property
    def heads(self) -> Heads:
        return {"tag": {"classes": len(self.labels)}}

    @property
    def bio(self) -> bool:
        """Whether the tags mark entities."""
        return entity_metrics.mark_entities(self.labels)

    @property
    def strict_scheme(self) -> str:
        """The scheme by which tags are read strictly; "" where they are read leniently."""
        if self.mode != "strict":
            return ""
        return self.scheme or entity_metrics.usual_scheme(self.labels)

    @property
    def measures(self) -> Measures:
        own = class_metrics.TWO_CLASSES if self.bio else class_metrics.AVERAGED
        return {**class_metrics.LOSS, **class_metrics.ACCURACY, **own}

    @property
    def leading(self) -> tuple[str, ...]:
        return ("f1", "accuracy") if self.bio else ("f1_macro", "accuracy")

    def resolve(self, source: Source) -> Config:
        """Returns the tags found in the training data, unless they are given, that for outside
        first; and the class weights, if they are to follow from the data. Raises UserError, naming
        the record, for tags that are no names.
        """
        check_columns(source, self.columns)
        read = (self.read(source[index], source.where(index)) for index in range(len(source)))
        # A run that is continued has its labels; it is not refused.
        note = check_split(self.split, (words for words, _ in read), refuse=not self.labels)
        if note:
            say(f"warning: {note}")
        if self.labels and not self.weighs and (self.mode != "strict" or self.scheme):
            return {}
        return remembered(source, settings(self), partial(self.find, source))

    def find(self, source: Source) -> Config:
        """Returns the settings that `resolve` finds in the tags of all records."""

        def sentences() -> Iterator[list[str]]:
            for index in range(len(source)):
                yield self.read(source[index], source.where(index))[1]

        counts = Counter(itertools.chain.from_iterable(sentences()))
        labels = self.labels or tuple(sorted(counts, key=lambda label: (label != OUTSIDE, label)))
        found: Config = {} if self.labels else {"labels": labels}
        if self.mode == "strict" and not self.scheme and entity_metrics.mark_entities(labels):
            scheme = entity_metrics.find_scheme(labels, sentences())
            found |= {"scheme": scheme} if scheme != entity_metrics.usual_scheme(labels) else {}
        if self.weighs:
            found |= self.find_weights(labels, np.array([counts[label] for label in labels]))
        return found

    def read(self, record: Record, where: str) -> tuple[list[str], list[str]]:
        """Returns the words and tags of a record: lists, or strings with spaces between them.

        Raises UserError, naming the record, if they are not as many, or not strings; numbers stand
        for the given labels.
        """
        given = (record[self.tokens], record[self.tags])
        words, tags = (split_fields(value) if isinstance(value, str) else value for value in given)
        for name, values in ((self.tokens, words), (self.tags, tags)):
            if not isinstance(values, list) or not values:
                problem = f'column "{name}" holds {values!r:.60}, not one word or more'
                raise RecordError(where, f"{problem}; correct the record")
        if len(words) != len(tags):
            raise RecordError(
                where, f"has {len(words)} words and {len(tags)} tags; correct the record"
            )
        if self.labels:
            tags = [
                self.labels[tag] if type(tag) is int and 0 <= tag < len(self.labels) else tag
                for tag in tags
            ]
            tags = [known_name(tag, self.labels) if isinstance(tag, str) else tag for tag in tags]
        for name, values in ((self.tokens, words), (self.tags, tags)):
            for value in values:
                if not isinstance(value, str) or not (value or name == self.tokens):
                    number = type(value) is int
                    also = "; list the names of numbers in task.labels" if number else ""
                    problem = f'column "{name}" holds {value!r:.60}, not a string'
                    raise RecordError(where, f"{problem}; correct the record{also}")
        return words, tags

    def examples(
        self, source: Source, processors: Processors, max_length: int, train: bool
    ) -> TaggedTexts:
        """Tokenizes a source into rows of `max_length` tokens. Raises UserError, naming the record,
        for a tag that is not among `labels`, and for a text that is too long.
        """
        check_columns(source, self.columns)
        tokenizer = tokenizer_of(processors)
        fits = Fit(tokenizer, max_length, self.overlong, self.stride)

        def make(part: Part) -> Values:
            read = [self.read(part[index], part.where(index)) for index in range(len(part))]
            targets = tag_numbers([tags for _, tags in read], self.labels, part.where)
            encoded = tokenizer.encode_words([words for words, _ in read])
            for index, (own, _) in enumerate(encoded):
                fits.spans(own.size, part.where, index)
            words = {
                "ids": [own for own, _ in encoded],
                "begins": [begins for _, begins in encoded],
            }
            return {**words, "tags": targets}

        columns = {
            "ids": ids(tokenizer.vocab_size),
            "begins": Column("uint32", RAGGED),
            "tags": ids(len(self.labels)),
        }
        ignored = (*LOSS, "pieces", "mode", "scheme", "split", "token_dropout")
        table = row_table(source, columns, row_key(self, tokenizer, max_length, ignored), make)
        dropout = self.token_dropout if train else 0.0
        return TaggedTexts(self.labels, self.pieces, table, fits, dropout)

    def facts(
        self,
        sample: Source,
        examples: Sequence[contracts.Examples],
        processors: Processors,
        max_length: int,
    ) -> list[Fact]:
        """Returns the tags with their counts, and how many texts have more tokens than a row."""
        tables = [one.table for one in examples if isinstance(one, TaggedTexts)]
        special = tokenizer_of(processors).special_count()
        lengths = np.concatenate([table.sizes("ids") for table in tables]) + special
        counts = np.sum([table.counts("tags", len(self.labels)) for table in tables], axis=0)
        return [count_fact(self.labels, counts, "tags"), length_fact(lengths, max_length)]

    def weights(self, batch: Batch) -> Arrays:
        """Returns the number of tokens that have a tag, or the sum of their class weights."""
        return {"tag": (self.weight(batch["labels"]) * batch["label_weights"]).sum()}

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns the sum of the losses of tokens that have a tag."""
        each = self.cross_entropy(outputs["tag"], batch["labels"]) * self.weight(batch["labels"])
        return {"tag": (each * batch["label_weights"]).sum()}

    def predictions(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns each token's best tag [B,L], and the sums of the plain losses and of the weights
        of each row.
        """
        weights = batch["label_weights"]
        each = losses.softmax_cross_entropy(outputs["tag"], batch["labels"]) * weights
        best = outputs["tag"].argmax(axis=-1).astype(jnp.int32)
        return {"tags": best, "losses": each.sum(axis=-1), "weights": weights.sum(axis=-1)}

    def metrics(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> dict[str, float]:
        """Returns the loss of a token, the accuracy over words, and precision, recall and F1 over
        entities (exact spans and kinds, micro-averaged); where tags mark no entities, the averages
        over tags.
        """
        assert isinstance(examples, TaggedTexts)
        total, weight = class_metrics.real_rows(valid, arrays["losses"], arrays["weights"])
        truth, guess = examples.sentence_tags(arrays["tags"], valid)
        values = {
            "loss": total.sum() / weight.sum(),
            "accuracy": seqeval.accuracy_score(truth, guess),
        }
        if not self.bio:
            true, said = (np.concatenate([list(tags) for tags in both]) for both in (truth, guess))
            return class_metrics.defined(
                values | class_metrics.averaged(true, said, np.union1d(true, said))
            )
        return class_metrics.defined(
            values | entity_metrics.scores(truth, guess, self.strict_scheme)
        )

    def entities(self, tags: Sequence[str]) -> list[tuple[str, int, int]]:
        """Returns the kind, first and one-past-last word of each entity; of tags that mark none, of
        each word.
        """
        if not self.bio:
            return [(tag, place, place + 1) for place, tag in enumerate(tags)]
        return entity_metrics.entities(tags, self.strict_scheme)

    def details(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> Record:
        """Returns the table of kinds of entities, or of tags where these mark none."""
        assert isinstance(examples, TaggedTexts)
        truth, guess = (
            [
                (kind, (number, *place))
                for number, tags in enumerate(side)
                for kind, *place in self.entities(tags)
            ]
            for side in examples.sentence_tags(arrays["tags"], valid)
        )
        return {"classes": details.entity_table(truth, guess)}

    def inputs(
        self, examples: Sequence[Value], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Value]:
        """Returns a batch from texts, lists of words, or records with the task's column of words.

        Words that are given are joined by spaces, characters by nothing, to the text that places
        count in.
        """
        tokenizer = tokenizer_of(processors)
        texts, spans = [], []
        for number, example in enumerate(examples):
            value = (
                example.get(self.tokens, example.get("text"))
                if isinstance(example, Mapping)
                else example
            )
            if isinstance(value, list) and all(isinstance(word, str) for word in value):
                value, own = join(value, self.split)
                spans.append(own)
            elif isinstance(value, str):
                # A column of words is read as in training, where blanks separate them.
                column = (
                    isinstance(example, Mapping)
                    and self.tokens in example
                    and self.tokens != "text"
                )
                spans.append(
                    word_spans(value, "spaces" if column and self.split == "words" else self.split)
                )
            if not isinstance(value, str) or not spans[-1]:
                raise UserError(
                    f"{where(number)}: has no word; give a text, a list of words, or an object "
                    f'with "{self.tokens}"'
                )
            texts.append(value)
        words = [
            [text[begin:end] for begin, end in places]
            for text, places in zip(texts, spans, strict=True)
        ]
        sentences = [
            Sentence(*pair, np.zeros(0, np.int32)) for pair in tokenizer.encode_words(words)
        ]
        fits = Fit(tokenizer, max_length, self.overlong, self.stride)
        rows = [
            row
            for index, sentence in enumerate(sentences)
            for row in fits.rows(index, sentence, where)
        ]
        batch = pad_rows(
            [tokenizer.assemble(sentences[row.sentence].ids[row.begin : row.end]) for row in rows],
            tokenizer.pad_id,
        )
        return {**batch, "_texts": texts, "_spans": spans, "_sentences": sentences, "_rows": rows}

    def describe(
        self, outputs: HostBatch, batch: Mapping[str, Value], processors: Processors
    ) -> list[Record]:
        """Returns the entities of each text: text, label, score (the mean probability of its tags),
        and where it starts and ends in the text, in characters.
        """
        tokenizer = tokenizer_of(processors)
        probabilities = np.asarray(jax.nn.softmax(outputs["tag"], axis=-1))
        described = []
        sure = [np.zeros((len(spans), len(self.labels))) for spans in batch["_spans"]]
        for scores, row in zip(probabilities, batch["_rows"], strict=True):
            sure[row.sentence][row.words] = scores[
                places(row, batch["_sentences"][row.sentence], tokenizer)
            ]
        for text, spans, scores in zip(batch["_texts"], batch["_spans"], sure, strict=True):
            count = int(scores.any(axis=1).sum())  # of the words that were not cut off
            found = []
            best = [self.labels[number] for number in scores[:count].argmax(axis=1)]
            for label, first, last in self.entities(best):
                begin, end = spans[first][0], spans[last - 1][1]
                score = float(scores[first:last].max(axis=1).mean())
                found.append(
                    {
                        "text": text[begin:end],
                        "label": label,
                        "score": score,
                        "start": begin,
                        "end": end,
                    }
                )
            described.append({"entities": found})
        return described
