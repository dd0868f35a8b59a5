"""Cross entropy in chunks: the loss, every gradient and every comparison of whole logits, on one device and on many."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from fmjax.distributed import sharding
from fmjax.distributed.layout import Layout
from fmjax.layers import vocabulary
from fmjax.layers.heads import Lm
from fmjax.layers.vocabulary import VocabularyLogits, compare, cross_entropy_sum

AXES = ("act_batch", "act_length")
WIDTH, CLASSES = 6, 16


def inputs(rows: tuple[int, ...], bias: bool, dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    drawn = {
        "hidden": jnp.asarray(rng.normal(size=(*rows, WIDTH)), dtype),
        "table": rng.normal(size=(CLASSES, WIDTH)).astype(np.float32),
        "bias": rng.normal(size=CLASSES).astype(np.float32),
        "weights": rng.choice([0.0, 0.5, 1.0], size=rows).astype(np.float32),
    }
    return drawn if bias else {name: array for name, array in drawn.items() if name != "bias"}


def labels_of(weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns labels that are out of range where the weight is 0."""
    labels = np.random.default_rng(seed).integers(CLASSES, size=weights.shape)
    return np.where(weights > 0, labels, np.where(labels % 2, -100, CLASSES + 5)).astype(np.int32)


def whole(given: dict[str, Any]) -> jax.Array:
    hidden, table = given["hidden"], given["table"].astype(given["hidden"].dtype)
    logits = jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)
    return logits + given["bias"].reshape(*[1] * (logits.ndim - 1), -1) if "bias" in given else logits


def chunked(given: dict[str, Any], rows: int) -> VocabularyLogits:
    return VocabularyLogits(given["hidden"], given["table"], given.get("bias"), rows, AXES)


def both(
    given: dict[str, Any], labels: np.ndarray, rows: int, smoothing: float
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], tuple[jax.Array, dict[str, jax.Array]]]:
    """Returns the loss and its gradients, of whole logits and in chunks; a factor stands for what divides the sum."""

    def loss(given: dict[str, Any], logits: Any) -> jax.Array:
        return 0.37 * cross_entropy_sum(logits(given), labels, given["weights"], smoothing)

    plain = jax.value_and_grad(lambda given: loss(given, whole))
    parts = jax.value_and_grad(lambda given: loss(given, lambda given: chunked(given, rows)))
    return jax.jit(plain)(given), jax.jit(parts)(given)


def assert_equal(rows: tuple[int, ...], chunk: int, smoothing: float, bias: bool, dtype: str = "float32") -> None:
    given = inputs(rows, bias, dtype)
    (value, expected), (found_value, found) = both(given, labels_of(given["weights"]), chunk, smoothing)
    exact = dtype == "float32"
    assert np.isfinite(value)
    np.testing.assert_allclose(found_value, value, rtol=2e-6 if exact else 1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype and found[name].shape == gradient.shape
        scale = float(jnp.abs(gradient.astype(jnp.float32)).max()) or 1.0
        difference = jnp.abs(found[name].astype(jnp.float32) - gradient.astype(jnp.float32)).max()
        assert difference <= (2e-6 if exact else 2e-2) * max(scale, 1.0), name


@settings(max_examples=12)
@example(rows=7, chunk=3, smoothing=0.1, bias=True, dtype="bfloat16")
@given(
    rows=st.integers(1, 12),
    chunk=st.integers(1, 14),
    smoothing=st.sampled_from([0.0, 0.1]),
    bias=st.booleans(),
    dtype=st.just("float32"),
)
def test_chunks_have_the_loss_and_gradients_of_whole_logits(rows, chunk, smoothing, bias, dtype):
    assert_equal((2, rows), chunk, smoothing, bias, dtype)


def test_the_gradient_of_a_table_is_added_up_in_fp32():
    """Of many rows alike, each adds less than the last bit of a bfloat16 sum."""
    given = {"hidden": jnp.full((1, 1024, WIDTH), 1 / 64, jnp.bfloat16), "table": np.zeros((CLASSES, WIDTH), np.float32)}
    given["weights"] = np.ones((1, 1024), np.float32)
    gradient = both(given, np.zeros((1, 1024), np.int32), 1, 0.0)[1][1]["table"]
    np.testing.assert_allclose(gradient[0], 0.37 * 1024 / 64 * (1 / CLASSES - 1), rtol=1e-6)


def dropped_rows(most: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`in_chunks` without the last chunk, unless it is full."""
    full = arrays[0].reshape(-1, arrays[0].shape[-1]).shape[0] // most * most
    return RIGHT(most, arrays[0].reshape(-1, WIDTH)[:full], *[other.reshape(-1)[:full] for other in arrays[1:]])


def counted_padding(most: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`in_chunks` whose last chunk is filled up with rows of weight 1."""
    x, labels, weights = RIGHT(most, *arrays)
    place = jnp.arange(weights.size).reshape(weights.shape)
    return x, labels, jnp.where(place < arrays[1].size, weights, 1.0)


RIGHT, CHUNK_OF = vocabulary.in_chunks, vocabulary.chunk_of
MUTATIONS = {
    "last partial chunk dropped": ("in_chunks", dropped_rows),
    "padding rows counted": ("in_chunks", counted_padding),
    "bias dropped": ("chunk_of", lambda how, x, table, bias, labels: CHUNK_OF(how, x, table, None, labels)),
    "smoothing ignored": ("weighted_sum", None),
    "labels shifted": ("chunk_of", lambda how, x, table, bias, labels: CHUNK_OF(how, x, table, bias, labels + 1)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_noticed(mutation, monkeypatch):
    name, wrong = MUTATIONS[mutation]
    original = vocabulary.weighted_sum
    unsmoothed = lambda how, *arrays: original(vocabulary.dataclasses.replace(how, label_smoothing=0.0), *arrays)  # noqa: E731
    if "dropped" in mutation and "chunk" in mutation:
        # What is left has another shape: the loss alone says it.
        monkeypatch.setattr(vocabulary, "from_chunks", lambda x, shape: jnp.zeros(shape, x.dtype))
    monkeypatch.setattr(vocabulary, name, wrong or unsmoothed)
    with pytest.raises(AssertionError):
        assert_equal((2, 5), 4, 0.1, True)


def test_comparisons_are_those_of_whole_logits():
    given = inputs((2, 7), True)
    given["table"][5] = given["table"][9]  # a tie, which the first wins
    given["bias"][[5, 9]] = 50
    labels = np.random.default_rng(1).choice([5, 9, 20], size=(2, 7)).astype(np.int32)
    expected, found = compare(whole(given), labels), jax.jit(lambda: compare(chunked(given, 4), labels))()
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6, rtol=2e-6)
    np.testing.assert_array_equal(found[1], expected[1])
    assert expected[1].any() and not expected[1].all()


LAYOUTS: dict[str, tuple[dict[str, int], sharding.Rules]] = {
    "data": ({"data": 8}, sharding.RULES["dp"]),
    "rows and width": ({"data": 2, "fsdp": 2, "tensor": 2}, sharding.RULES["fsdp_tp"]),
    "length": ({"data": 2, "fsdp": 2, "context": 2}, sharding.RULES["fsdp_context"]),
    "vocabulary": ({"tensor": 8}, sharding.RULES["fsdp_tp"]),
    "vocabulary over data": ({"data": 4, "tensor": 2}, {"act_batch": "data", "vocab": ("data", "tensor")}),
}


def placed(given: dict[str, Any], labels: np.ndarray, layout: Layout) -> tuple[dict[str, Any], jax.Array]:
    names = {"hidden": (*AXES, None), "table": ("vocab", "embed"), "bias": ("vocab",), "weights": ("act_batch", None)}

    def put(name: str, array: Any) -> jax.Array:
        return jax.device_put(array, sharding.spec_sharding(name, array.shape, names[name], layout.rules, layout.mesh))

    return {name: put(name, array) for name, array in given.items()}, put("weights", labels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_is_unsharded(layout):
    axes, rules = LAYOUTS[layout]
    where = Layout(sharding.make_mesh(axes), rules)
    given = inputs((8, 6), True)
    labels = labels_of(given["weights"])
    (value, expected), _ = both(given, labels, 4, 0.1)
    compared = compare(whole(given), labels)
    with where.active():
        given, labels = placed(given, labels, where)
        _, (found_value, found) = both(given, labels, 4, 0.1)
        parts = jax.jit(lambda given, labels: compare(chunked(given, 4), labels))(given, labels)
    np.testing.assert_allclose(found_value, value, rtol=2e-6)
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=4e-6, err_msg=name)
    np.testing.assert_allclose(parts[0], compared[0], rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(parts[1], compared[1])


@pytest.mark.parametrize(("layout", "rows", "part"), [("rows and width", 48 // 4, 8), ("vocabulary", 48, 2)])
def test_no_device_has_whole_logits_or_another_part_of_the_vocabulary(layout, rows, part):
    axes, rules = LAYOUTS[layout]
    where = Layout(sharding.make_mesh(axes), rules)
    given = inputs((8, 6), True)
    with where.active():
        given, labels = placed(given, labels_of(given["weights"]), where)

        def loss(given: dict[str, Any]) -> jax.Array:
            return cross_entropy_sum(chunked(given, 4), labels, given["weights"], 0.1)

        program = jax.jit(jax.value_and_grad(loss)).lower(given).compile().as_text()
    assert f"f32[4,{part}]" in program  # a chunk's logits
    assert f"[{rows},{part}]" not in program and f",{CLASSES}]" not in program
    assert f"[{CLASSES}," not in program


def test_the_size_decides_unless_rows_are_given(monkeypatch):
    rows, classes = (4, 1024), 50_000
    assert vocabulary.chunk_rows(0, rows, AXES, classes) == vocabulary.ROWS
    assert vocabulary.chunk_rows(0, (1, 1024), AXES, classes) == 0
    assert vocabulary.chunk_rows(0, rows, AXES, 10_000) == 0
    assert vocabulary.chunk_rows(-1, rows, AXES, classes) == 0
    assert [vocabulary.chunk_rows(chunk, rows, AXES, 10) for chunk in (1, 4095, 4096)] == [1, 4095, 0]
    with Layout(sharding.make_mesh({"data": 4, "tensor": 2}), sharding.RULES["fsdp_tp"]).active():
        assert vocabulary.chunk_rows(0, rows, AXES, classes) == 0
        assert vocabulary.chunk_rows(1, (8, 1), AXES, 10) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_leaves_the_logits_to_the_loss(tied):
    features = {"hidden": inputs((2, 5), False)["hidden"], "word_table": inputs((1, 1), False)["table"]}
    head = Lm(tied=tied, use_bias=True, scale=0.5)
    params = nn.meta.unbox(head.init(jax.random.key(0), features, {}))
    params["params"]["bias"] = inputs((1, 1), True)["bias"]
    expected = head.apply(params, features, {})
    for chunk in (-1, 10):
        np.testing.assert_array_equal(head.clone(chunk=chunk).apply(params, features, {}), expected)
    later = head.clone(chunk=3).apply(params, features, {})
    assert isinstance(later, VocabularyLogits) and later.shape == expected.shape and later.rows == 3
    np.testing.assert_allclose(whole(vars(later)), expected, atol=2e-6)
    assert later.reshape(1, 2, 5, CLASSES).hidden.shape == (1, 2, 5, WIDTH)
