"""The mesh, the rules, and the shardings that follow from the logical names of axes."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fmjax.distributed import sharding
from fmjax.distributed.compiler import OPTIONS, compiler_options
from fmjax.errors import UserError
from fmjax.planning.topology import Absent

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [({"data": -1}, (8,)), ({"data": 2, "fsdp": -1}, (2, 4)), (CUBE, (2, 2, 2)), ({"data": -1, "tensor": 8}, (1, 8))],
)
def test_meshes_cover_the_devices(axes, sizes):
    mesh = sharding.make_mesh(axes)
    assert mesh.axis_names == tuple(axes) and tuple(mesh.shape.values()) == sizes
    assert set(mesh.axis_types) == {AxisType.Auto} and set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    "axes", [{"data": 3}, {"data": 4}, {"data": 16}, {"data": -1, "fsdp": -1}, {"data": 0}, {"data": -1, "x": 3}, {}]
)
def test_meshes_that_do_not_fit_are_refused(axes):
    with pytest.raises(UserError, match="mesh.axes=.*multiply to the 8 devices"):
        sharding.make_mesh(axes)


@dataclasses.dataclass(frozen=True)
class Sliced:
    """A device of one of two slices."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


@pytest.mark.parametrize("axes", [{"data": -1}, {"slice": 2, "data": -1}, {"data": 2, "fsdp": 2}])
def test_a_mesh_over_slices_divides_batches_over_them_first(axes):
    devices = [Sliced(10 * index % 77, index % 2) for index in range(8)]
    mesh = sharding.make_mesh(axes, devices)
    assert mesh.axis_names[0] == "slice" and mesh.shape["slice"] == 2 and mesh.size == 8
    for number, part in enumerate(mesh.devices):
        assert {device.slice_index for device in part.flat} == {number}
    assert sharding.mesh_axes("act_batch", sharding.RULES["fsdp"], mesh) == mesh.axis_names
    assert sharding.mesh_axes("embed", sharding.RULES["fsdp"], mesh) == mesh.axis_names[2:]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 8}, "in 2 slices, for which slice=2 is added; divide one of the sizes by 2"),
        ({"slice": 4, "data": 2}, "in 2 slices; set slice=2, or leave it out"),
        ({"data": 3}, "must multiply to the 8 devices"),
    ],
)
def test_sizes_that_do_not_fit_the_slices_are_refused(axes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(axes, [Sliced(index, index // 4) for index in range(8)])


def test_options_of_the_compiler_are_for_several_devices():
    several = sharding.make_mesh({"data": -1}, [Absent(index, "gpu") for index in range(4)])
    assert compiler_options(several) == {"xla_gpu_enable_latency_hiding_scheduler": True}
    assert not compiler_options(sharding.make_mesh({"data": 1}, [Absent(0, "gpu")]))
    assert not compiler_options(sharding.make_mesh({"data": -1}))
    # A name that this version of XLA does not know would be an error.
    options = {name: value for own in OPTIONS.values() for name, value in own.items()}
    assert jax.jit(lambda x: x + 1, compiler_options=options)(jnp.float32(1)) == 2


def test_rules_are_found_by_name():
    assert sharding.resolve_rules("dp") == {"act_batch": ("slice", "data")}
    with pytest.raises(UserError, match=r'"fsdp_pt".*did you mean "fsdp_tp".*dp, fsdp, fsdp_tp'):
        sharding.resolve_rules("fsdp_pt")


@pytest.mark.parametrize(
    ("rules", "spec"),
    [("dp", P(None, None, None)), ("fsdp", P(None, "fsdp", None)), ("fsdp_tp", P(None, "fsdp", "tensor"))],
)
def test_parameters_are_placed_by_the_names_of_their_axes(rules, spec):
    boxed = {"up": {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((3, 4, 6), jnp.float32), ("layers", "embed", "mlp"))}}
    found = sharding.parameter_shardings(boxed, sharding.RULES[rules], sharding.make_mesh(CUBE))["up"]["kernel"]
    placed = jax.device_put(np.zeros((3, 4, 6), np.float32), found)
    assert found.is_equivalent_to(jax.NamedSharding(found.mesh, spec), 3)
    assert placed.addressable_shards[0].data.shape == (3, 4 // (1 + (rules != "dp")), 6 // (1 + (rules == "fsdp_tp")))


def test_axes_that_the_mesh_lacks_are_left_whole():
    found = sharding.spec_sharding("x", (3, 5), ("vocab", "embed"), sharding.RULES["fsdp_tp"], sharding.make_mesh({"data": 8}))
    assert found.is_fully_replicated


def test_unnamed_parameters_are_on_every_device():
    plain = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}
    found = sharding.parameter_shardings(plain, sharding.RULES["fsdp_tp"], sharding.make_mesh(CUBE))
    assert found["x"].is_fully_replicated


def test_an_axis_that_does_not_divide_is_named():
    boxed = {"up": {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 5), jnp.float32), ("embed", "mlp"))}}
    message = '^up/kernel: axis "mlp" of size 5 is not divisible by the 2 devices of mesh axis tensor'
    with pytest.raises(UserError, match=message):
        sharding.parameter_shardings(boxed, sharding.RULES["fsdp_tp"], sharding.make_mesh(CUBE))


def test_batches_are_split_by_rows():
    mesh, rules = sharding.make_mesh(CUBE), sharding.RULES["fsdp"]
    batch = {"input_ids": np.zeros((8, 6), np.int32), "labels": np.zeros(8, np.int32)}
    found = sharding.batch_shardings(batch, rules, mesh)
    assert found["input_ids"].shard_shape((8, 6)) == (2, 6) and found["labels"].shard_shape((8,)) == (2,)
    with pytest.raises(UserError, match='batch input_ids: axis "act_batch" of size 6 .* 4 devices of mesh axis data.fsdp'):
        sharding.batch_shardings({"input_ids": np.zeros((6, 8))}, rules, mesh)


@pytest.mark.parametrize(("size", "rules", "ways"), [(6, "fsdp", 4), (3, "dp", 2), (0, "dp", 2)])
def test_batch_sizes_must_divide(size, rules, ways):
    mesh = sharding.make_mesh(CUBE)
    with pytest.raises(UserError, match=rf"data\.batch_size={size}: is not divisible by {ways} devices"):
        sharding.check_batch_size("data.batch_size", size, sharding.RULES[rules], mesh)
    sharding.check_batch_size("data.batch_size", 2 * ways, sharding.RULES[rules], mesh)


def test_constrain_does_nothing_alone_and_shards_under_a_mesh_and_rules():
    x = jnp.zeros((8, 4))
    assert sharding.constrain(x, "act_batch", "act_embed") is x
    mesh, rules = sharding.make_mesh(CUBE), sharding.RULES["fsdp"]
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.in_force(rules, mesh)):
        y = jax.jit(lambda x: sharding.constrain(x, "act_batch", "act_embed"))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 4)
