"""Tasks: what a model learns from a batch and how it is evaluated. One file per task, found by its
name.

A task module has a class `Task`, a frozen dataclass that derives from `contracts.Task` and is made
from the config (`Task(**config.task)`). The order of calls:

1. `reads` says which columns are read, and of which kind each is; `columns` adds labels and other
answers; 2. `resolve(source)` returns settings that follow from the training data, such as label
names, for the stored config; 3. `data/kinds/lifecycle.py` makes the processors of the kinds: named,
that of the weights, or fitted to the training data; 4. `examples(source, processors, max_length,
train)` gives random access to fixed-shape examples;
   and `facts(sample, examples, ...)` what a person should know of them before training;
5. `weights(batch)` and `loss(outputs, batch)`: the loss is the sum over terms of sum / weight;
6. `predictions(outputs, batch)`, on devices, and `metrics(arrays, valid, examples)`, on the host:
evaluation; 7. `inputs(examples, processors, max_length, where)` and `describe(outputs, batch,
processors)`: prediction.

`labels.py`, `imbalance.py`, `token_rows.py`, `images.py` and `facts.py` contain shared code;
`words.py` and `tagged_texts.py` belong to `tag`, `question_windows.py` to `qa`, `denoisers.py` to
`span_corruption`. A name with a dot is a module outside fmjax, whose package must be listed
in FMJAX_EXTENSIONS."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from fmjax import contracts
from fmjax.config import names
from fmjax.contracts import Value
from fmjax.errors import UserError, nearest
from fmjax.tasks.settings import check_ranges, typed


def task(name: str) -> ModuleType:
    """Returns the module of the named task. Raises UserError, listing the tasks, if there is
    none."""
    return names.find(__name__, name, "Task", "task.name", "task")


def make(settings: Mapping[str, Value]) -> contracts.Task:
    """Returns the task described by a config's `task` section.

    Raises UserError for an unknown task or setting, and for a value that is out of range.
    """
    settings = dict(settings)
    module = task(settings.pop("name"))
    known = list(module.Task.__dataclass_fields__)
    for name in settings:
        if name not in known:
            raise UserError(
                f"task.{name} is not a setting{nearest(name, known)}; choose from "
                f"{', '.join(known)}"
            )
    made: contracts.Task = module.Task(**typed(module.Task, settings))
    check_ranges(made)
    return made
