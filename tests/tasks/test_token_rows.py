"""The loss and metrics of labels that a model writes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.metrics import classes as class_metrics
from fmjax.tasks.token_rows import TokenTask


def test_loss_and_metrics_count_target_tokens():
    task = TokenTask()
    batch = {"labels": jnp.array([[1, 2, 0]]), "label_weights": jnp.array([[1.0, 1.0, 0.0]])}
    outputs = {"lm": jnp.log(jnp.array([[[0.1, 0.8, 0.1], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))}
    expected = -np.log(0.8) - np.log(0.25)
    assert float(task.weights(batch)["lm"]) == 2
    assert float(task.loss(outputs, batch)["lm"]) == pytest.approx(expected, abs=1e-5)
    arrays = {name: np.asarray(array) for name, array in task.predictions(outputs, batch).items()}
    values = task.metrics(arrays, np.ones(1), None)
    assert values == pytest.approx({"loss": expected / 2, "perplexity": np.exp(expected / 2), "accuracy": 0.5}, abs=1e-5)
    assert set(values) == set(class_metrics.TOKEN_LEVEL)
