"""Experts divided over the mesh: a toy whose layer of experts trains as it does on one device, and what plans say of it."""

from __future__ import annotations

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from fmjax.distributed import sharding
from fmjax.errors import UserError
from fmjax.layers.linear import normal, parameter
from fmjax.planning import report
from fmjax.planning.topology import read_topology
from fmjax.train.initial import create_state
from fmjax.train.state import abstract_params, abstract_state
from fmjax.train.step import make_step

ROWS, WIDTH, HIDDEN, EXPERTS = 16, 8, 12, 4
RULES = sharding.RULES["fsdp_expert"]
MESH = {"data": 2, "fsdp": 2, "expert": 2}
ROWS_HERE = ("act_expert_rows", "act_embed")
SENT = ("act_expert", "act_expert_rows", "act_embed")


class Experts(nn.Module):
    """Each row passes the expert that the router prefers, times its probability."""

    @nn.compact
    def __call__(self, batch):
        x_ND, init = sharding.constrain(batch["x"], *ROWS_HERE), normal(0.5)
        router = parameter(self, "router", init, ("embed", None), (WIDTH, EXPERTS))
        up = parameter(self, "up", init, ("expert", "embed", "mlp"), (EXPERTS, WIDTH, HIDDEN))
        down = parameter(self, "down", init, ("expert", "mlp", "embed"), (EXPERTS, HIDDEN, WIDTH))
        weights_NE = sharding.constrain(jax.nn.softmax(x_ND @ router), "act_expert_rows", None)
        weights_NE *= jax.nn.one_hot(weights_NE.argmax(axis=1), EXPERTS)
        sent_END = sharding.constrain(jnp.einsum("NE,ND->END", weights_NE > 0, x_ND), *SENT)
        hidden_ENF = nn.gelu(jnp.einsum("END,EDF->ENF", sent_END, up))
        done_END = sharding.constrain(jnp.einsum("ENF,EFD->END", hidden_ENF, down), *SENT)
        joined_ND = sharding.constrain(jnp.einsum("NE,END->ND", weights_NE, done_END), *ROWS_HERE)
        return sharding.constrain(joined_ND, "act_batch", "act_embed")


TASK = SimpleNamespace(
    loss=lambda outputs, batch: {"square": jnp.square(outputs - batch["y"]).sum()},
    weights=lambda batch: {"square": jnp.float32(ROWS)},
)


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(ROWS, WIDTH)).astype(np.float32) for name in "xy"}


SPEC = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch(0).items()}


def trained(mesh: jax.sharding.Mesh):
    """Returns the state and the losses of three steps."""
    model, transform = Experts(), optax.adam(1e-2, eps=1e-3)
    params = abstract_params(model, SPEC, mesh, RULES)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.in_force(RULES, mesh)):
        state = create_state(model, transform, SPEC, abstract_state(params, transform, mesh), seed=0)
        step = jax.jit(make_step(model, TASK, transform, jax.tree.map(lambda _: True, params)))
        places, losses = sharding.batch_shardings(batch(0), RULES, mesh), []
        for number in range(3):
            state, metrics = step(state, jax.device_put(batch(number), places), jax.random.key(1))
            losses.append(float(metrics["loss"]))
    return state, losses


def test_divided_experts_train_as_on_one_device(capfd):
    alone, expected = trained(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]))
    state, losses = trained(sharding.make_mesh(MESH))
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name, leaf in state.params.items():
        np.testing.assert_allclose(leaf, alone.params[name], atol=1e-5)
    up, down = (state.params[name].addressable_shards[0].data.shape for name in ("up", "down"))
    assert up == (EXPERTS // 2, WIDTH // 2, HIDDEN) and down == (EXPERTS // 2, HIDDEN, WIDTH // 2)


def test_a_plan_shows_where_experts_go(monkeypatch):
    params = abstract_params(Experts(), SPEC, sharding.make_mesh(MESH), RULES)
    step = SimpleNamespace(
        built=SimpleNamespace(model=Experts()), abstract=SimpleNamespace(spec=SPEC, state=SimpleNamespace(params=params))
    )
    monkeypatch.setattr(report, "describe_step", lambda *_: step)
    lines = report.sharding_table({}, read_topology("cpu:8")).splitlines()
    assert any("expert 4 over expert, embed 8 over fsdp, mlp 12" in line for line in lines if line.startswith("up"))


def test_a_mesh_divides_no_experts_of_a_model_without_any():
    boxed = {"up": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 6), jnp.float32), ("embed", "mlp"))}
    with pytest.raises(UserError, match=r'mesh\.axes: expert=2 divides experts, and no parameter .* axis "expert"; leave it out'):
        sharding.parameter_shardings(boxed, RULES, sharding.make_mesh(MESH))
    sharding.parameter_shardings(boxed, RULES, sharding.make_mesh({"data": 2, "fsdp": 4}))
