"""Losses of single examples, in fp32 whatever the logits are: the caller weighs, sums, and divides
last. Also, on the host, class weights against imbalance.

Labels are checked on the host, in the pipeline. Here a class out of range is read as the nearest
one, so that garbage at a position of weight 0 gives a finite loss: 0 x NaN is NaN.

Dimensions: C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax


def softmax_cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Returns -log p(label), fp32 [...], of logits [..., C] and whole-number labels [...].

    Smoothing mixes the label with the uniform distribution over all C classes (Szegedy et al.
    2016), as torch.nn.CrossEntropyLoss does.
    """
    logits = logits.astype(jnp.float32)
    safe = jnp.clip(labels, 0, logits.shape[-1] - 1)
    loss: jax.Array = optax.losses.softmax_cross_entropy_with_integer_labels(logits, safe)
    if not label_smoothing:
        return loss
    uniform: jax.Array = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
    return (1 - label_smoothing) * loss + label_smoothing * uniform


def soft_cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Returns -sum p log q, fp32 [...], of labels p (shares that add up to 1) [..., C] and the
    probabilities q of logits."""
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    p = labels.astype(jnp.float32) * (1 - label_smoothing) + label_smoothing / labels.shape[-1]
    return -(p * log_q).sum(axis=-1)


def sigmoid_cross_entropy(
    logits: jax.Array, labels: jax.Array, gamma: float = 0.0, weights: jax.Array | float = 1.0
) -> jax.Array:
    """Returns the mean over C of binary cross entropies, fp32 [...], of logits and labels (0 to 1)
    [..., C].

    Its mean over examples is torch.nn.BCEWithLogitsLoss. Each is multiplied by its weight, and by
    (1 - p)^gamma of the probability p of what the label says: the focal loss (Lin et al. 2017,
    arXiv:1708.02002).
    """
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    loss: jax.Array = optax.losses.sigmoid_binary_cross_entropy(logits, labels)
    if gamma:
        loss = loss * jnp.exp(gamma * jax.nn.log_sigmoid(jnp.where(labels > 0.5, -logits, logits)))
    return (loss * weights).mean(axis=-1)


def squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns (prediction - target)^2, fp32 [...], of two arrays of the same shape."""
    error: jax.Array = optax.losses.squared_error(
        predictions.astype(jnp.float32), targets.astype(jnp.float32)
    )
    return error


def softmax_focal(logits: jax.Array, labels: jax.Array, gamma: float) -> jax.Array:
    """Returns -(1 - p)^gamma log p of the label's probability p, fp32 [...], of logits [..., C] and
    whole-number labels [...].

    The focal loss (Lin et al. 2017, arXiv:1708.02002) of one class out of C; gamma 0 is cross
    entropy. 1 - p is computed from the other classes' logits, so that value and gradient stay
    finite if p is 1.
    """
    logits = logits.astype(jnp.float32)
    label = jax.nn.one_hot(jnp.clip(labels, 0, logits.shape[-1] - 1), logits.shape[-1], dtype=bool)
    total = jax.nn.logsumexp(logits, axis=-1)
    others = jax.nn.logsumexp(jnp.where(label, np.finfo(np.float32).min, logits), axis=-1)
    return jnp.exp(gamma * (others - total)) * softmax_cross_entropy(logits, labels)


def balanced(counts: np.ndarray, beta: float) -> np.ndarray:
    """Returns N / (C n) of counts n [C] that add up to N: all classes have the same total weight
    (scikit-learn: "balanced")."""
    return np.asarray(counts.sum() / (counts.size * counts))


def effective(counts: np.ndarray, beta: float) -> np.ndarray:
    """Returns the inverse of the effective number of examples (1 - beta^n) / (1 - beta) per class,
    scaled to add up to C.

    Cui et al. 2019 (arXiv:1901.05555): beta 0 weighs all classes alike, beta towards 1 is
    "balanced".
    """
    weights = (1 - beta) / -np.expm1(counts * np.log(beta)) if beta else np.ones(counts.size)
    return np.asarray(weights * counts.size / weights.sum())


# How class weights follow from the counts of the training data.
WEIGHTINGS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "balanced": balanced,
    "effective": effective,
}
