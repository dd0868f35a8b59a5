"""Classification of a text or a pair of texts: one label, several, or a number (regression).

The classifier reads BERT's pooled output (`pool="first"`, Devlin et al. 2019), the mean over the text's tokens
(`"mean"`), or the hidden state at the text's mask token (`"mask"`: which word stands here?). Classes of unequal size can
be weighed, and easy examples count for less (`balance.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import losses
from fmjax.contracts import Examples
from fmjax.data.augment.texts import Augmentation, drop_tokens, mask_span
from fmjax.data.sources.open import Source, check_columns
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import RecordError, UserError, nearest
from fmjax.metrics import classes as class_metrics
from fmjax.tasks import Batch, Example, Where
from fmjax.tasks.balance import Balance
from fmjax.tasks.corpus import PADDED, pad_rows

KINDS = ("single", "multi", "regression")
POOLS = ("first", "mean", "mask")
OVERLONG = ("error", "truncate")
BLANK = ("error", "drop")
SEPARATOR = "|"  # between the labels of a multi-label record in a csv or tsv file


@dataclasses.dataclass(frozen=True)
class Task(Balance):
    """Settings of classification. `labels` are found in the training data where they are not given.

    A record whose texts are all blank is an error, or left out (`blank="drop"`) of every split.
    """

    kind: str = "single"
    text: str = "text"
    text_pair: str = ""
    label: str = "label"
    labels: tuple[str, ...] = ()
    pool: str = "first"
    overlong: str = "error"
    blank: str = "error"
    token_dropout: float = 0.0  # share of the tokens that become the unknown one
    span_mask: float = 0.0  # share of the tokens that become the mask, one span

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("pool", POOLS), ("overlong", OVERLONG), ("blank", BLANK)):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f'task.{name}="{value}"{nearest(value, choices)}: choose one of {", ".join(choices)}')
        for name in ("token_dropout", "span_mask"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"task.{name}={getattr(self, name)}: must be at least 0 and less than 1")
        if self.span_mask and self.pool == "mask":
            raise UserError("task.span_mask would put masks beside the one that task.pool=mask reads; set it to 0")
        self.check_balance(self.labels)
        if self.kind == "regression" and (self.weighting != "none" or self.class_weights or self.focal_gamma):
            raise UserError("task.kind=regression has no classes; leave task.weighting, class_weights and focal_gamma out")

    @property
    def heads(self) -> dict[str, dict[str, Any]]:
        return {self.head: {"classes": 1 if self.kind == "regression" else len(self.labels)}}

    @property
    def head(self) -> str:
        return "classify" if self.pool == "first" else "classify_mean"

    @property
    def measures(self) -> tuple[str, ...]:
        if self.kind == "single":
            return ("loss", *class_metrics.CLASSIFICATION, *(class_metrics.TWO_CLASSES if len(self.labels) == 2 else ()))
        return ("loss", *(class_metrics.MULTILABEL if self.kind == "multi" else class_metrics.REGRESSION))

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text, self.text_pair) if self.text_pair else (self.text,)

    def resolve(self, source: Source) -> dict[str, Any]:
        """Returns the label names found in the training data, unless they are given or the task is regression; and the
        class weights, if they are to follow from the data.

        Raises UserError, naming the record, if whole-number labels are mixed with others, negative, or have gaps.
        """
        check_columns(source, (*self.columns, self.label))
        if self.kind == "regression" or (self.labels and not self.weighs):
            return {}
        first: dict[str, int] = {}
        counts: Counter[str] = Counter()
        kept = self.kept(source)
        for index in kept:
            values = self.values(source, index)
            counts.update(set(values))
            for value in values:
                first.setdefault(value, index)
        labels = self.labels or self.names(source, first)
        found: dict[str, Any] = {} if self.labels else {"labels": labels}
        if self.weighs:
            total = len(kept) if self.kind == "multi" else None
            found |= self.find_weights(labels, np.array([counts[label] for label in labels]), total)
        return found

    def names(self, source: Source, first: Mapping[str, int]) -> tuple[str, ...]:
        """Returns the label names in order, of those that were found and where each was first; whole numbers by their value.

        Raises UserError, naming the record, if whole numbers are mixed with others, negative, or have gaps.
        """
        numbers = {name for name in first if name.lstrip("-").isdigit()}
        if not numbers:
            return tuple(sorted(first))
        for name, index in first.items():
            if name not in numbers or not 0 <= int(name) < len(first):
                found = ", ".join(sorted(first)[:10])
                raise RecordError(
                    source.where(index),
                    f'label "{name}" does not fit; whole-number labels run from 0 without gaps and '
                    f"those of the training data are {found}; correct the record, or list the labels in task.labels",
                    index,
                )
        return tuple(map(str, range(len(first))))

    def values(self, source: Source, index: int) -> list[str]:
        """Returns the label names of a record. Raises UserError, naming it, if there is none or it is not a name."""
        value = source.value(index, self.label)
        items = [value]
        if self.kind == "multi" and isinstance(value, str | list):
            items = value.split(SEPARATOR) if isinstance(value, str) else value
        for item in items:
            if isinstance(item, bool) or not isinstance(item, str | int) or not str(item).strip():
                if self.kind == "multi" and item == "":
                    continue
                raise RecordError(
                    source.where(index), f'column "{self.label}" holds {item!r}, not a label; correct the record', index
                )
        return [str(item).strip() for item in items if item != ""]

    def target(self, source: Source, index: int) -> Any:
        """Returns a record's target: int32 class, float32 [C] of 0 and 1, or float32 number.

        Raises UserError, naming the record, for a label that is not among `labels` or a value that is not a number.
        """
        if self.kind == "regression":
            value = source.value(index, self.label)
            try:
                number = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise RecordError(
                    source.where(index), f'column "{self.label}" holds {value!r}, not a number; correct the record', index
                )
            return np.float32(number)
        names = self.values(source, index)
        for name in names:
            if name not in self.labels:
                raise RecordError(
                    source.where(index),
                    f'label "{name}" is out of range{nearest(name, self.labels)}; '
                    f"the labels are {', '.join(self.labels)}; correct the record, or list all labels in task.labels",
                    index,
                )
        if self.kind == "single":
            return np.int32(self.labels.index(names[0]))
        return np.isin(self.labels, names).astype(np.float32)

    def examples(self, source: Source, tokenizer: Tokenizer, max_length: int, train: bool) -> Texts:
        """Tokenises a source into examples of `max_length` tokens."""
        check_columns(source, (*self.columns, self.label))
        kept = self.kept(source)
        targets = np.stack([self.target(source, index) for index in kept])
        records = [source[index] for index in kept]
        rows = self.rows(records, tokenizer, max_length, lambda index: source.where(kept[index]))
        return Texts(self, rows, targets, tokenizer, max_length, self.augmentations(tokenizer) if train else ())

    def augmentations(self, tokenizer: Tokenizer) -> tuple[Augmentation, ...]:
        """Returns what changes a text anew each time that it is drawn, in training."""
        dropped = (partial(drop_tokens, tokenizer=tokenizer, share=self.token_dropout),) if self.token_dropout else ()
        return dropped + ((partial(mask_span, tokenizer=tokenizer, share=self.span_mask),) if self.span_mask else ())

    def kept(self, source: Source) -> list[int]:
        """Returns the numbers of the records that are not left out. Raises UserError if none is."""
        kept = [index for index in range(len(source)) if self.blank == "error" or not self.is_blank(source[index])]
        if not kept:
            raise UserError(f"{source.where(0)}: this and every other record is blank; give data with text")
        return kept

    def is_blank(self, record: Mapping[str, Any]) -> bool:
        """Returns whether all of a record's texts are empty or white space."""
        return all(isinstance(record[column], str) and not record[column].strip() for column in self.columns)

    def rows(self, records: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, most: int, where: Where) -> list[tuple]:
        """Returns (ids, token types) of each record, in at most `most` tokens.

        Raises UserError, naming the record, where a text is not a string, is too long and may not be truncated, or
        lacks the mask token at which the classifier is to read.
        """
        for index, record in enumerate(records):
            for column in self.columns:
                if not isinstance(record[column], str):
                    raise RecordError(
                        where(index), f'column "{column}" holds {record[column]!r}, not text; correct the record', index
                    )
            if self.is_blank(record):
                raise RecordError(
                    where(index), f"{' and '.join(self.columns)} is blank; correct it, or choose task.blank=drop", index
                )
        special = tokenizer.special_count(pair=len(self.columns) == 2)
        if most <= special:
            raise UserError(f"data.max_length={most} leaves no room for a token beside the {special} special ones; raise it")
        parts = [tokenizer.encode_batch([record[column] for record in records]) for column in self.columns]
        rows = []
        for index, ids in enumerate(zip(*parts, strict=True)):
            row = tokenizer.assemble(*ids)
            if row[0].size > most:
                if self.overlong == "error":
                    raise RecordError(
                        where(index),
                        f"{row[0].size} tokens are more than data.max_length={most}; "
                        "raise it, or choose task.overlong=truncate",
                        index,
                    )
                row = tokenizer.assemble(*self.truncate(ids, most - special, tokenizer))
            if self.pool == "mask" and not (row[0] == tokenizer.mask_id).any():
                raise RecordError(
                    where(index), f"the text has no {tokenizer.token(tokenizer.mask_id)}; task.pool=mask needs one", index
                )
            rows.append(row)
        return rows

    def truncate(self, parts: Sequence[np.ndarray], most: int, tokenizer: Tokenizer) -> list[np.ndarray]:
        """Cuts token by token off the longer text; with `pool="mask"`, keeps a window around the mask."""
        lengths = [len(ids) for ids in parts]
        while sum(lengths) > most:
            lengths[int(np.argmax(lengths))] -= 1
        begins = [0] * len(parts)
        if self.pool == "mask":
            for part, ids in enumerate(parts):
                for place in np.flatnonzero(ids == tokenizer.mask_id)[:1]:
                    begins[part] = int(np.clip(place - lengths[part] // 2, 0, len(ids) - lengths[part]))
        return [ids[begin : begin + length] for ids, begin, length in zip(parts, begins, lengths, strict=True)]

    def pool_weights(self, ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        """Returns float32 weights like `ids`: the first mask token, or all that are not special."""
        if self.pool == "mask":
            masks = ids == tokenizer.mask_id
            return (masks & (masks.cumsum(axis=-1) == 1)).astype(np.float32)
        return (~tokenizer.special_mask[ids] | (ids == tokenizer.unk_id)).astype(np.float32)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns the number of examples, or the sum of their class weights."""
        labels = batch["labels"]
        if self.kind == "multi":
            return {"classify": self.label_weight(labels).mean(axis=-1).sum()}
        return {"classify": jnp.float32(labels.shape[0]) if self.kind == "regression" else self.weight(labels).sum()}

    def losses(self, outputs: Batch, labels: jax.Array) -> jax.Array:
        """Returns the loss of each example [B], times its weight."""
        logits = outputs[self.head]
        if self.kind == "regression":
            return losses.squared_error(logits[:, 0], labels)
        if self.kind == "multi":
            return losses.sigmoid_cross_entropy(logits, labels, self.focal_gamma, self.label_weight(labels))
        return self.cross_entropy(logits, labels) * self.weight(labels)

    def loss(self, outputs: Batch, batch: Batch) -> dict[str, jax.Array]:
        """Returns the sum of the examples' losses."""
        return {"classify": self.losses(outputs, batch["labels"]).sum()}

    def predictions(self, outputs: Batch, batch: Batch) -> dict[str, jax.Array]:
        """Returns each example's logits, target and plain loss: without smoothing, weights and focus."""
        plain = dataclasses.replace(self, label_smoothing=0.0, weighting="none", class_weights=(), focal_gamma=0.0)
        return {"logits": outputs[self.head], "labels": batch["labels"], "losses": plain.losses(outputs, batch["labels"])}

    def metrics(self, arrays: Mapping[str, np.ndarray], valid: np.ndarray, examples: Any = None) -> dict[str, float]:
        """Returns the loss and the metrics of the kind of labels."""
        loss = {"loss": float(arrays["losses"][valid > 0].mean())}
        if self.kind == "regression":
            return loss | class_metrics.regression(arrays["logits"][:, 0], arrays["labels"], valid)
        judge = class_metrics.multilabel if self.kind == "multi" else class_metrics.classification
        return loss | judge(arrays["logits"], arrays["labels"], valid)

    def inputs(self, examples: Sequence[Any], tokenizer: Tokenizer, max_length: int, where: Where) -> dict[str, np.ndarray]:
        """Returns a batch from texts, pairs of texts, or records with the task's text columns."""
        records = []
        for number, example in enumerate(examples):
            if not isinstance(example, Mapping):
                texts = example if isinstance(example, list | tuple) else (example,)
                if len(texts) > len(self.columns):
                    raise UserError(f"{where(number)}: has {len(texts)} texts; the task reads {', '.join(self.columns)}")
                example = dict(zip(self.columns, texts, strict=False))
            if missing := [column for column in self.columns if column not in example]:
                raise UserError(f'{where(number)}: lacks "{missing[0]}"; the task reads {", ".join(self.columns)}')
            records.append(example)
        rows = self.rows(records, tokenizer, max_length, where)
        batch = pad_rows(rows, tokenizer.pad_id)
        return batch if self.pool == "first" else batch | {"pool_weights": self.pool_weights(batch["input_ids"], tokenizer)}

    def describe(self, outputs: Batch, batch: Batch, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """Returns the label and score of each text; all labels above one half if there may be several; or the number."""
        logits = np.asarray(outputs[self.head], np.float32)
        if self.kind == "regression":
            return [{"score": float(value)} for value in logits[:, 0]]
        scores = np.asarray(jax.nn.sigmoid(logits) if self.kind == "multi" else jax.nn.softmax(logits, axis=-1))
        described: list[dict[str, Any]] = []
        for row in scores:
            scored = {label: float(score) for label, score in zip(self.labels, row, strict=True)}
            if self.kind == "multi":
                described.append({"labels": [name for name, score in scored.items() if score > 0.5], "scores": scored})
            else:
                best = int(row.argmax())
                described.append({"label": self.labels[best], "score": float(row[best]), "scores": scored})
        return described


class Texts(Examples):
    """Tokenised, labelled texts; `draw` applies the augmentations, in order."""

    sized = (*PADDED, "pool_weights")

    def __init__(
        self,
        task: Task,
        rows: list[tuple],
        targets: np.ndarray,
        tokenizer: Tokenizer,
        max_length: int,
        augmentations: Sequence[Augmentation],
    ):
        self.task, self.rows, self.targets = task, rows, targets
        self.tokenizer, self.max_length, self.augmentations = tokenizer, max_length, augmentations

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Returns `input_ids`, `token_type_ids`, `attention_mask` [L] and `labels`, and `pool_weights [L]` if pooled."""
        row = pad_rows([self.rows[index]], self.tokenizer.pad_id, self.max_length)
        if self.task.pool != "first":
            row["pool_weights"] = self.task.pool_weights(row["input_ids"], self.tokenizer)
        return {name: array[0] for name, array in row.items()} | {"labels": self.targets[index]}

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each example has [N]."""
        return np.array([ids.size for ids, _ in self.rows])

    @property
    def classes(self) -> np.ndarray | None:
        """The class of each example [N], by which data.balance resamples; None where there may be several, or none."""
        return self.targets if self.task.kind == "single" else None

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        for augment in self.augmentations:
            example = example | {"input_ids": augment(example["input_ids"], rng)}
        return example
