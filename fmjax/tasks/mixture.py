"""Several objectives at once, such as classifying labeled texts and masked language modeling of
unlabeled ones.

Each part is a task with its own data: it trains on `split`, a name in `data.files`, and its loss is
multiplied by `factor`. The first part is the main one: an epoch is a pass over its data, and
evaluation and prediction use its task. The other parts contribute the same number of examples,
drawn at random. Arrays of a batch have names such as "mlm/input_ids"."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from fmjax import contracts, pytree, tasks
from fmjax.contracts import (
    Arrays,
    Batch,
    Config,
    Example,
    Examples,
    Heads,
    Measures,
    Processors,
    Undrawn,
    Value,
)
from fmjax.errors import RecordError, UserError, in_range

OWN = ("factor", "split")  # settings of a part that do not belong to its task


@dataclasses.dataclass(frozen=True)
class Task(contracts.Task):
    """Settings of a mixture: for each part, the settings of its task (including its name), `factor`
    and `split`.
    """

    parts: Mapping[str, Mapping[str, Value]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise UserError(
                "task.parts: a mixture has at least two parts, the main one first; name them, or "
                "choose another task"
            )
        for part, settings in self.parts.items():
            key, factor = f"task.parts.{part}.factor", settings.get("factor", 1.0)
            in_range(key, factor, above=0, most=1e6, hint="to set 0, leave the part out")
        reads = {
            part: list(dict.fromkeys(task.reads.values())) for part, task in self.tasks.items()
        }
        if any(kinds != reads[next(iter(reads))] for kinds in reads.values()):
            listed = ", ".join(
                f"{part} reads {' and '.join(kinds)}" for part, kinds in reads.items()
            )
            raise UserError(
                f"task.parts: {listed}; a model reads only one kind, so mix tasks that read the "
                "same"
            )

    @functools.cached_property
    def tasks(self) -> dict[str, contracts.Task]:
        """The task of each part. Raises UserError, naming the part, for unknown settings."""
        built = {}
        for part, settings in self.parts.items():
            if "name" not in settings or settings["name"] == "mixture":
                raise UserError(
                    f'task.parts.{part}: names no task; set task.parts.{part}.name, such as "mlm"'
                )
            with naming(part):
                built[part] = tasks.make(
                    {name: value for name, value in settings.items() if name not in OWN}
                )
        return built

    @property
    def reads(self) -> Mapping[str, str]:
        return self.main.reads

    @property
    def columns(self) -> tuple[str, ...]:
        return self.main.columns

    @property
    def splits(self) -> dict[str, str]:
        return {part: settings.get("split", "train") for part, settings in self.parts.items()}

    @property
    def packs_pairs(self) -> bool:
        return any(task.packs_pairs for task in self.tasks.values())

    @property
    def model_settings(self) -> Mapping[str, Value]:
        return {
            name: value
            for task in self.tasks.values()
            for name, value in task.model_settings.items()
        }

    @property
    def heads(self) -> Heads:
        """The heads of all parts. Raises UserError if two have the same kind of head with different
        sizes.
        """
        heads: dict[str, Mapping[str, Value]] = {}
        for part, task in self.tasks.items():
            for kind, numbers in task.heads.items():
                if heads.setdefault(kind, numbers) != numbers:
                    raise UserError(
                        f'task.parts.{part}: its head "{kind}" has {numbers}, but that of an '
                        f"earlier part has {heads[kind]}; a model has one head of each kind, so "
                        "mix other tasks, or use the same labels in both"
                    )
        return heads

    @property
    def measures(self) -> Measures:
        return self.main.measures

    def resolve(self, source: Value) -> Config:
        """Returns the settings that are inferred from each part's training data."""
        found = {}
        for part, task in self.tasks.items():
            with naming(part):
                found[part] = {**self.parts[part], **task.resolve(source.parts[part])}
        return {"parts": found}

    def examples(
        self, source: Value, processors: Processors, max_length: int, train: bool
    ) -> Examples:
        """Returns the examples of all parts side by side in training, otherwise those of the main
        part.
        """
        if not train:
            return self.main.examples(source, processors, max_length, train=False)
        built = {}
        for part, task in self.tasks.items():
            with naming(part):
                built[part] = task.examples(
                    source.parts[part], processors.part(part), max_length, train=True
                )
        return SideBySide(built)

    def weights(self, batch: Batch) -> Arrays:
        """Returns each part's weights, under names such as "mlm/mlm"."""
        nested = pytree.unnames(batch)
        return pytree.names({part: task.weights(nested[part]) for part, task in self.tasks.items()})

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns each part's sums, times its factor."""
        nested = pytree.unnames(batch)
        parts: Mapping[str, Value] = outputs
        terms = {part: task.loss(parts[part], nested[part]) for part, task in self.tasks.items()}
        factors = {part: settings.get("factor", 1.0) for part, settings in self.parts.items()}
        return pytree.names(
            {
                part: {name: factors[part] * total for name, total in own.items()}
                for part, own in terms.items()
            }
        )


class SideBySide(Examples):
    """The examples of the first part, each paired with a random example of every other part."""

    def __init__(self, parts: Mapping[str, Examples]):
        self.parts = parts
        (self.name, self.main), *others = parts.items()
        self.others = dict(others)
        self.classes = self.main.classes  # for resampling by data.balance

    def __len__(self) -> int:
        return len(self.main)

    def __getitem__(self, index: int) -> Undrawn:
        return self.main[index]

    def draw(self, example: Undrawn, rng: np.random.Generator) -> Example:
        """Returns the arrays of all parts, under names such as "mlm/input_ids"."""
        drawn = {self.name: self.main.draw(example, rng)}
        for part, examples in self.others.items():
            drawn[part] = examples.draw(examples[int(rng.integers(len(examples)))], rng)
        return {
            f"{part}/{name}": array for part, own in drawn.items() for name, array in own.items()
        }


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Makes errors name a part's settings as in the config."""
    own = f"task.parts.{part}."
    try:
        yield
    except RecordError as error:
        problem = error.problem.replace("task.", own)
        raise RecordError(error.place, problem, error.index, error.shown) from None
    except UserError as error:
        raise UserError(str(error).replace("task.", own)) from None
