"""Several objectives at once, such as classifying labelled texts and masked language modelling of unlabelled ones.

Each part is a task with its own data: it trains on `split`, a name in `data.files`, and its loss counts `factor` times. The
first part is the main one: an epoch is one of its data, the run is evaluated by it and predicts as it does. Of the other
parts, examples are drawn at random, as many as of the first. Their batches stand side by side under names such as
"mlm/input_ids".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from fmjax import pytree, tasks
from fmjax.contracts import Examples
from fmjax.data.records import Bundle
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError
from fmjax.tasks import Batch, Example

OWN = ("factor", "split")  # settings of a part that are not its task's


@dataclasses.dataclass(frozen=True)
class Task:
    """Settings of a mixture: for each part the settings of its task, its name among them, `factor` and `split`."""

    parts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise UserError("task.parts: a mixture has two parts or more, the main one first; name them, or choose another task")
        for part, settings in self.parts.items():
            factor = settings.get("factor", 1.0)
            if not factor > 0:
                raise UserError(f"task.parts.{part}.factor={factor}: must be above 0; leave the part out instead")
        reads = {part: getattr(task, "reads", "text") for part, task in self.tasks.items()}
        if len(set(reads.values())) > 1:
            listed = ", ".join(f"{part} reads {what}" for part, what in reads.items())
            raise UserError(f"task.parts: {listed}; one model reads either, so mix tasks that read the same")

    @functools.cached_property
    def tasks(self) -> dict[str, Any]:
        """The task of each part. Raises UserError, naming the part, for settings that it does not have."""
        made = {}
        for part, settings in self.parts.items():
            if "name" not in settings or settings["name"] == "mixture":
                raise UserError(f'task.parts.{part}: has no task of its own; give task.parts.{part}.name, such as "mlm"')
            with naming(part):
                made[part] = tasks.make({name: value for name, value in settings.items() if name not in OWN})
        return made

    @property
    def main(self) -> Any:
        """The task of the first part."""
        return next(iter(self.tasks.values()))

    @property
    def reads(self) -> str:
        return getattr(self.main, "reads", "text")

    @property
    def splits(self) -> dict[str, str]:
        """The split of the data that each part trains on."""
        return {part: settings.get("split", "train") for part, settings in self.parts.items()}

    @property
    def heads(self) -> dict[str, dict[str, Any]]:
        """Returns the heads of all parts. Raises UserError if two have the same kind of head with other numbers."""
        heads: dict[str, dict[str, Any]] = {}
        for part, task in self.tasks.items():
            for kind, numbers in task.heads.items():
                if heads.setdefault(kind, numbers) != numbers:
                    raise UserError(
                        f'task.parts.{part}: its head "{kind}" has {numbers}, but that of a part before it has {heads[kind]}; '
                        "a model has one head of a kind, so mix other tasks, or give both the same labels"
                    )
        return heads

    @property
    def measures(self) -> tuple[str, ...]:
        return self.main.measures

    def resolve(self, source: Bundle) -> dict[str, Any]:
        """Returns what follows from each part's training data."""
        found = {}
        for part, task in self.tasks.items():
            with naming(part):
                found[part] = {**self.parts[part], **task.resolve(source.parts[part])}
        return {"parts": found}

    def examples(self, source: Any, tokenizer: Tokenizer, max_length: int, train: bool) -> Any:
        """Returns the examples of all parts side by side, in training, and else those of the main part."""
        if not train:
            return self.main.examples(source, tokenizer, max_length, train=False)
        made = {}
        for part, task in self.tasks.items():
            with naming(part):
                made[part] = task.examples(source.parts[part], tokenizer, max_length, train=True)
        return SideBySide(made)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns each part's weights, of terms such as "mlm/mlm"."""
        nested = pytree.unnames(batch)
        return pytree.names({part: task.weights(nested[part]) for part, task in self.tasks.items()})

    def loss(self, outputs: Batch, batch: Batch) -> dict[str, jax.Array]:
        """Returns each part's sums, times its factor."""
        nested = pytree.unnames(batch)
        terms = {part: task.loss(outputs[part], nested[part]) for part, task in self.tasks.items()}
        factors = {part: settings.get("factor", 1.0) for part, settings in self.parts.items()}
        return pytree.names({part: {name: factors[part] * total for name, total in own.items()} for part, own in terms.items()})


class SideBySide(Examples):
    """The examples of the first part, each beside one of every other part, drawn anew each time."""

    def __init__(self, parts: Mapping[str, Any]):
        self.parts = parts
        (self.name, self.main), *others = parts.items()
        self.others = dict(others)

    def __len__(self) -> int:
        return len(self.main)

    def __getitem__(self, index: int) -> Example:
        return self.main[index]

    @property
    def classes(self) -> np.ndarray | None:
        """The first part's, by which data.balance resamples."""
        return self.main.classes

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the arrays of all parts by names such as "mlm/input_ids"."""
        drawn = {self.name: self.main.draw(example, rng)}
        for part, examples in self.others.items():
            drawn[part] = examples.draw(examples[int(rng.integers(len(examples)))], rng)
        return {f"{part}/{name}": array for part, own in drawn.items() for name, array in own.items()}


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Makes mistakes in a part's settings name them as they stand in the config."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("task.", f"task.parts.{part}.")) from None
