"""Classification of a text or a pair of texts: one label, several, or a number (regression).

The classifier reads BERT's pooled output (`pool="first"`, Devlin et al. 2019), the mean over the
text's tokens (`"mean"`), or the hidden state at the text's mask token (`"mask"`: which word belongs
here?). Classes of unequal size can be weighted, and easy examples down-weighted (`labels.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import numpy as np

from fmjax import contracts
from fmjax.contracts import (
    Config,
    Example,
    Fact,
    HostBatch,
    Processors,
    Record,
    Source,
    Value,
    Where,
)
from fmjax.data.augment.texts import Augmentation, drop_tokens, mask_span
from fmjax.data.records import records_of
from fmjax.data.sources.open import check_columns
from fmjax.data.storage.tables import Table, Values
from fmjax.data.tokenizers.assembling import Assembled
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import RecordError, UserError, in_range, one_of
from fmjax.tasks.facts import length_fact
from fmjax.tasks.imbalance import LOSS
from fmjax.tasks.labels import LabelTask
from fmjax.tasks.row_tables import (
    Part,
    id_columns,
    id_rows,
    id_values,
    remembered,
    row_key,
    row_table,
    settings,
)
from fmjax.tasks.token_rows import (
    PADDED,
    SHORTEN,
    TOO_LONG,
    keys_of,
    padded,
    readable,
    tokenizer_of,
)

KINDS = ("single", "multi", "regression")
POOLS = ("first", "mean", "mask")
OVERLONG = ("error", "truncate")
BLANK = ("error", "drop")
# Settings on which the rows do not depend.
NOT_OF_ROWS = (*LOSS, "token_dropout", "span_mask")


@dataclasses.dataclass(frozen=True)
class Task(LabelTask):
    """Settings of classification. `labels` are inferred from the training data by default.

    A record whose texts are all blank is an error, or is dropped from every split (`blank="drop"`).
    """

    sized: ClassVar[tuple[str, ...]] = (*PADDED, "pool_weights")

    kind: str = "single"
    text: str = "text"
    text_pair: str = ""
    pool: str = "first"
    overlong: str = "error"
    blank: str = "error"
    token_dropout: float = 0.0  # fraction of the tokens replaced by the unknown token
    span_mask: float = 0.0  # fraction of the tokens replaced by the mask, in one span

    def __post_init__(self) -> None:
        choices = {"kind": KINDS, "pool": POOLS, "overlong": OVERLONG, "blank": BLANK}
        for name, known in choices.items():
            one_of(f"task.{name}", vars(self)[name], known)
        in_range("task.token_dropout", self.token_dropout, least=0, below=1)
        in_range("task.span_mask", self.span_mask, least=0, below=1)
        if self.span_mask and self.pool == "mask":
            raise UserError(
                "task.span_mask would add masks to the one that task.pool=mask reads; set it to 0"
            )
        self.check_balance(self.labels)
        self.check_layout()
        if self.kind == "regression" and (
            self.weighting != "none" or self.class_weights or self.focal_gamma
        ):
            raise UserError(
                "task.kind=regression has no classes; leave task.weighting, class_weights and "
                "focal_gamma out"
            )

    @property
    def head(self) -> str:
        return "classify" if self.pool == "first" else "classify_mean"

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of texts, one or two."""
        return (self.text, self.text_pair) if self.text_pair else (self.text,)

    @property
    def reads(self) -> Mapping[str, str]:
        return dict.fromkeys(self.texts, "text")

    def resolve(self, source: Source) -> Config:
        """Returns the label names in the training data, unless they are given or the task is
        regression; the separator of several labels in a string, unless it is given or "|"; and the
        class weights, if they are inferred from the data.

        Raises UserError, naming the record, if whole-number labels are mixed with others, negative,
        or have gaps, and if the separator is unclear."""
        check_columns(source, self.columns)
        needed = self.kind == "multi" or (
            self.kind == "single" and (self.weighs or not self.labels)
        )
        if not needed:
            return {}

        def find() -> Config:
            kept = self.kept(source)
            if not kept:
                raise UserError(all_blank(source))
            return self.find_labels(source, kept)

        return remembered(source, settings(self), find)

    def examples(
        self, source: Source, processors: Processors, max_length: int, train: bool
    ) -> LabeledTexts:
        """Tokenizes a source into examples of `max_length` tokens."""
        check_columns(source, self.columns)
        tokenizer = tokenizer_of(processors)
        columns = {
            **id_columns(tokenizer, self.text_pair != ""),
            "target": self.target_column,
        }

        def make(part: Part) -> Values:
            kept = self.kept(part)
            targets = self.targets(part, kept)
            records = [part[index] for index in kept]
            rows = self.rows(
                records, tokenizer, max_length, lambda number: part.where(kept[number])
            )
            return {**id_values(rows), "target": targets}

        key = row_key(self, tokenizer, max_length, NOT_OF_ROWS)
        table = row_table(source, columns, key, make)
        if not len(table):
            raise UserError(all_blank(source))
        augmentations = self.augmentations(tokenizer) if train else ()
        return LabeledTexts(self, table, tokenizer, max_length, augmentations)

    def facts(
        self,
        sample: Source,
        examples: Sequence[contracts.Examples],
        processors: Processors,
        max_length: int,
    ) -> list[Fact]:
        """Returns the labels with their counts, and how many texts are truncated."""
        tokenizer = tokenizer_of(processors)
        read = [sample[index] for index in self.kept(sample)]
        of_labels = super().facts(sample, examples, processors, max_length)
        if not read:
            return of_labels
        parts = [
            tokenizer.encode_batch([record[column] for record in read]) for column in self.texts
        ]
        lengths = np.sum(
            [[ids.size for ids in part] for part in parts], axis=0
        ) + tokenizer.special_count(len(parts) == 2)
        return [*of_labels, length_fact(lengths, max_length)]

    def augmentations(self, tokenizer: Tokenizer) -> tuple[Augmentation, ...]:
        """Returns the augmentations of training texts, applied at each draw."""
        dropped = (
            (partial(drop_tokens, tokenizer=tokenizer, share=self.token_dropout),)
            if self.token_dropout
            else ()
        )
        return dropped + (
            (partial(mask_span, tokenizer=tokenizer, share=self.span_mask),)
            if self.span_mask
            else ()
        )

    def kept(self, source: Source) -> Sequence[int]:
        """Returns the indices of the records that are kept."""
        if self.blank == "error":
            return range(len(source))
        every = range(len(source))
        read = zip(every, records_of(source, every), strict=True)
        return [index for index, record in read if not self.is_blank(record)]

    def is_blank(self, record: Mapping[str, Value]) -> bool:
        """Returns whether all of a record's texts are empty or white space."""
        return all(
            isinstance(record[column], str) and not record[column].strip() for column in self.texts
        )

    def rows(
        self,
        records: Sequence[Mapping[str, Value]],
        tokenizer: Tokenizer,
        most: int,
        where: Where,
        advice: str = TOO_LONG,
    ) -> Assembled:
        """Returns the ids and token types of each record, in at most `most` tokens.

        Raises UserError, naming the record, if a text is not a string, is too long and may not be
        truncated (with the advice), or lacks the mask token that the classifier reads."""
        for index, record in enumerate(records):
            for column in self.texts:
                if not isinstance(record[column], str):
                    problem = (
                        f'column "{column}" holds {record[column]!r}, not text; correct the record'
                    )
                    raise RecordError(where(index), problem, index)
            if self.is_blank(record):
                problem = (
                    f"{' and '.join(self.texts)} is blank; correct it, or choose task.blank=drop"
                )
                raise RecordError(where(index), problem, index)
        special = tokenizer.special_count(pair=len(self.texts) == 2)
        if most <= special:
            raise UserError(
                f"data.max_length={most} leaves no room for a token besides the {special} special "
                "ones; raise it"
            )
        parts = [
            tokenizer.encode_batch([record[column] for record in records]) for column in self.texts
        ]
        sizes = special + np.sum([[ids.size for ids in part] for part in parts], axis=0)
        masked = self.pool == "mask"
        for index in range(len(records)) if masked else np.flatnonzero(sizes > most).tolist():
            own = [part[index] for part in parts]
            if sizes[index] > most:
                if self.overlong == "error":
                    problem = f"{sizes[index]} tokens exceed data.max_length={most}"
                    raise RecordError(where(index), f"{problem}; {advice}", index)
                own = self.truncate(own, most - special, tokenizer)
                for part, ids in zip(parts, own, strict=True):
                    part[index] = ids
            if masked and not (tokenizer.assemble(*own)[0] == tokenizer.mask_id).any():
                mask = tokenizer.token(tokenizer.mask_id)
                problem = f"the text has no {mask}; task.pool=mask needs one"
                raise RecordError(where(index), problem, index)
        return tokenizer.assemble_batch(*parts)

    def truncate(
        self, parts: Sequence[np.ndarray], most: int, tokenizer: Tokenizer
    ) -> list[np.ndarray]:
        """Cuts tokens off the longer text, one by one; with `pool="mask"`, keeps a window around
        the mask.
        """
        lengths = [len(ids) for ids in parts]
        while sum(lengths) > most:
            lengths[int(np.argmax(lengths))] -= 1
        begins = [0] * len(parts)
        if self.pool == "mask":
            for part, ids in enumerate(parts):
                for place in np.flatnonzero(ids == tokenizer.mask_id)[:1]:
                    begins[part] = int(
                        np.clip(place - lengths[part] // 2, 0, len(ids) - lengths[part])
                    )
        return [
            ids[begin : begin + length]
            for ids, begin, length in zip(parts, begins, lengths, strict=True)
        ]

    def pool_weights(self, ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        """Returns float32 weights like `ids`: the first mask token, or all tokens that are not
        special."""
        if self.pool == "mask":
            masks = ids == tokenizer.mask_id
            return np.asarray(masks & (masks.cumsum(axis=-1) == 1), np.float32)
        return np.asarray(~tokenizer.special_mask[ids] | (ids == tokenizer.unk_id), np.float32)

    def inputs(
        self, examples: Sequence[Value], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Value]:
        """Returns a batch from texts, pairs of texts, or records with the task's text columns."""
        tokenizer = tokenizer_of(processors)
        records: list[Mapping[str, Value]] = []
        for number, example in enumerate(examples):
            if not isinstance(example, Mapping):
                texts = example if isinstance(example, list | tuple) else (example,)
                if len(texts) > len(self.texts):
                    raise UserError(
                        f"{where(number)}: has {len(texts)} texts; the task reads "
                        f"{', '.join(self.texts)}"
                    )
                example = dict(zip(self.texts, texts, strict=False))
            if missing := [column for column in self.texts if column not in example]:
                has = keys_of(example)
                raise UserError(
                    f'{where(number)}: lacks "{missing[0]}"; the task reads '
                    f"{', '.join(self.texts)}{has}"
                )
            records.append(example)
        rows = self.rows(records, tokenizer, max_length, where, SHORTEN)
        batch: dict[str, Value] = dict(padded(rows, tokenizer.pad_id))
        return (
            batch
            if self.pool == "first"
            else batch | {"pool_weights": self.pool_weights(batch["input_ids"], tokenizer)}
        )

    def describe(
        self, outputs: HostBatch, batch: HostBatch, processors: Processors
    ) -> list[Record]:
        """Returns the label and score of each text; all labels above one half in the multi-label
        case; or the number.
        """
        return self.described(outputs[self.head])


class LabeledTexts(contracts.Examples):
    """Tokenized, labeled texts; `draw` applies the augmentations, in order."""

    targets: np.ndarray

    sized = Task.sized

    def __init__(
        self,
        task: Task,
        table: Table,
        tokenizer: Tokenizer,
        max_length: int,
        augmentations: Sequence[Augmentation],
    ):
        self.task, self.table, self.tokenizer = task, table, tokenizer
        self.max_length, self.augmentations = max_length, augmentations
        self.targets = self.labels = table.numbers("target")
        self.lengths = table.sizes("ids")
        # For resampling by data.balance.
        self.classes = self.targets if task.kind == "single" else None

    def __reduce__(self) -> tuple[type[LabeledTexts], tuple[Value, ...]]:
        own = (self.task, self.table, self.tokenizer, self.max_length, self.augmentations)
        return LabeledTexts, own

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Example:
        """Returns `input_ids`, `token_type_ids`, `attention_mask` [L] and `labels`, and
        `pool_weights [L]` if pooled.
        """
        return {name: array[0] for name, array in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> Example:
        """Returns examples as one batch, before they are drawn."""
        rows = id_rows(self.table, indices)
        batch = padded(rows, self.tokenizer.pad_id, self.max_length)
        if self.task.pool != "first":
            batch["pool_weights"] = self.task.pool_weights(batch["input_ids"], self.tokenizer)
        return batch | {"labels": self.targets[indices]}

    def drawn(self, indices: np.ndarray) -> Example | None:
        return None if self.augmentations else self.batch(indices)

    def text(self, index: int) -> str:
        return readable(self.table.value("ids", index), self.tokenizer)

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        for augment in self.augmentations:
            example = example | {"input_ids": augment(example["input_ids"], rng)}
        return example


def all_blank(source: Source) -> str:
    return f"{source.where(0)}: this record and all others are blank; use data with text"
