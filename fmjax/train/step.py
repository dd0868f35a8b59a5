"""One training step: a pure function of the state, a batch and a key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fmjax.contracts import Arrays, Batch, PyTree, Task
from fmjax.train.gradients import Gradients, Key, Loss, Weigh, accumulated, whole, without_frozen
from fmjax.train.state import TrainState

TrainStep: TypeAlias = Callable[[TrainState, Batch, Key], tuple[TrainState, Arrays]]


class Trainable(Protocol):
    """A trainable model: a Linen module, or a wrapper such as that of a mixture."""

    def apply(self, variables: PyTree, batch: Batch, *, rngs: Mapping[str, Key]) -> PyTree:
        """Returns the outputs of the heads for {"params": parameters} and {"dropout": key}."""


def make_step(
    model: Trainable,
    task: Task,
    transform: optax.GradientTransformation,
    trainable: PyTree,
    accumulate: int = 1,
    make_gradients: Callable[[Loss, Weigh], Gradients] | None = None,
) -> TrainStep:
    """Returns `train_step(state, batch, key) -> (state, metrics)`.

    The loss is the sum over the task's terms of sum / weight. `trainable` is a tree of bool like
    the parameters: the others do not change, and do not count in the gradient's norm. The gradient
    is that of the whole batch, accumulated over `accumulate` parts of it, or computed by
    `make_gradients`.

    A step whose loss or gradient is not finite leaves parameters and optimizer unchanged (by
    selection, not by multiplication with zero, since 0 x NaN is NaN) and reports `nonfinite` 1.
    """

    def forward(params: PyTree, part: Batch, key: Key) -> PyTree:
        return model.apply({"params": params}, part, rngs={"dropout": key})

    def loss(params: PyTree, part: Batch, weights: Arrays, key: Key) -> tuple[jax.Array, Arrays]:
        sums = task.loss(forward(params, part, key), part)
        terms = {
            name: total / jnp.where(weights[name] > 0, weights[name], 1)
            for name, total in sums.items()
        }
        return sum(terms.values(), jnp.float32(0)), terms

    def update(grads: PyTree, state: TrainState) -> tuple[PyTree, PyTree]:
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    make = make_gradients or (whole if accumulate == 1 else partial(accumulated, parts=accumulate))
    gradients = make(loss, task.weights)

    def train_step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Arrays]:
        found = gradients(state.params, batch, jax.random.fold_in(key, state.step))
        # The barrier keeps XLA from fusing the update into the backward pass, which slows the
        # latter down on CPUs.
        grads, terms = jax.lax.optimization_barrier(found)
        grads = without_frozen(grads, trainable)
        total = sum(terms.values(), jnp.float32(0))
        norm = optax.tree_utils.tree_norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        new, old = update(grads, state), (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        metrics = {"loss": total, "grad_norm": norm, "nonfinite": 1.0 - finite.astype(jnp.float32)}
        if len(terms) > 1:
            metrics |= {f"loss_{name}": term for name, term in terms.items()}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step
