"""Multiple choice: which of N endings continues a context (SWAG, Zellers et al. 2018), or answers a
question about it.

Each ending is read together with the context, in its own row, and gets one score. The softmax is
over the endings."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import contracts, losses
from fmjax.config.numbers import is_count
from fmjax.contracts import (
    Arrays,
    Batch,
    Config,
    Example,
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
from fmjax.data.sources.open import check_columns
from fmjax.data.storage.tables import Column, Table, Values
from fmjax.data.tokenizers.assembling import Assembled
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import RecordError, UserError, in_range, one_of
from fmjax.metrics import classes as class_metrics
from fmjax.metrics import details
from fmjax.tasks.facts import class_fact, length_fact
from fmjax.tasks.row_tables import Part, id_columns, id_rows, id_values, row_key, row_table
from fmjax.tasks.token_rows import (
    PADDED,
    SHORTEN,
    TOO_LONG,
    padded,
    readable,
    tokenizer_of,
)

OVERLONG = ("error", "truncate")


@dataclasses.dataclass(frozen=True)
class Task(contracts.Task):
    """Settings of multiple choice. `endings` names a column for each ending, or one column that
    holds a list.

    `start` may name a column that is put before every ending, such as SWAG's `sent2` or a question;
    `choices`, the number of endings, is inferred from the training data. `label` is the index of
    the correct ending, from 0."""

    sized: ClassVar[tuple[str, ...]] = PADDED

    context: str = "context"
    start: str = ""
    endings: tuple[str, ...] = ("endings",)
    label: str = "label"
    choices: int = 0
    overlong: str = "error"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        one_of("task.overlong", self.overlong, OVERLONG)
        in_range("task.label_smoothing", self.label_smoothing, least=0, below=1)

    @property
    def measures(self) -> Measures:
        return {**class_metrics.LOSS, **class_metrics.ACCURACY}

    @property
    def heads(self) -> Heads:
        return {"choice": {}}

    @property
    def reads(self) -> Mapping[str, str]:
        return dict.fromkeys(
            (self.context, *([self.start] if self.start else []), *self.endings), "text"
        )

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.reads, self.label)

    def resolve(self, source: Source) -> Config:
        """Returns the number of endings of the first record. Raises UserError if a column is
        missing.
        """
        check_columns(source, self.columns)
        return {} if self.choices else {"choices": len(self.read(source[0], source.where(0))[1])}

    def read(self, record: Mapping[str, Value], where: str) -> tuple[str, list[str]]:
        """Returns the context and the endings, each with the text before it.

        Raises UserError, naming the record, if they are not texts, or have the wrong number."""
        start = record[self.start] if self.start else ""
        endings = (
            record[self.endings[0]]
            if len(self.endings) == 1
            else [record[name] for name in self.endings]
        )
        texts = (
            [record[self.context], start, *endings]
            if isinstance(endings, list | tuple)
            else [endings]
        )
        if len(texts) < 4 or not all(isinstance(text, str) for text in texts):
            named = ", ".join(self.reads)
            raise RecordError(
                where,
                f"{named} must be a context and two or more endings, all text; correct the record",
            )
        if self.choices and len(endings) != self.choices:
            raise RecordError(
                where,
                f"has {len(endings)} endings, but other records have {self.choices}; correct the "
                "record",
            )
        return texts[0], [f"{start} {ending}".strip() for ending in endings]

    def target(self, record: Mapping[str, Value], where: str) -> np.int32:
        """Returns the index of the correct ending. Raises UserError, naming the record, if there is
        no such ending.
        """
        value = record[self.label]
        number = int(value) if isinstance(value, str) and is_count(value.strip()) else value
        if type(number) is not int or not 0 <= number < self.choices:
            wanted = f"not the number of an ending, 0 to {self.choices - 1}"
            raise RecordError(
                where, f'column "{self.label}" holds {value!r}, {wanted}; correct the record'
            )
        return np.int32(number)

    def examples(
        self, source: Source, processors: Processors, max_length: int, train: bool
    ) -> Choices:
        """Tokenizes a source into examples of `choices` rows of `max_length` tokens."""
        check_columns(source, self.columns)
        if not self.choices:  # of a Hugging Face folder, which does not say it
            resolved = dataclasses.replace(self, **self.resolve(source))
            return resolved.examples(source, processors, max_length, train)
        tokenizer = tokenizer_of(processors)
        columns = {
            **id_columns(tokenizer, pair=True),
            "sizes": Column("int32", self.choices),
            "target": Column("int32"),
        }

        def make(part: Part) -> Values:
            records = [(part[index], part.where(index)) for index in range(len(part))]
            targets = [self.target(*record) for record in records]
            read = [self.read(*record) for record in records]
            rows = self.rows(read, tokenizer, max_length, part.where)
            sizes = rows.sizes.reshape(len(read), -1)
            together = rows._replace(sizes=sizes.sum(axis=1))
            return {**id_values(together), "sizes": sizes, "target": np.array(targets)}

        key = row_key(self, tokenizer, max_length, ("label_smoothing",))
        return Choices(row_table(source, columns, key, make), tokenizer, max_length)

    def facts(
        self,
        sample: Source,
        examples: Sequence[contracts.Examples],
        processors: Processors,
        max_length: int,
    ) -> list[Fact]:
        """Returns how often each ending is correct, and how many examples are truncated."""
        tokenizer = tokenizer_of(processors)
        read = [self.read(sample[index], sample.where(index)) for index in range(len(sample))]
        contexts = tokenizer.encode_batch([context for context, _ in read])
        endings = [max(ids.size for ids in tokenizer.encode_batch(texts)) for _, texts in read]
        lengths = (
            np.array([ids.size for ids in contexts]) + endings + tokenizer.special_count(pair=True)
        )
        right = np.concatenate([one.labels for one in examples if one.labels is not None])
        names = [str(number) for number in range(self.choices)]
        return [class_fact(names, right, "endings"), length_fact(lengths, max_length)]

    def rows(
        self,
        read: Sequence[tuple[str, list[str]]],
        tokenizer: Tokenizer,
        most: int,
        where: Where,
        advice: str = TOO_LONG,
    ) -> Assembled:
        """Returns the ids and token types of each ending of each example, in at most `most` tokens;
        the longer part of longer ones is truncated. Raises UserError, naming the example and with
        the advice, if truncation is not allowed."""
        room = most - tokenizer.special_count(pair=True)
        if room < 2:
            special = f"the {most - room} special ones"
            raise UserError(
                f"data.max_length={most} leaves no room for two tokens besides {special}; raise it"
            )
        contexts = tokenizer.encode_batch([context for context, _ in read])
        every = iter(tokenizer.encode_batch([text for _, texts in read for text in texts]))
        pairs = []
        for index, (context, (_, texts)) in enumerate(zip(contexts, read, strict=True)):
            endings = list(itertools.islice(every, len(texts)))
            longest = context.size + max(ending.size for ending in endings)
            if longest > room and self.overlong == "error":
                problem = f"{longest + most - room} tokens exceed data.max_length={most}"
                raise RecordError(where(index), f"{problem}; {advice}", index)
            pairs += [shortened(context, ending, room) for ending in endings]
        first, second = zip(*pairs, strict=True)
        return tokenizer.assemble_batch(first, second)

    def weights(self, batch: Batch) -> Arrays:
        """Returns the number of examples."""
        return {"choice": jnp.float32(batch["labels"].shape[0])}

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns the sum of the examples' losses."""
        each = losses.softmax_cross_entropy(
            outputs["choice"][..., 0], batch["labels"], self.label_smoothing
        )
        return {"choice": each.sum()}

    def predictions(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns the scores [B,N], the correct ending and the plain loss of each example."""
        scores, labels = outputs["choice"][..., 0], batch["labels"]
        return {
            "scores": scores,
            "labels": labels,
            "losses": losses.softmax_cross_entropy(scores, labels),
        }

    def metrics(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> dict[str, float]:
        """Returns the loss, and the fraction of examples with the correct ending."""
        lost, scores, labels = class_metrics.real_rows(
            valid, arrays["losses"], arrays["scores"], arrays["labels"]
        )
        return class_metrics.defined(
            {"loss": lost.mean(), "accuracy": np.mean(scores.argmax(axis=1) == labels)}
        )

    def details(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> Record:
        """Returns the examples with the largest losses: their context, correct ending, and chosen
        ending.
        """
        assert isinstance(examples, Choices)
        best, labels = arrays["scores"].argmax(axis=1), arrays["labels"]

        def row(index: int) -> Record:
            right, chosen = (
                examples.ending(index, int(numbers[index])) for numbers in (labels, best)
            )
            return {
                "example": index + 1,
                "text": right,
                "label": str(labels[index]),
                "predicted": f"{best[index]}: {chosen}",
            }

        return {"worst": details.worst(arrays["losses"], valid, row)}

    def inputs(
        self, examples: Sequence[Value], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Value]:
        """Returns a batch [B,N,L] from objects with the task's columns, or pairs of a context and a
        list of endings.
        """
        tokenizer = tokenizer_of(processors)
        read: list[tuple[str, list[str]]] = []
        for number, example in enumerate(examples):
            if isinstance(example, list | tuple) and len(example) == 2:
                endings = example[1] if len(self.endings) > 1 else [example[1]]
                example = {self.start: "", self.context: example[0]} | dict(
                    zip(self.endings, endings, strict=False)
                )
            if not isinstance(example, Mapping) or not set(self.reads) <= set(example):
                raise UserError(
                    f"{where(number)}: is not a question with endings; pass an object with "
                    f"{', '.join(self.reads)}"
                )
            read.append(self.read(example, where(number)))
            if len(read[-1][1]) != len(read[0][1]):
                raise UserError(
                    f"{where(number)}: has {len(read[-1][1])} endings, but {where(0)} has "
                    f"{len(read[0][1])}; use the same number"
                )
        rows = self.rows(read, tokenizer, max_length, where, SHORTEN)
        batch = {
            name: array.reshape(len(read), -1, array.shape[-1])
            for name, array in padded(rows, tokenizer.pad_id).items()
        }
        return {**batch, "_endings": [endings for _, endings in read]}

    def describe(
        self, outputs: HostBatch, batch: Mapping[str, Value], processors: Processors
    ) -> list[Record]:
        """Returns the number and text of the best ending of each example, its probability, and the
        probabilities of all.
        """
        probabilities = np.asarray(jax.nn.softmax(outputs["choice"][..., 0], axis=-1))
        described = []
        for row, endings in zip(probabilities.tolist(), batch["_endings"], strict=True):
            best = int(np.argmax(row))
            described.append(
                {"choice": best, "text": endings[best], "score": row[best], "scores": row}
            )
        return described


def shortened(context: np.ndarray, ending: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns both parts, in at most `most` tokens: the end of the longer one is cut off, or of
    both if they are equally long.
    """
    half = most // 2
    if context.size + ending.size <= most:
        return context, ending
    left = max(half, most - ending.size)  # room that the other part does not need
    return context[:left], ending[: most - min(left, context.size)]


class Choices(contracts.Examples):
    """Contexts with their endings."""

    targets: np.ndarray

    sized = PADDED

    def __init__(self, table: Table, tokenizer: Tokenizer, max_length: int):
        self.table, self.tokenizer, self.max_length = table, tokenizer, max_length
        self.targets = self.labels = table.numbers("target")
        self.sizes = table.numbers("sizes")
        # The length of the longest row, to which shorter ones are padded.
        self.lengths = self.sizes.max(axis=1)
        self.filled = self.sizes.mean(axis=1)

    def __reduce__(self) -> tuple[type[Choices], tuple[Table, Tokenizer, int]]:
        return Choices, (self.table, self.tokenizer, self.max_length)

    def __len__(self) -> int:
        return len(self.table)

    def ending(self, index: int, number: int) -> str:
        """Returns the readable context and ending of an example."""
        ends = np.cumsum(self.sizes[index])[:-1]
        ids = np.split(self.table.value("ids", index), ends)[number]
        return details.shortened(readable(ids, self.tokenizer))

    def __getitem__(self, index: int) -> Example:
        """Returns `input_ids`, `token_type_ids`, `attention_mask` [N,L] and `labels`."""
        return {name: array[0] for name, array in self.drawn(np.array([index])).items()}

    def drawn(self, indices: np.ndarray) -> Example:
        """Returns examples as one batch."""
        sizes = self.sizes[indices]
        rows = id_rows(self.table, indices)._replace(sizes=sizes.reshape(-1))
        batch = padded(rows, self.tokenizer.pad_id, self.max_length)
        shape = (*sizes.shape, self.max_length)
        return {name: array.reshape(shape) for name, array in batch.items()} | {
            "labels": self.targets[indices]
        }
