"""The initial state: its values do not depend on how its program is compiled, nor on which parameters are wanted."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest

from fmjax import optim, pytree
from fmjax.distributed import compiler
from fmjax.train.initial import create_params, create_state
from fmjax.train.state import abstract_params, abstract_state

pytestmark = pytest.mark.optimized
SPEC = {"x": jax.ShapeDtypeStruct((2, 5), np.float32)}
INITIALIZERS = {
    "normal": nn.initializers.normal(0.02),
    "truncated": nn.initializers.truncated_normal(0.02),
    "lecun": nn.initializers.lecun_normal(),
    "xavier": nn.initializers.xavier_uniform(),
    "ones": nn.initializers.ones_init(),
}


class Draws(nn.Module):
    """One parameter of each kind of draw."""

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        leaves = [self.param(name, draw, (7, 33)) for name, draw in INITIALIZERS.items()]
        return batch["x"].sum() + sum(leaf.sum() for leaf in leaves)


def test_neither_options_nor_what_is_wanted_change_initial_values(monkeypatch):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    params = abstract_params(Draws(), SPEC, mesh, {})
    transform = optim.build({"learning_rate": 1e-3, "no_decay": ()}, params, 10).transform
    abstract = abstract_state(params, transform, mesh)
    assert compiler.options_once(mesh) == compiler.ONCE["cpu"]

    def drawn() -> dict[str, np.ndarray]:
        return pytree.names(jax.device_get(create_state(Draws(), transform, SPEC, abstract, seed=3).params))

    quick = drawn()
    some = create_params(Draws(), SPEC, params, 3, ["xavier", "normal"])
    assert sorted(some) == ["normal", "xavier"] and create_params(Draws(), SPEC, params, 3, []) == {}
    monkeypatch.setattr(compiler, "ONCE", {})
    usual = drawn()
    for name, values in usual.items():
        assert np.array_equal(values, quick[name]) and np.array_equal(values, some.get(name, values)), name
    assert len({values.tobytes() for values in usual.values()}) == len(INITIALIZERS)
