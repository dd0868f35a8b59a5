"""Optimizers against formulas written out in numpy; decay, freezing, scales and shardings by name."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from fmjax import optim, pytree
from fmjax.errors import UserError
from fmjax.optim.chain import factors
from fmjax.optim.schedules import SHAPES as SCHEDULES

LAYERS = 3
SHAPES = {
    "embed/word/embedding": (7, 4),
    "embed/norm/scale": (4,),
    "encoder/layers/mlp/up/kernel": (LAYERS, 4, 6),
    "encoder/layers/mlp/up/bias": (LAYERS, 6),
    "encoder/layers/mlp_norm/scale": (LAYERS, 4),
    "encoder/pooler/kernel": (4, 4),
    "head/classify/kernel": (4, 2),
    "head/classify/bias": (2,),
}
UNDECAYED = {name for name in SHAPES if name.endswith(("bias", "norm/scale"))}
STEADY: dict[str, Any] = {"schedule": "constant", "learning_rate": 0.01}


def draw(seed: int, scale: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    flat = {name: rng.normal(size=shape) * scale for name, shape in SHAPES.items()}
    return pytree.unnames({name: jnp.asarray(leaf, jnp.float32) for name, leaf in flat.items()})


def run(optimizer: optim.Optimizer, params: Any, gradients: list[Any]) -> list[tuple[Any, Any]]:
    """Returns the parameters and the optimizer's state after each of the updates with the gradients."""

    @jax.jit
    def update(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = optimizer.transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.transform.init)(params)
    history = []
    for gradient in gradients:
        params, state = update(params, state, gradient)
        history.append((params, state))
    return history


def moved(config: dict[str, Any], gradient: Any | None = None) -> dict[str, np.ndarray]:
    """Returns how far one update moves each parameter."""
    params = draw(0)
    gradient = draw(1) if gradient is None else gradient
    after, _ = run(optim.build(STEADY | config, params, 10), params, [gradient])[-1]
    return pytree.names(jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), after, params))


def by_hand(name: str, rate: float, steps: int, warmup: int, end: float, count: int) -> float:
    """The schedules as they are written in words."""
    if count < warmup:
        return rate * count / warmup
    if name == "constant":
        return rate
    if name == "inverse_sqrt":
        return rate * math.sqrt(warmup) / math.sqrt(count)
    done = min(1.0, (count - warmup) / (steps - warmup))
    shape = 1 - done if name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return rate * (end + (1 - end) * shape)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 30])
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_schedule_is_its_formula_at_every_step(name: str, warmup: int, end: float) -> None:
    if (name == "inverse_sqrt" and not warmup) or (end and name in ("constant", "inverse_sqrt")):
        with pytest.raises(UserError, match=r"end of warm-up|is not used by schedule"):
            optim.schedule(name, 0.5, 100, warmup, end)
        return
    rate = optim.schedule(name, 0.5, 100, warmup, end)
    expected = [by_hand(name, 0.5, 100, warmup, end, count) for count in range(130)]
    found = rate(jnp.arange(130))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_schedule_at_its_corners() -> None:
    rate = optim.schedule("linear", 1.0, 10, 4)
    assert [float(rate(count)) for count in (0, 4, 10, 11)] == [0, 1, 0, 0]
    assert float(optim.schedule("linear", 1.0, 10, 10)(10)) == 1


@pytest.mark.parametrize(
    ("config", "warmup"),
    [({}, 0), ({"warmup_steps": 7}, 7), ({"warmup_ratio": 0.06}, 6), ({"warmup_ratio": 0.061}, 7)],
)
def test_warmup_is_given_in_steps_or_as_a_share(config: dict[str, Any], warmup: int) -> None:
    rate = optim.build({"learning_rate": 1.0, "schedule": "constant"} | config, draw(0), 100).learning_rate
    assert float(rate(warmup)) == 1 and all(float(rate(count)) < 1 for count in range(warmup))


def test_adamw_with_clipping_decay_and_warmup_is_that_of_numpy() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in float64, after clipping by the global norm."""
    config = {
        "learning_rate": 0.02, "schedule": "linear", "warmup_steps": 2, "b1": 0.8, "b2": 0.95, "eps": 1e-6,
        "weight_decay": 0.1, "clip_norm": 3.0,
    }  # fmt: skip
    params = draw(0)
    # The last gradient is smaller than the clipping norm.
    gradients = [draw(seed, 0.05 if seed == 5 else 1.0) for seed in range(1, 6)]
    expected = {name: np.float64(leaf) for name, leaf in pytree.names(params).items()}
    mean, square = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    for count, gradient in enumerate(gradients):
        grads = {name: np.float64(leaf) for name, leaf in pytree.names(gradient).items()}
        norm = math.sqrt(sum((leaf**2).sum() for leaf in grads.values()))
        assert (norm < 3) == (count == 4)
        rate = by_hand("linear", 0.02, 8, 2, 0.0, count)
        for name in SHAPES:
            g = grads[name] * min(1.0, 3.0 / norm)
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.95 * square[name] + 0.05 * g**2
            m, v = mean[name] / (1 - 0.8 ** (count + 1)), square[name] / (1 - 0.95 ** (count + 1))
            decay = 0.0 if name in UNDECAYED else 0.1
            expected[name] = expected[name] - rate * (m / (np.sqrt(v) + 1e-6) + decay * expected[name])
    found, state = run(optim.build(config, params, 8), params, gradients)[-1]
    for name, leaf in pytree.names(found).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, expected[name], atol=1e-6, err_msg=name)
    assert int(state["rate"].count) == int(state["adam"].count) == 5


def test_only_named_parameters_decay_also_where_layers_are_stacked() -> None:
    zero = draw(0, scale=0.0)
    params = pytree.names(draw(0))
    for name, change in moved({"weight_decay": 0.5}, zero).items():
        expected = np.asarray(params[name]) * (0 if name in UNDECAYED else -0.01 * 0.5)
        np.testing.assert_allclose(change, expected, atol=1e-6, err_msg=name)


def test_penalties_are_part_of_the_gradient_before_it_is_clipped() -> None:
    """The first direction of Adam, of bias-corrected mean g and square g^2, is g / (|g| + eps)."""
    params = draw(0)
    params["encoder"]["pooler"]["kernel"] = params["encoder"]["pooler"]["kernel"].at[0].set(0.0)
    gradient = pytree.names(draw(1))
    for clip in (None, 2.0):
        config = {"weight_decay": 0.0, "l1": 0.3, "l2": 0.2, "eps": 1.0, "clip_norm": clip}
        full = {
            name: np.float64(gradient[name]) + (0 if name in UNDECAYED else 0.3 * np.sign(w) + 0.2 * np.float64(w))
            for name, w in pytree.names(params).items()
        }
        norm = math.sqrt(sum((leaf**2).sum() for leaf in full.values()))
        after, _ = run(optim.build(STEADY | config, params, 10), params, [draw(1)])[-1]
        for name, leaf in pytree.names(after).items():
            g = full[name] * (1 if clip is None else min(1.0, clip / norm))
            expected = np.float64(pytree.names(params)[name]) - 0.01 * g / (np.abs(g) + 1)
            np.testing.assert_allclose(leaf, expected, atol=1e-6, err_msg=name)


def test_frozen_parameters_are_not_penalised() -> None:
    params = draw(0)
    config = STEADY | {"l1": 0.1, "l2": 0.1, "weight_decay": 0.0, "freeze": ["^embed"]}
    optimizer = optim.build(config, params, 10)
    assert list(optimizer.transform.init(params)) == ["freeze", "penalty", "adam", "rate"]
    after, _ = run(optimizer, params, [draw(1)])[-1]
    jax.tree.map(np.testing.assert_array_equal, after["embed"], params["embed"])


def test_stages_are_those_asked_for_in_order() -> None:
    params = draw(0)
    everything = {"clip_norm": 1.0, "freeze": ["^embed"], "multipliers": {"^head": 2.0}, "ema": 0.9}
    transform = optim.build(STEADY | everything, params, 10).transform
    state = transform.init(params)
    assert list(state) == ["freeze", "clip", "adam", "decay", "scale", "rate", "ema"]
    # A plain dictionary stays one, so a state read from a checkpoint has the structure of a computed one.
    _, updated = jax.eval_shape(transform.update, draw(1), state, params)
    assert type(state) is type(updated) is dict
    assert jax.tree.structure(updated) == jax.tree.structure(state)
    bare = optim.build(STEADY | {"weight_decay": 0.0}, params, 10).transform
    assert list(bare.init(params)) == ["adam", "rate"]


def test_frozen_parameters_never_change_by_a_bit() -> None:
    params = draw(0)
    word = params["embed"]["word"]
    word["embedding"] = word["embedding"].at[0].set(jnp.array([-0.0, 0, 1e-40, 1]))
    config = STEADY | {"freeze": ["^embed", "pooler"], "clip_norm": 1.0, "layer_decay": 0.5, "ema": 0.9}
    gradients = [draw(seed) for seed in (1, 2, 3)]
    gradients[1]["embed"]["word"]["embedding"] *= jnp.nan
    after, state = run(optim.build(config, params, 10), params, gradients)[-1]
    average = pytree.names(state["ema"].ema)
    for name, leaf in pytree.names(after).items():
        before = np.asarray(pytree.names(params)[name])
        if name.startswith("embed") or "pooler" in name:
            assert np.asarray(leaf).tobytes() == before.tobytes(), name
            np.testing.assert_allclose(average[name], before, rtol=0, atol=1e-37)  # the CPU flushes 1e-40
        else:
            assert np.isfinite(leaf).all() and (np.asarray(leaf) != before).all(), name


def test_frozen_parameters_count_for_no_norm_and_have_no_moments() -> None:
    params, gradient = draw(0), draw(1)
    # A large eps keeps Adam from undoing the scale of the gradient.
    config = STEADY | {"freeze": ["^embed"], "clip_norm": 0.1, "eps": 1.0}
    found, state = run(optim.build(config, params, 10), params, [gradient])[-1]
    assert not any(name.startswith("embed") for name in pytree.names(state["adam"].inner_state.mu))
    trained = {key: params[key] for key in ("encoder", "head")}
    alone = {key: gradient[key] for key in trained}
    expected, _ = run(optim.build({**config, "freeze": ()}, trained, 10), trained, [alone])[-1]
    jax.tree.map(np.testing.assert_array_equal, {key: found[key] for key in trained}, expected)


def test_backward_pass_of_frozen_parameters_is_dropped() -> None:
    """The gradient of a frozen matrix takes matrix products that the compiled update does not have."""

    def dots(freeze: list[str]) -> int:
        params = {"a": {"kernel": jnp.ones((8, 16))}, "b": {"kernel": jnp.ones((16, 4))}}
        config = STEADY | {"no_decay": (), "clip_norm": 1.0, "freeze": freeze}
        optimizer = optim.build(config, params, 10)

        def update(params: Any, state: Any, x: jax.Array) -> Any:
            def loss(params: Any) -> jax.Array:
                return jnp.sum((jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]) ** 2)

            grads = jax.grad(loss)(params)
            updates, state = optimizer.transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.transform.init(params)
        return jax.jit(update).lower(params, state, jnp.ones((32, 8))).compile().as_text().count(" dot(")

    assert dots(["^a"]) < dots([])


def test_layer_decay_and_multipliers_scale_the_rate() -> None:
    plain = moved({"weight_decay": 0.1})
    scaled = moved({"weight_decay": 0.1, "layer_decay": 0.5, "multipliers": {"^head": 3.0, "kernel$": 2.0}})
    for name, change in scaled.items():
        factor = np.float32(2.0 if name.endswith("kernel") else 1.0) * (3 if name.startswith("head") else 1)
        if name.startswith("embed/"):
            factor = factor * 0.5 ** (LAYERS + 1)
        elif "/layers/" in name:
            per_layer = np.array([0.5**3, 0.5**2, 0.5**1], np.float32)
            factor = factor * per_layer.reshape(LAYERS, *[1] * (change.ndim - 1))
        np.testing.assert_allclose(change, plain[name] * factor, atol=1e-6, err_msg=name)


def test_encoder_and_decoder_count_their_own_layers() -> None:
    params = {
        "embed": {"word": {"embedding": jnp.ones((2, 2))}},
        "encoder": {"layers": {"kernel": jnp.ones((2, 3, 4))}, "norm": {"scale": jnp.ones(2)}},
        "decoder": {"layers": {"kernel": jnp.ones((3, 5))}},
    }
    found = factors(params, {}, 0.5)
    assert found["encoder/layers/kernel"].tolist() == [[[0.25]], [[0.5]]]
    assert found["decoder/layers/kernel"].tolist() == [[0.125], [0.25], [0.5]]
    assert found["embed/word/embedding"] == 0.5**4 and found["encoder/norm/scale"] == 1


def test_a_stack_of_a_head_is_no_part_of_the_backbone() -> None:
    params = {
        "embed": {"patch": {"kernel": jnp.ones((2, 2))}},
        "encoder": {"layers": {"kernel": jnp.ones((2, 3, 4))}},
        "head": {"pixels": {"layers": {"kernel": jnp.ones((5, 3, 4))}, "out": {"kernel": jnp.ones((3, 2))}}},
    }
    found = factors(params, {}, 0.5)
    assert found["encoder/layers/kernel"].tolist() == [[[0.25]], [[0.5]]]
    assert found["embed/patch/kernel"] == 0.5**3
    assert found["head/pixels/layers/kernel"] == found["head/pixels/out/kernel"] == 1


def test_ema_averages_the_updated_parameters() -> None:
    params = draw(0)
    optimizer = optim.build(STEADY | {"ema": 0.75}, params, 10)
    expected = jax.tree.map(np.float64, params)
    gradients = [draw(seed) for seed in (1, 2, 3)]
    for after, state in run(optimizer, params, gradients):
        expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * np.float64(new), expected, after)
        for name, leaf in pytree.names(state["ema"].ema).items():
            np.testing.assert_allclose(leaf, pytree.names(expected)[name], atol=1e-6, err_msg=name)


def test_ema_and_parameters_can_be_donated_together() -> None:
    params = draw(0)
    transform = optim.build(STEADY | {"ema": 0.9}, params, 10).transform
    for init in (transform.init, jax.jit(transform.init)):
        copy = jax.tree.map(jnp.copy, params)
        jax.block_until_ready(jax.jit(lambda state: state, donate_argnums=0)((copy, init(copy))))


@pytest.mark.parametrize("freeze", [(), ("^embed",)])
def test_states_take_on_what_belongs_to_the_parameters(freeze: tuple[str, ...]) -> None:
    """Built and mapped from shapes alone: mu, nu and the average get the parameters' specs, counters none."""
    params = jax.eval_shape(lambda: draw(0))
    config = STEADY | {"ema": 0.9, "clip_norm": 1.0, "freeze": freeze, "layer_decay": 0.9}
    transform = optim.build(config, params, 10).transform
    specs = pytree.map_named(lambda name, leaf: PartitionSpec(name), params)
    shapes = jax.eval_shape(transform.init, params)
    state = optim.map_params(transform, lambda leaf, spec: spec, shapes, specs, other=lambda leaf: "whole")
    adam = state["adam"].inner_state if freeze else state["adam"]
    trained = {name for name in SHAPES if not (freeze and name.startswith("embed"))}
    for moments in (adam.mu, adam.nu):
        assert pytree.names(moments) == {name: PartitionSpec(name) for name in trained}
    assert state["ema"].ema == specs and adam.count == "whole"
    if not freeze:
        tree_map_params = optax.tree_utils.tree_map_params
        assert state == tree_map_params(
            transform, lambda leaf, spec: spec, shapes, specs, transform_non_params=lambda leaf: "whole"
        )


def test_trainable_is_what_no_expression_matches() -> None:
    mask = pytree.names(optim.trainable(draw(0), ["^embed", "layers/.*bias$"]))
    assert {name for name, trains in mask.items() if not trains} == {
        "embed/word/embedding", "embed/norm/scale", "encoder/layers/mlp/up/bias"
    }  # fmt: skip


def test_unset_settings_are_the_defaults() -> None:
    params = draw(0)
    given = {"name": "adamw", "clip_norm": None, "ema": None, "warmup_steps": None}
    assert list(optim.build(given, params, 10).transform.init(params)) == ["adam", "decay", "rate"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning_rat": 1}, 'learning_rat is not a setting of adamw (did you mean "learning_rate"?)'),
        ({"name": "adamv"}, '"adamv" is not known (did you mean "adamw"?); choose from adamw'),
        ({"schedule": "cosin"}, '"cosin" is not known (did you mean "cosine"?); choose from constant, linear'),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_steps and optim.warmup_ratio are both set"),
        ({"warmup_steps": 0, "warmup_ratio": 0.1}, "warmup_steps and optim.warmup_ratio are both set"),
        ({"warmup_steps": 11}, "11 warm-up steps exceed the run's 10"),
        ({"warmup_steps": 1.5}, "optim.warmup_steps=1.5 is out of range; use a whole number"),
        ({"warmup_ratio": 1.5}, "optim.warmup_ratio=1.5 is out of range"),
        ({"learning_rate": "1e-3"}, "optim.learning_rate='1e-3' is out of range; use a number"),
        ({"learning_rate": math.nan}, "optim.learning_rate=nan is out of range"),
        ({"clip_norm": 0}, "optim.clip_norm=0 is out of range; use a number above 0"),
        ({"l1": -1e-3}, "optim.l1=-0.001 is out of range; use a number that is not negative"),
        ({"l2": "x"}, "optim.l2='x' is out of range"),
        ({"b2": 1.0}, "optim.b2=1.0 is out of range"),
        ({"ema": 1.0}, "optim.ema=1.0 is out of range"),
        ({"layer_decay": 0.0}, "optim.layer_decay=0.0 is out of range"),
        ({"multipliers": {"^head": 0}}, "optim.multipliers.^head=0 is out of range; use a number above 0"),
        ({"multipliers": {"^nothing": 2.0}}, 'optim.multipliers: "^nothing" matches no parameter'),
        ({"freeze": ["^nothing"]}, 'optim.freeze: "^nothing" matches no parameter'),
        ({"no_decay": ["("]}, 'optim.no_decay: "(" is not a regular expression'),
        ({"freeze": ["."]}, "optim.freeze=. matches every parameter"),
    ],
)
def test_mistakes_are_named_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        optim.build(config, draw(0), 10)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_layer_decay_needs_stacked_layers() -> None:
    with pytest.raises(UserError, match="no stacked layers"):
        factors({"head": {"kernel": jnp.ones((2, 2))}}, {}, 0.5)
