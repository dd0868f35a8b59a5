"""The model of a mixture of tasks: each part's batch goes through the model with its heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax

from fmjax import pytree
from fmjax.contracts import Batch, PyTree, Task


@dataclasses.dataclass(frozen=True)
class MixtureModel:
    """Wraps the model in training: it has parameters, outputs and costs.

    There is one model with the heads of all parts; each of `parts` has the heads that its task
    reads.
    """

    model: PyTree  # contracts.Model
    parts: Mapping[str, PyTree]

    @property
    def settings(self) -> PyTree:
        return self.model.settings

    def init(self, key: jax.Array, batch: Batch) -> dict[str, PyTree]:
        """Returns the variables of all parts; shared ones are the same in each."""
        nested = pytree.unnames(batch)
        params: dict[str, PyTree] = {}
        for part, model in self.parts.items():
            params = pytree.union(params, model.init(key, nested[part])["params"])
        return {"params": params}

    def apply(
        self, variables: PyTree, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> dict[str, PyTree]:
        """Returns the outputs of each part, with separate random numbers."""
        nested = pytree.unnames(batch)
        outputs = {}
        for number, (part, model) in enumerate(self.parts.items()):
            own = {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
            outputs[part] = model.apply(variables, nested[part], rngs=own)
        return outputs

    def forward_flops(self, batch: Mapping[str, PyTree]) -> float:
        """Returns the floating-point operations of one forward pass over all parts."""
        nested = pytree.unnames(batch)
        return float(sum(model.forward_flops(nested[part]) for part, model in self.parts.items()))


def mix(model: nn.Module, task: Task) -> PyTree:
    """Returns the model that a task trains; a mixture trains a wrapper of it."""
    if not task.splits:
        return model
    parts = {part: model.clone(heads=own.heads) for part, own in task.tasks.items()}
    return MixtureModel(model, parts)


def unmixed(model: PyTree) -> PyTree:
    """Returns the Linen module that is trained; for a mixture, it has the heads of all parts."""
    return model.model if isinstance(model, MixtureModel) else model


def main_part(
    model: PyTree, task: PyTree, spec: Mapping[str, PyTree]
) -> tuple[PyTree, PyTree, Mapping[str, PyTree]]:
    """Returns the model, task and batch shapes of evaluation: for a mixture, its main part's."""
    if not isinstance(model, MixtureModel):
        return model, task, spec
    part, own = next(iter(model.parts.items()))
    return own, task.main, pytree.unnames(spec)[part]
