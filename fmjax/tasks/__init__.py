"""Tasks: what a model learns from a batch and how it is judged. One file a task, found by its name.

A task module has a class `Task`, made from the config (`Task(**config.task)`), with

- `heads`: the heads it reads, `{kind: numbers}`;
- `resolve(source) -> dict`: settings that follow from the training data (label names), for the stored config;
- `examples(source, tokenizer, max_length, train) -> Examples`: random access to fixed-shape examples;
- `weights(batch) -> {term: weight}` and `loss(outputs, batch) -> {term: sum}`: the loss is the sum over terms of sum / weight.
  Weights are taken over the whole global batch, so splitting a batch does not change the loss;
- `predictions(outputs, batch) -> arrays [B, ...]` and `metrics(arrays, valid, examples) -> {name: number}`: evaluation on the
  host; row i of the arrays belongs to example i of `examples`, for metrics of texts;
- `measures`: the names of the metrics, of which one may be undefined on some data (AUC where there is one class alone);
- `inputs(examples, tokenizer, max_length, where) -> batch` and `describe(outputs, batch, tokenizer) -> [dict]`: predicting;
  `where(index)` names an example in errors; of the batch, names that begin with "_" are of the host alone.

More, where they are not as usual:

- `reads`: "text", or "images", for which there is no tokenizer;
- `counted`: the arrays of a batch that are 0 where there is padding and nowhere else, by which the tokens that a step reads are
  counted; by default `segment_ids` or `attention_mask`;
- `generation`: arguments of `generate`, if predicting is generating; `describe` then gets `{"generated": tokens [B,T]}`;
- `needs`: "generation", if evaluating is generating too; `metrics` then gets `generated`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from fmjax.errors import UserError, nearest

Batch = Mapping[str, Any]  # arrays by name
Example = dict[str, Any]  # arrays by name
Where = Callable[[int], str]  # the name of a record or example, by its index


class Examples(Protocol):
    """Random access to the examples of a split; `draw` adds what is random, such as masks, anew each epoch.

    Where an example is a text padded at its end, `lengths [N]` has the number of tokens of each, and `sized` names the arrays
    whose last axis is the length: what data/buckets.py needs. Packed ones have `fill`, the shares that are no padding, by array.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example as the model sees it this time; random in `rng` alone."""
        ...


def task(name: str) -> ModuleType:
    """Returns the module of the task of that name. Raises UserError listing those there are."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    if name in found and hasattr(module := importlib.import_module(f"{__name__}.{name}"), "Task"):
        return module
    # Some modules hold what tasks share.
    names = [other for other in sorted(found) if hasattr(importlib.import_module(f"{__name__}.{other}"), "Task")]
    raise UserError(f'task.name="{name}": no such task{nearest(name, names)}; choose one of {", ".join(names)}')


def make(settings: Mapping[str, Any]) -> Any:
    """Returns the task described by a config's `task` section.

    Raises UserError for an unknown task or setting.
    """
    # JSON has no tuples, and settings are hashable.
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    module = task(settings.pop("name"))
    known = list(module.Task.__dataclass_fields__)
    for name in settings:
        if name not in known:
            raise UserError(f"task.{name} is not a setting{nearest(name, known)}; there are {', '.join(known)}")
    return module.Task(**settings)
