"""The training step: accumulation, sharding and donation do not change it, and what may not train or is not finite stays."""

from __future__ import annotations

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from fmjax import optim, pytree
from fmjax.data.stream.batches import batch_spec
from fmjax.distributed import sharding
from fmjax.distributed.layout import Layout
from fmjax.layers.heads import Classify, Heads, MaskedLm
from fmjax.layers.linear import embedding, normal
from fmjax.layers.mlp import Mlp, gelu
from fmjax.models import bert
from fmjax.tasks.mlm import Task
from fmjax.train import gradients
from fmjax.train.gradients import accumulated, clipped, sum_shardings
from fmjax.train.initial import create_state, with_params
from fmjax.train.state import abstract_params, abstract_state
from fmjax.train.step import make_step

ROWS, LENGTH, MASKS, VOCABULARY = 8, 8, 3, 32
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
TASK = Task(nsp=True)
# A large eps: where a gradient is zero but for rounding, as a key's bias is, Adam would make steps of the rounding.
OPTIM = {"learning_rate": 1e-2, "schedule": "constant", "eps": 1e-3, "weight_decay": 0.01, "clip_norm": 1.0}


class Small(nn.Module):
    """An encoder of one position-wise layer, which compiles in no time."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, batch):
        word = embedding(VOCABULARY, 8, axis="vocab", init=normal(0.3), dtype=jnp.float32, name="embed")
        x = Mlp(16, gelu, normal(0.3), name="encoder")(word(batch["input_ids"]))
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        features = {"hidden": x, "pooled": x[:, 0], "word_table": word.embedding}
        heads = {"mlm": partial(MaskedLm, gelu, 1e-12), "nsp": partial(Classify, dropout=0.0, kernel_init=normal(0.3))}
        return Heads(heads, name="head")(features, batch)


def build(dropout: float = 0.0) -> nn.Module:
    """Returns a small BERT, for what depends on how a model is sharded."""
    numbers = {"width": 8, "layers": 2, "attention_heads": 2, "mlp_width": 16, "vocab_size": VOCABULARY, "positions": LENGTH}
    rates = dict.fromkeys(("dropout", "embedding_dropout", "attention_dropout"), dropout)
    return bert.build(heads=TASK.heads, scan_layers=True, initializer_range=0.3, **numbers, **rates)


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Returns rows with 3, 0, 1, 2, ... masked tokens: no two ways to split them weigh the parts alike."""
    rng = np.random.default_rng(seed)
    counts = np.array([3, 0, 1, 2, 3, 3, 0, 1])
    return {
        "input_ids": rng.integers(5, VOCABULARY, (ROWS, LENGTH), dtype=np.int32),
        "token_type_ids": rng.integers(0, 2, (ROWS, LENGTH), dtype=np.int32),
        "attention_mask": (np.arange(LENGTH) < rng.integers(4, LENGTH + 1, ROWS)[:, None]).astype(np.int32),
        "masked_positions": np.sort(rng.integers(0, LENGTH, (ROWS, MASKS), dtype=np.int32)),
        "masked_labels": rng.integers(5, VOCABULARY, (ROWS, MASKS), dtype=np.int32),
        "masked_weights": (np.arange(MASKS) < counts[:, None]).astype(np.float32),
        "nsp_labels": rng.integers(0, 2, ROWS, dtype=np.int32),
    }


def one_device() -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])


@cache
def small(dropout: float = 0.0, **changes):
    """Returns what `begin` does of a small model, whose state no test donates."""
    return begin(Small(dropout), **changes)


def begin(model, rules=None, mesh=None, **changes):
    """Returns the step function's parts: the initial state, the optimizer's transform, and which parameters train."""
    mesh, rules = mesh or one_device(), rules or {}
    params = abstract_params(model, batch_spec(batch()), mesh, rules)
    config = OPTIM | changes
    transform = optim.build(config, params, 10).transform
    state = create_state(model, transform, batch_spec(batch()), abstract_state(params, transform, mesh), seed=0)
    return state, transform, optim.trainable(params, config.get("freeze", ()))


def run(model, start, steps: int, accumulate: int = 1):
    """Returns the state and the metrics after some steps on one device."""
    state, transform, trainable = start
    step = jax.jit(make_step(model, TASK, transform, trainable, accumulate))
    for number in range(steps):
        state, metrics = step(state, batch(number), jax.random.key(1))
    return state, metrics


def close(first, second, tolerance: float) -> None:
    one, two = pytree.names(first), pytree.names(second)
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(two[name]), atol=tolerance, rtol=tolerance, err_msg=name)


def test_accumulated_parts_are_the_whole_batch():
    model = Small()
    start = small()
    whole, metrics = run(model, start, 2)
    assert int(whole.step) == 2
    moves = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), whole.params, start[0].params)
    assert min(jax.tree.leaves(moves)) > 1e-4
    assert float(metrics["loss"]) == pytest.approx(float(metrics["loss_mlm"] + metrics["loss_nsp"]))
    for parts in (2, 4):
        state, other = run(model, start, 2, parts)
        close(whole.params, state.params, 1e-6)
        close(metrics, other, 1e-5)


def test_a_divided_sum_of_parts_is_that_of_one_device(monkeypatch):
    """Each device keeps a part of the sum of gradients, while the parts of the batch are added."""
    monkeypatch.setattr(gradients, "SMALL", 1)
    expected, metrics = run(Small(), small(), 1, accumulate=2)
    model, table, mesh = Small(), sharding.RULES["fsdp"], sharding.make_mesh(CUBE)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.in_force(table, mesh)):
        state, transform, trainable = begin(model, table, mesh)
        layout, params = Layout(mesh, table), abstract_params(model, batch_spec(batch()), mesh, table)
        assert sum_shardings(params, layout) is None  # on a CPU
        monkeypatch.setattr(Layout, "platform", "tpu")
        places = sum_shardings(params, layout)
        word = places.during["embed"]["embedding"], places.after["embed"]["embedding"]
        assert [place.shard_shape((VOCABULARY, 8)) for place in word] == [(VOCABULARY // 2, 4), (VOCABULARY, 4)]
        make = partial(accumulated, parts=2, shardings=places)
        step = jax.jit(make_step(model, TASK, transform, trainable, make_gradients=make))
        place = sharding.batch_shardings(batch(), table, mesh)
        state, other = step(state, jax.device_put(batch(), place), jax.random.key(1))
    close(expected.params, state.params, 1e-5)
    close(metrics, other, 1e-5)


def test_the_loss_is_of_sums_over_weights():
    model, first = Small(), batch()
    state, transform, trainable = small()
    metrics = jax.jit(make_step(model, TASK, transform, trainable))(state, first, jax.random.key(0))[1]
    outputs = model.apply({"params": state.params}, first)
    logs = np.asarray(jax.nn.log_softmax(outputs["mlm"]))
    at = np.take_along_axis(logs, first["masked_labels"][..., None], -1)[..., 0]
    assert float(metrics["loss_mlm"]) == pytest.approx(-(at * first["masked_weights"]).sum() / 13, rel=1e-5)
    pairs = np.asarray(jax.nn.log_softmax(outputs["nsp"]))[np.arange(ROWS), first["nsp_labels"]]
    assert float(metrics["loss_nsp"]) == pytest.approx(-pairs.mean(), rel=1e-5)


class Spoiled(Task):
    """The task, whose loss is multiplied by a number in the batch."""

    def loss(self, outputs, batch):
        return {name: total * batch["factor"][0] for name, total in super().loss(outputs, batch).items()}


def test_a_step_that_is_not_finite_changes_nothing():
    model = Small()
    state, transform, trainable = small(ema=0.9)
    step = jax.jit(make_step(model, Spoiled(nsp=True), transform, trainable))

    def go(state, factor):
        return step(state, batch() | {"factor": np.full(ROWS, factor, np.float32)}, jax.random.key(0))

    state, metrics = go(state, 1.0)
    assert float(metrics["nonfinite"]) == 0 and int(state.step) == 1
    # 1e30: the loss is finite and the gradient's norm is not.
    for number, factor in enumerate((np.nan, np.inf, 1e30), start=2):
        after, metrics = go(state, factor)
        assert float(metrics["nonfinite"]) == 1 and int(after.step) == number
        assert np.isfinite(float(metrics["loss"])) == (factor == 1e30)
        for name, leaf in pytree.names((state.params, state.opt_state)).items():
            kept = pytree.names((after.params, after.opt_state))[name]
            assert np.asarray(leaf).tobytes() == np.asarray(kept).tobytes() and leaf.dtype == kept.dtype, name
        state = after
    after, metrics = go(state, 1.0)
    assert float(metrics["nonfinite"]) == 0
    assert not np.array_equal(after.params["head"]["mlm"]["bias"], state.params["head"]["mlm"]["bias"])


def test_frozen_parameters_stay_and_count_for_no_norm():
    model, frozen = Small(), ("^embed/", "^head/mlm/")
    start, transform, trainable = small(freeze=frozen)
    state, metrics = jax.jit(make_step(model, TASK, transform, trainable))(start, batch(), jax.random.key(0))
    before, after = pytree.names(start.params), pytree.names(state.params)
    hits = {name: name.startswith(("embed/", "head/mlm/")) for name in before}
    assert any(hits.values()) and not all(hits.values())
    for name, hit in hits.items():
        assert np.array_equal(before[name], after[name]) == hit, name

    def loss(params):
        outputs = model.apply({"params": params}, batch())
        terms, weights = TASK.loss(outputs, batch()), TASK.weights(batch())
        return sum(terms[name] / weights[name] for name in terms)

    grads = pytree.names(jax.jit(jax.grad(loss))(start.params))
    squares = {name: float(jnp.square(grad).sum()) for name, grad in grads.items()}
    trained = sum(square for name, square in squares.items() if not hits[name])
    assert float(metrics["grad_norm"]) == pytest.approx(trained**0.5, rel=1e-4)
    assert sum(squares.values()) > 1.02 * trained


@pytest.fixture(scope="module")
def alone():
    """The state and metrics of three steps with dropout on one device."""
    model = build(dropout=0.2)
    return run(model, begin(model), 3)


def check_placed(state, ways: tuple[int, int]) -> None:
    """Moments are sharded as their parameters, counters are on every device."""
    kernel, adam = state.params["encoder"]["layers"]["mlp"]["up"]["kernel"], state.opt_state["adam"]
    assert kernel.addressable_shards[0].data.shape == (2, 8 // ways[0], 16 // ways[1])
    places = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    for moments in (adam.mu, adam.nu):
        assert jax.tree.map(lambda leaf: leaf.sharding, moments) == places
    assert adam.count.sharding.is_fully_replicated and state.step.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("rules", "ways"),
    [
        pytest.param("dp", (1, 1), marks=pytest.mark.full),
        pytest.param("fsdp", (2, 1), marks=pytest.mark.full),
        ("fsdp_tp", (2, 2)),
    ],
)
def test_sharded_steps_are_those_of_one_device(alone, rules, ways):
    model, mesh, table = build(dropout=0.2), sharding.make_mesh(CUBE), sharding.RULES[rules]
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.in_force(table, mesh)):
        state, transform, trainable = begin(model, table, mesh)
        check_placed(state, ways)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        place = sharding.batch_shardings(batch(), table, mesh)
        step = jax.jit(make_step(model, TASK, transform, trainable), donate_argnums=0)
        for number in range(3):
            before = state
            state, metrics = step(state, jax.device_put(batch(number), place), jax.random.key(1))
            # Donated: the old state's memory is the new one's.
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
            # A state that changed its shardings would be compiled for anew.
            moved = jax.tree.map(lambda leaf, at: leaf.sharding.is_equivalent_to(at, leaf.ndim), state, shardings)
            assert all(jax.tree.leaves(moved)), [name for name, same in pytree.names(moved).items() if not same]
    close(alone[0].params, state.params, 1e-5)
    close(alone[1], metrics, 1e-5)


def test_states_depend_on_the_seed_and_not_on_the_sharding():
    model, spec = Small(), batch_spec(batch())
    states = {}
    for name, (mesh, rules) in {"one": (one_device(), {}), "cube": (sharding.make_mesh(CUBE), sharding.RULES["fsdp_tp"])}.items():
        params = abstract_params(model, spec, mesh, rules)
        transform = optim.build(OPTIM, params, 10).transform
        abstract = abstract_state(params, transform, mesh)
        states[name] = create_state(model, transform, spec, abstract, seed=0)
    close(states["one"].params, states["cube"].params, 1e-6)
    other = create_state(model, transform, spec, abstract, seed=1)
    assert not np.isclose(other.params["embed"]["embedding"], states["one"].params["embed"]["embedding"]).any()
    # Given parameters are placed in the same way.
    given = with_params(jax.device_get(states["one"].params), transform, abstract)
    close(given.params, states["one"].params, 0)
    assert jax.tree.map(lambda leaf: leaf.sharding, given) == jax.tree.map(lambda leaf: leaf.sharding, states["cube"])
    assert int(given.step) == 0


def test_dropout_depends_on_key_and_step():
    model = Small(dropout=0.2)
    state, transform, trainable = small(dropout=0.2)
    step = jax.jit(make_step(model, TASK, transform, trainable))
    losses = {
        (key, number): float(step(state.replace(step=jnp.int32(number)), batch(), jax.random.key(key))[1]["loss"])
        for key, number in ((0, 0), (0, 1), (1, 0))
    }
    assert len(set(losses.values())) == 3
    assert float(step(state, batch(), jax.random.key(0))[1]["loss"]) == losses[0, 0]


def test_clipped_gradients_are_those_of_a_loop_over_examples():
    model, norm, rows = Small(dropout=0.2), 100.0, batch()
    start, transform, trainable = small(dropout=0.2, freeze=("^head/nsp/",))
    make = partial(clipped, norm=norm, trainable=trainable)
    step = jax.jit(make_step(model, TASK, transform, trainable, make_gradients=make))
    _, metrics = step(start, rows, jax.random.key(3))

    @jax.jit
    def one(params, row, key):
        def loss(params):
            outputs = model.apply({"params": params}, row, rngs={"dropout": key})
            terms, weights = TASK.loss(outputs, row), TASK.weights(row)
            return sum(terms[name] / jnp.maximum(weights[name], 1) for name in terms)

        return jax.value_and_grad(loss)(params)

    total, losses, norms = jax.tree.map(jnp.zeros_like, start.params), [], []
    key = jax.random.fold_in(jax.random.key(3), 0)
    for index in range(ROWS):
        row = {name: array[index : index + 1] for name, array in rows.items()}
        loss, grads = one(start.params, row, jax.random.fold_in(key, index))
        grads = jax.tree.map(lambda grad, trained: grad * trained, grads, trainable)
        norms.append(float(optax.tree_utils.tree_norm(grads)))
        total = jax.tree.map(lambda t, g, n=norms[-1]: t + g * min(1.0, norm / n) / ROWS, total, grads)
        losses.append(float(loss))
    assert min(norms) < norm < max(norms)  # some are scaled down
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree_utils.tree_norm(total)), rel=1e-5)
    gradients = jax.jit(make(*loss_and_weigh(model)))(start.params, rows, key)[0]
    close(gradients, total, 1e-4)


def loss_and_weigh(model):
    """Returns what a function of gradients is given."""

    def loss(params, part, weights, key):
        outputs = model.apply({"params": params}, part, rngs={"dropout": key})
        sums = TASK.loss(outputs, part)
        terms = {name: total / jnp.where(weights[name] > 0, weights[name], 1) for name, total in sums.items()}
        return sum(terms.values(), jnp.float32(0)), terms

    return loss, TASK.weights
