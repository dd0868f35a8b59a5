"""Losses of single examples, in fp32 whatever the logits are: the caller weighs, sums, and divides last.

Labels are checked on the host, in the pipeline. Here a class out of range is read as the nearest one, so that
garbage at a position of weight 0 gives a finite loss: 0 x NaN is NaN.

Letters: C classes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Returns -log p(label), fp32 [...], of logits [..., C] and whole-number labels [...].

    Smoothing mixes the label with the uniform distribution over all C classes (Szegedy et al. 2016), as
    torch.nn.CrossEntropyLoss does.
    """
    logits = logits.astype(jnp.float32)
    safe = jnp.clip(labels, 0, logits.shape[-1] - 1)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, safe)
    if not label_smoothing:
        return loss
    uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
    return (1 - label_smoothing) * loss + label_smoothing * uniform


def sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean over C of binary cross entropies, fp32 [...], of logits and labels (0 to 1) [..., C].

    Its mean over examples is torch.nn.BCEWithLogitsLoss.
    """
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    return optax.losses.sigmoid_binary_cross_entropy(logits, labels).mean(axis=-1)


def squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns (prediction - target)^2, fp32 [...], of two arrays of the same shape."""
    return optax.losses.squared_error(predictions.astype(jnp.float32), targets.astype(jnp.float32))
