"""Class weights from the training data, the weighted and focal losses of classification, and a step that divides once."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax
from support.sources import MemoryRecords

from fmjax import losses
from fmjax.errors import UserError
from fmjax.tasks import make
from fmjax.tasks.classify import Task
from fmjax.train.state import TrainState
from fmjax.train.step import make_step

LOGITS = np.array([[0.5, -1.0, 2.0], [1.0, 1.5, -0.5], [-2.0, 0.0, 0.3], [0.1, 0.2, 0.3]], np.float32)
LABELS = np.array([2, 0, 1, 2], np.int32)


class Records(MemoryRecords):
    place, first = "reviews.tsv line", 2


def labelled(*labels: object) -> Records:
    return Records({"text": f"w{number}", "label": label} for number, label in enumerate(labels))


def test_weights_follow_from_the_counts_of_the_training_data():
    source = labelled(*["a"] * 6, *["b"] * 2, *["c"] * 1)
    assert Task(weighting="balanced").resolve(source) == {"labels": ("a", "b", "c"), "class_weights": (0.5, 1.5, 3.0)}
    assert Task(weighting="balanced", labels=("c", "b", "a")).resolve(source) == {"class_weights": (3.0, 1.5, 0.5)}
    found = Task(weighting="effective", effective_beta=0.5).resolve(source)["class_weights"]
    np.testing.assert_allclose(found, losses.effective(np.array([6.0, 2, 1]), 0.5), atol=1e-6)
    assert Task(class_weights=(1.0, 2.0, 3.0)).resolve(source) == {"labels": ("a", "b", "c")}
    # A resumed run has both already, and keeps them.
    stored = {"name": "classify", "weighting": "balanced", "labels": ["a", "b", "c"], "class_weights": [0.5, 1.5, 3.0]}
    assert make(stored).resolve(source) == {}


def test_of_several_labels_a_weight_is_that_of_present_over_absent():
    source = labelled("a|b", "a", "a", "", "b", "a")
    assert Task(kind="multi", weighting="balanced").resolve(source)["class_weights"] == (0.5, 2.0)  # 2/4, 4/2
    found = Task(kind="multi", weighting="effective", effective_beta=0.5).resolve(source)["class_weights"]
    assert found == pytest.approx(((1 - 0.5**2) / (1 - 0.5**4), (1 - 0.5**4) / (1 - 0.5**2)), abs=1e-6)


def test_a_blank_record_that_is_dropped_counts_for_nothing():
    source = labelled("a", "a", "b", "b")
    source[3]["text"] = " "
    assert Task(weighting="balanced", blank="drop").resolve(source)["class_weights"] == (0.75, 1.5)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_loss_is_a_weighted_mean_and_the_metric_is_plain(gamma):
    task = Task(labels=("a", "b", "c"), class_weights=(0.5, 1.0, 4.0), focal_gamma=gamma)
    plain = -log_softmax(LOGITS.astype(np.float64), axis=-1)[np.arange(4), LABELS]
    each = np.array([4, 0.5, 1, 4]) * (1 - np.exp(-plain)) ** gamma * plain
    batch, outputs = {"labels": LABELS}, {"classify": LOGITS}
    assert float(task.weights(batch)["classify"]) == 9.5
    assert float(task.loss(outputs, batch)["classify"]) == pytest.approx(each.sum(), rel=1e-5)
    np.testing.assert_allclose(task.predictions(outputs, batch)["losses"], plain, rtol=1e-5)


def test_of_several_labels_the_loss_is_a_weighted_mean_too():
    task = Task(kind="multi", labels=("a", "b", "c"), class_weights=(0.5, 1.0, 4.0))
    labels = np.array([[0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0]], np.float32)
    weights = np.where(labels > 0, [0.5, 1, 4], 1)
    wide = LOGITS.astype(np.float64)
    each = weights * (np.log1p(np.exp(wide)) - labels * wide)
    batch, outputs = {"labels": labels}, {"classify": LOGITS}
    found = task.loss(outputs, batch)["classify"] / task.weights(batch)["classify"]
    assert float(found) == pytest.approx(each.sum() / weights.sum(), rel=1e-5)
    plain = dataclasses.replace(task, class_weights=())
    np.testing.assert_allclose(task.predictions(outputs, batch)["losses"], plain.losses(outputs, labels), rtol=1e-6)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, batch):
        return {"classify": batch["x"] @ self.param("kernel", nn.initializers.zeros_init(), (4, 3))}


@pytest.mark.parametrize("weights", [(0.02, 0.04, 0.1), (0.5, 1.0, 2.5)])
def test_a_step_divides_once_by_the_weights_of_the_whole_batch(weights):
    """However the batch is split, and whatever the weights add up to: only their ratios matter."""
    task = Task(labels=("a", "b", "c"), class_weights=weights)
    batch = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32), "labels": jnp.array([0, 0, 1, 2])}
    params = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)}
    kept = []
    for parts in (1, 2):
        step = jax.jit(make_step(Linear(), task, optax.sgd(0.5), {"kernel": True}, parts))
        state, found = step(TrainState(jnp.int32(0), params, optax.sgd(0.5).init(params)), batch, jax.random.key(0))
        kept.append((np.asarray(state.params["kernel"]), float(found["loss"])))
    plain = -log_softmax(np.float64(batch["x"] @ params["kernel"]), axis=-1)[np.arange(4), batch["labels"]]
    assert kept[0][1] == pytest.approx(np.average(plain, weights=np.take(weights, batch["labels"])), rel=1e-5)
    np.testing.assert_allclose(kept[0][0], kept[1][0], atol=1e-6)
    assert kept[0][1] == pytest.approx(kept[1][1], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "balance"}, r'task\.weighting="balance" \(did you mean "balanced"\?\): choose one of none, balanced'),
        ({"effective_beta": 1.0}, r"task\.effective_beta=1\.0: must be at least 0 and less than 1"),
        ({"focal_gamma": -1.0}, r"task\.focal_gamma=-1\.0: must not be negative"),
        ({"focal_gamma": 2.0, "label_smoothing": 0.1}, r"task\.focal_gamma and task\.label_smoothing work against each other"),
        ({"class_weights": (1.0, 0.0)}, r"task\.class_weights=1\.0,0\.0: must be numbers above 0"),
        ({"class_weights": ("1", "two")}, r"task\.class_weights=1,two: must be numbers above 0"),
        ({"class_weights": (1.0,), "labels": ("a", "b")}, r"task\.class_weights has 1 numbers for 2 labels \(a, b\)"),
        ({"kind": "regression", "weighting": "balanced"}, r"task\.kind=regression has no classes"),
        ({"kind": "regression", "focal_gamma": 2.0}, r"task\.kind=regression has no classes"),
        ({"pool": "mask", "span_mask": 0.1}, r"task\.span_mask would add masks to the one"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as raised:
        make({"name": "classify"} | settings)
    assert "\n" not in str(raised.value)


def test_a_label_that_never_or_always_occurs_has_no_weight():
    with pytest.raises(UserError, match='task.weighting=balanced: no example of the training data has the label "c"'):
        Task(labels=("a", "c"), weighting="balanced").resolve(labelled("a", "a"))
    with pytest.raises(UserError, match='every example of the training data has the label "a"'):
        Task(kind="multi", weighting="balanced").resolve(labelled("a|b", "a"))


def test_weights_given_as_text_are_numbers():
    task = make({"name": "classify", "labels": ["a", "b"], "class_weights": ["1", "2.5"]})
    assert float(task.weights({"labels": np.array([0, 1, 1])})["classify"]) == 6.0


def test_what_tasks_share_is_no_task():
    with pytest.raises(UserError, match='task.name="balance": no such task.*classify') as raised:
        make({"name": "balance"})
    assert "corpus" not in str(raised.value)
