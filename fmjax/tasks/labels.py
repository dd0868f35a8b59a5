"""Shared by tasks with classes: label names found in the data, targets, losses and metrics."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import contracts, losses
from fmjax.config.numbers import number_of
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
)
from fmjax.data.kinds import label as label_kind
from fmjax.data.kinds import separators
from fmjax.data.records import values_of
from fmjax.data.storage.tables import Column
from fmjax.errors import RecordError, UserError, nearest
from fmjax.metrics import classes as class_metrics
from fmjax.metrics import details
from fmjax.tasks import facts
from fmjax.tasks.imbalance import Balance

KNOWN = 2**16  # values of labels that are remembered while records are read


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelTask(Balance, contracts.Task):
    """A task of examples with one label each, from the column `label`; `labels` are found in the
    training data where they are not given. Of the kind "multi" an example has any number of labels,
    of the kind "regression" a number.

    Several labels are a list, a string, or 0 and 1 in columns of their own, `label_columns`. What
    stands between the labels in a string, `separator`, is found in the training data where it is
    not given; "none": each string is one label.
    """

    label: str = "label"
    labels: tuple[str, ...] = ()
    separator: str = ""
    label_columns: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        """The head that predicts the labels."""
        return "classify"

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.reads, *(self.label_columns or (self.label,)))

    def check_layout(self) -> None:
        """Raises UserError for a layout of labels that does not fit the kind of labels, or the
        labels.
        """
        for name in ("separator", "label_columns"):
            if vars(self)[name] and self.kind != "multi":
                raise UserError(
                    f"task.{name} is for several labels per record; set task.kind=multi, or leave "
                    "it out"
                )
        if self.separator and self.label_columns:
            raise UserError(
                "task.separator and task.label_columns are two layouts of labels; leave one of "
                "them out"
            )
        for name in self.label_columns:
            if self.label_columns.count(name) > 1:
                raise UserError(f'task.label_columns: "{name}" occurs twice; name each column once')
        if self.labels and self.label_columns and self.labels != self.label_columns:
            raise UserError(
                f"task.labels={','.join(self.labels)} are not "
                f"task.label_columns={','.join(self.label_columns)}, which name the labels; leave "
                "task.labels out"
            )

    @property
    def heads(self) -> Heads:
        return {self.head: {"classes": 1 if self.kind == "regression" else len(self.labels)}}

    @property
    def measures(self) -> Measures:
        if self.kind == "single":
            two = class_metrics.TWO_CLASSES if len(self.labels) == 2 else {}
            return {**class_metrics.LOSS, **class_metrics.CLASSIFICATION, **two}
        more = class_metrics.MULTILABEL if self.kind == "multi" else class_metrics.REGRESSION
        return {**class_metrics.LOSS, **more}

    @property
    def leading(self) -> tuple[str, ...]:
        if self.kind == "single":
            return ("accuracy", "f1" if len(self.labels) == 2 else "f1_macro")
        return ("f1_micro", "f1_macro") if self.kind == "multi" else ("pearson", "mae")

    def find_labels(self, source: Source, indices: Sequence[int]) -> Config:
        """Returns the settings `labels`, unless they are given or the task is regression;
        `separator`, if labels stand in strings with another one than "|" between them; and
        `class_weights`, if they are to follow from the data: those of the records `indices`.

        Raises UserError, naming the record, if whole-number labels are mixed with others, negative,
        or have gaps, and if what separates labels cannot be told.
        """
        if self.kind == "regression":
            return {}
        found: Config = {}
        if self.label_columns:
            found |= {} if self.labels else {"labels": self.label_columns}
        elif self.kind == "multi" and not self.separator:
            found |= self.find_separator(source, indices)
        task = dataclasses.replace(self, **found)
        if task.labels and not task.weighs:
            return found
        first: dict[str, int] = {}
        counts: Counter[str] = Counter()
        for index, names in zip(indices, task.names_of(source, indices), strict=True):
            counts.update(set(names))
            for name in names:
                first.setdefault(name, index)
        labels = task.labels or label_kind.ordered(first, source.where)
        found |= {} if task.labels else {"labels": labels}
        if self.weighs:
            total = len(indices) if self.kind == "multi" else None
            found |= self.find_weights(labels, np.array([counts[label] for label in labels]), total)
        return found

    def find_separator(self, source: Source, indices: Sequence[int]) -> Config:
        """Returns the setting `separator`, if it is another one than "|"."""
        first: dict[str, int] = {}
        for index, value in zip(indices, values_of(source, self.label, indices), strict=True):
            if isinstance(value, str) and not isinstance(value, label_kind.ClassName):
                first.setdefault(value, index)
        found = separators.find(first, source.where, self.label, self.labels)
        return {} if found == separators.DEFAULT else {"separator": found}

    def names_of(self, source: Source, indices: Sequence[int]) -> Iterator[list[str]]:
        """Yields the label names of each of some records, as `label_names` returns them. Each
        string or number is judged once."""
        if self.label_columns:
            yield from (self.label_names(source, index) for index in indices)
            return
        known: dict[tuple[type, Value], list[str]] = {}
        for index, value in zip(indices, values_of(source, self.label, indices), strict=True):
            key = type(value), value
            if key[0] not in (str, int):  # such as `ClassName`, which is not only its text
                yield self.label_names(source, index)
                continue
            if key not in known and len(known) < KNOWN:
                known[key] = self.label_names(source, index)
            yield known[key] if key in known else self.label_names(source, index)

    def label_names(self, source: Source, index: int) -> list[str]:
        """Returns the label names of a record. Raises UserError, naming it, if there is none or it
        is not a name.
        """
        if self.label_columns:
            record, where = source[index], source.where(index)
            return [
                name for name in self.label_columns if label_kind.flag(record[name], where, name)
            ]
        value, separator = source.value(index, self.label), self.separator or separators.DEFAULT
        several = self.kind == "multi"
        names = label_kind.names_of(value, source.where(index), self.label, several, separator)
        return [label_kind.known_name(name, self.labels) for name in names]

    @property
    def target_column(self) -> Column:
        """The type of `target`."""
        if self.kind == "single":
            return Column("int32")
        return Column("float32", len(self.labels) if self.kind == "multi" else 0)

    def targets(self, source: Source, indices: Sequence[int]) -> np.ndarray:
        """Returns the targets of records: int32 classes [N], float32 [N, C] of 0 and 1, or float32
        numbers [N].

        Raises UserError, naming the record, for a label that is not among `labels` or a value that
        is not a number.
        """
        if self.kind == "regression":
            return np.array([self.number(source, index) for index in indices], np.float32)
        numbers: dict[str, list[int]] = {}
        for number, name in enumerate(self.labels):
            numbers.setdefault(name, []).append(number)
        found = []
        for index, names in zip(indices, self.names_of(source, indices), strict=True):
            for name in names:
                if name not in numbers:
                    raise RecordError(source.where(index), self.out_of_range(name), index)
            found.append([number for name in names for number in numbers[name]])
        if self.kind == "single":
            return np.array([own[0] for own in found], np.int32)
        targets = np.zeros((len(found), len(self.labels)), np.float32)
        for row, own in zip(targets, found, strict=True):
            row[own] = 1
        return targets

    def out_of_range(self, name: str) -> str:
        """Returns what is wrong with a label that is not among `labels`."""
        return (
            f'label "{name}" is out of range{nearest(name, self.labels)}; the labels are '
            f"{', '.join(self.labels)}; correct the record, or list all labels in task.labels"
        )

    def number(self, source: Source, index: int) -> np.float32:
        """Returns the target of a regression."""
        value = source.value(index, self.label)
        value = value.number if isinstance(value, label_kind.ClassName) else value
        try:
            return np.float32(number_of(value))
        except ValueError:
            problem = f'column "{self.label}" holds {value!r}, not a number; correct the record'
            raise RecordError(source.where(index), problem, index) from None

    def facts(
        self,
        sample: Source,
        examples: Sequence[contracts.Examples],
        processors: Processors,
        max_length: int,
    ) -> list[Fact]:
        """Returns the labels with their counts, and what a constant answer scores."""
        labels = [one.labels for one in examples if one.labels is not None]
        if not labels:
            return []
        joined = np.concatenate(labels)
        if self.kind == "regression":
            return [facts.number_fact(joined)]
        if self.kind == "single":
            return [facts.class_fact(self.labels, joined)]
        layout = (
            "columns of 0 and 1"
            if self.label_columns
            else f'separated by "{self.separator or separators.DEFAULT}"'
        )
        return [facts.several_fact(self.labels, joined, layout)]

    def weights(self, batch: Batch) -> Arrays:
        """Returns the number of examples, or the sum of their class weights."""
        labels = batch["labels"]
        if self.kind == "multi":
            return {"classify": self.label_weight(labels).mean(axis=-1).sum()}
        if self.kind == "regression":
            return {"classify": jnp.float32(labels.shape[0])}
        return {"classify": self.weight(labels).sum()}

    def losses(self, outputs: Batch, labels: jax.Array) -> jax.Array:
        """Returns the loss of each example [B], times its weight."""
        logits = outputs[self.head]
        if self.kind == "regression":
            return losses.squared_error(logits[:, 0], labels)
        if self.kind == "multi":
            return losses.sigmoid_cross_entropy(
                logits, labels, self.focal_gamma, self.label_weight(labels)
            )
        return self.cross_entropy(logits, labels) * self.weight(labels)

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns the sum of the examples' losses."""
        return {"classify": self.losses(outputs, batch["labels"]).sum()}

    def predictions(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns each example's logits, target and plain loss: without smoothing, weights and
        focus.
        """
        plain = dataclasses.replace(
            self, label_smoothing=0.0, weighting="none", class_weights=(), focal_gamma=0.0
        )
        return {
            "logits": outputs[self.head],
            "labels": batch["labels"],
            "losses": plain.losses(outputs, batch["labels"]),
        }

    def metrics(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> dict[str, float]:
        """Returns the loss and the metrics of the kind of labels."""
        loss = {"loss": float(arrays["losses"][valid > 0].mean())}
        if self.kind == "regression":
            return loss | class_metrics.regression(arrays["logits"][:, 0], arrays["labels"], valid)
        judge = class_metrics.multilabel if self.kind == "multi" else class_metrics.classification
        return loss | judge(arrays["logits"], arrays["labels"], valid)

    def details(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> Record:
        """Returns the table of classes and, of one label per example, which are taken for which;
        and the worst examples.
        """
        logits, labels, real = np.asarray(arrays["logits"], np.float32), arrays["labels"], valid > 0
        found: Record = {}
        if self.kind == "regression":
            names = [
                [f"{value:.4g}" for value in values.tolist()] for values in (labels, logits[:, 0])
            ]
        elif self.kind == "multi":
            truth, predicted = labels > 0.5, logits > 0
            found = {"classes": details.class_table(truth[real], predicted[real], self.labels)}
            names = [
                [", ".join(np.array(self.labels)[row]) or "none" for row in table]
                for table in (truth, predicted)
            ]
        else:
            found = details.one_label(labels[real], logits[real].argmax(axis=1), self.labels)
            names = [
                [self.labels[number] for number in numbers]
                for numbers in (labels, logits.argmax(axis=1))
            ]

        def row(index: int) -> Record:
            text = details.shortened(examples.text(index)) if examples is not None else ""
            return {
                "example": index + 1,
                "text": text,
                "label": names[0][index],
                "predicted": names[1][index],
            }

        return found | {"worst": details.worst(arrays["losses"], valid, row)}

    def described(self, logits: Value) -> list[Record]:
        """Returns the label and score of each example [B, C]; all labels above one half if there
        may be several; the number of a regression.
        """
        logits = np.asarray(logits, np.float32)
        if self.kind == "regression":
            return [{"score": float(value)} for value in logits[:, 0]]
        scores = np.asarray(
            jax.nn.sigmoid(logits) if self.kind == "multi" else jax.nn.softmax(logits, axis=-1)
        )
        described: list[Record] = []
        for row in scores:
            scored = {label: float(score) for label, score in zip(self.labels, row, strict=True)}
            if self.kind == "multi":
                names = [name for name, score in scored.items() if score > 0.5]
                described.append({"labels": names, "scores": scored})
            else:
                best = int(row.argmax())
                one = {"label": self.labels[best], "score": float(row[best])}
                described.append(one | {"scores": scored})
        return described
