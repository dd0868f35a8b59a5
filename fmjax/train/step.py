"""One training step: a pure function of the state, a batch and a key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fmjax.train.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_step(
    model: nn.Module, task: Any, transform: optax.GradientTransformation, trainable: Any, accumulate: int = 1
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, batch, key) -> (state, metrics)`.

    The loss is the sum over the task's terms of sum / weight. Weights are those of the whole batch, also where the
    gradient is accumulated over `accumulate` parts of it, so the parts add up to the same loss.

    `trainable` is a tree of bool like the parameters. The gradients of frozen ones are replaced by zeros at once, so that
    XLA drops the backward pass that led to them, and the norm is of those that train.

    A step whose loss or gradient is not finite leaves parameters and optimizer as they were (they are selected, not
    multiplied by zero: 0 x NaN is NaN) and reports `nonfinite` 1.
    """

    def loss(params: Any, part: Batch, weights: Metrics, key: jax.Array) -> tuple[jax.Array, Metrics]:
        outputs = model.apply({"params": params}, part, rngs={"dropout": key})
        terms = {name: total / jnp.where(weights[name] > 0, weights[name], 1) for name, total in task.loss(outputs, part).items()}
        return sum(terms.values(), jnp.float32(0)), terms

    def gradients(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, Metrics]:
        weights = task.weights(batch)
        grad = jax.grad(loss, has_aux=True)
        if accumulate == 1:
            return grad(params, batch, weights, key)
        parts = jax.tree.map(lambda x: split(x, accumulate), dict(batch))

        def add(total: Any, indexed: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, part = indexed
            return jax.tree.map(jnp.add, total, grad(params, part, weights, jax.random.fold_in(key, index))), None

        zeros = jax.tree.map(jnp.zeros_like, (params, {name: jnp.float32(0) for name in weights}))
        return jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))[0]

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        # The barrier keeps XLA from fusing the update into the backward pass, which slows the latter down on CPUs.
        grads, terms = jax.lax.optimization_barrier(gradients(state.params, batch, jax.random.fold_in(key, state.step)))
        grads = jax.tree.map(lambda grad, trained: grad if trained else jnp.zeros_like(grad), grads, trainable)
        total = sum(terms.values(), jnp.float32(0))
        norm = optax.tree_utils.tree_norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        new = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, (state.params, state.opt_state))

        metrics = {"loss": total, "grad_norm": norm, "nonfinite": 1.0 - finite.astype(jnp.float32)}
        if len(terms) > 1:
            metrics |= {f"loss_{name}": term for name, term in terms.items()}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def split(x: jax.Array, parts: int) -> jax.Array:
    """Returns [parts, B / parts, ...], row i going to part i mod parts, so that each device keeps rows of its own."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
