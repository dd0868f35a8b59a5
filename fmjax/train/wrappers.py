"""A model of a mixture of tasks (tasks/mixture.py): the batch of each part goes through the model with that part's heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from fmjax import pytree
from fmjax.contracts import Task


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Stands where the model does in training: it has parameters, outputs and costs. One model, of which each part uses
    what its heads read; `model` has the heads of all."""

    model: nn.Module
    parts: Mapping[str, nn.Module]

    @property
    def settings(self) -> Any:
        return self.model.settings

    def init(self, key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Returns the variables of all parts, of which those that they share are alike in each."""
        nested = pytree.unnames(batch)
        params: dict[str, Any] = {}
        for part, model in self.parts.items():
            params = union(params, model.init(key, nested[part])["params"])
        return {"params": params}

    def apply(self, variables: Any, batch: Mapping[str, jax.Array], rngs: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Returns the outputs of each part, whose random numbers are its own."""
        nested = pytree.unnames(batch)
        outputs = {}
        for number, (part, model) in enumerate(self.parts.items()):
            own = {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
            outputs[part] = model.apply(variables, nested[part], rngs=own)
        return outputs

    def forward_flops(self, batch: Mapping[str, Any]) -> float:
        """Returns the floating-point operations of one forward pass over all parts."""
        nested = pytree.unnames(batch)
        return sum(model.forward_flops(nested[part]) for part, model in self.parts.items())


def mix(model: nn.Module, task: Task) -> Any:
    """Returns what a task trains: of a mixture, the model as its parts see it, else the model itself."""
    if not task.splits:
        return model
    return Mixed(model, {part: model.clone(heads=own.heads) for part, own in task.tasks.items()})


def judged(model: Any, task: Task, spec: Mapping[str, Any]) -> tuple[nn.Module, Task, Mapping[str, Any]]:
    """Returns the model, the task and the batch's shapes by which a run is judged: of a mixture, those of its main part."""
    if not isinstance(model, Mixed):
        return model, task, spec
    part, own = next(iter(model.parts.items()))
    return own, task.main, pytree.unnames(spec)[part]


def union(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dictionary of what is in either, that of the first where it is in both."""
    both = {name: union(first[name], second[name]) for name in first if isinstance(first[name], dict) and name in second}
    return {**second, **first, **both}
