"""Losses against formulas written out in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit, log_softmax
from sklearn.utils.class_weight import compute_class_weight

from fmjax import losses

LOGITS = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32) * 4
LABELS = np.array([[0, 4, 2], [1, 1, 3]], np.int32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_cross_entropy_is_the_mixture_of_label_and_uniform(smoothing: float) -> None:
    target = (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5
    expected = -(target * log_softmax(LOGITS.astype(np.float64), axis=-1)).sum(-1)
    np.testing.assert_allclose(losses.softmax_cross_entropy(LOGITS, LABELS, smoothing), expected, rtol=1e-6)


def test_sigmoid_cross_entropy_is_the_mean_over_classes() -> None:
    logits = LOGITS.astype(np.float64)
    targets = (np.arange(30).reshape(2, 3, 5) % 3 == 0).astype(np.float32)
    expected = -(targets * log_expit(logits) + (1 - targets) * log_expit(-logits)).mean(-1)
    np.testing.assert_allclose(losses.sigmoid_cross_entropy(LOGITS, targets), expected, rtol=1e-6)


def test_squared_error_is_elementwise_and_refuses_to_broadcast() -> None:
    np.testing.assert_allclose(losses.squared_error(jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])), [4, 9])
    with pytest.raises(ValueError, match="Shape"):
        losses.squared_error(jnp.zeros((2, 1)), jnp.zeros(2))


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (losses.softmax_cross_entropy, LABELS),
        (losses.sigmoid_cross_entropy, np.ones((2, 3, 5), np.int32)),
        (losses.squared_error, np.ones((2, 3, 5), np.int32)),
    ],
)
def test_losses_of_bf16_are_computed_in_fp32(loss, targets) -> None:
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    value = loss(logits, targets)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, loss(logits.astype(jnp.float32), targets))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_garbage_labels_of_weight_zero_leave_value_and_gradient_alone(smoothing: float) -> None:
    weights = jnp.array([[1, 0, 1], [0, 1, 0]], jnp.float32)

    def total(logits: jax.Array, labels: np.ndarray) -> jax.Array:
        return (losses.softmax_cross_entropy(logits, labels, smoothing) * weights).sum()

    garbage = np.where(weights > 0, LABELS, np.array([-1, 5, 2**30], np.int32))
    clean, dirty = (jax.value_and_grad(total)(jnp.asarray(LOGITS), labels) for labels in (LABELS, garbage))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert np.isfinite(dirty[1]).all() and not dirty[1][weights == 0].any()


def test_extreme_logits_stay_finite() -> None:
    logits = jnp.array([[1e4, -1e4]])
    np.testing.assert_allclose(losses.softmax_cross_entropy(logits, jnp.array([1])), [2e4])
    np.testing.assert_allclose(losses.sigmoid_cross_entropy(logits, jnp.array([[0.0, 1.0]])), [1e4])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_of_one_class(gamma: float) -> None:
    logits = LOGITS.astype(np.float64)
    logs = np.take_along_axis(log_softmax(logits, axis=-1), LABELS[..., None], axis=-1)[..., 0]
    expected = -((1 - np.exp(logs)) ** gamma) * logs
    np.testing.assert_allclose(losses.softmax_focal(LOGITS, LABELS, gamma), expected, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_and_weights_of_several_classes(gamma: float) -> None:
    logits, targets = LOGITS.astype(np.float64), (np.arange(30).reshape(2, 3, 5) % 3 == 0).astype(np.float32)
    weights = np.where(targets > 0, np.arange(1.0, 6), 1)
    p = 1 / (1 + np.exp(-logits))
    right = np.where(targets > 0, p, 1 - p)
    expected = (weights * -((1 - right) ** gamma) * np.log(right)).mean(-1)
    found = losses.sigmoid_cross_entropy(LOGITS, targets, gamma, jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_has_finite_gradients_where_the_model_is_sure(gamma: float) -> None:
    logits = jnp.array([[200.0, -200.0], [-200.0, 200.0], [0.0, 0.0]])
    labels = jnp.array([0, 0, 1])

    def total(logits: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(labels, 2)
        return losses.softmax_focal(logits, labels, gamma).sum() + losses.sigmoid_cross_entropy(logits, one_hot, gamma).sum()

    value, gradient = jax.value_and_grad(total)(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert float(losses.softmax_focal(logits, labels, gamma)[0]) == 0


def test_class_weights_are_those_of_their_papers() -> None:
    counts = np.array([80.0, 15, 5])
    labels = np.repeat([0, 1, 2], counts.astype(int))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(losses.balanced(counts, 0.9), expected)
    for beta in (0.0, 0.9, 0.999):
        each = np.array([(1 - beta) / (1 - beta**count) for count in counts])
        np.testing.assert_allclose(losses.effective(counts, beta), each / each.sum() * 3, rtol=1e-6)
    near = losses.effective(counts, 1 - 1e-9)
    np.testing.assert_allclose(near / near[0], expected / expected[0], rtol=1e-6)
