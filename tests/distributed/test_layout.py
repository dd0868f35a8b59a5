"""A layout is a mesh with rules over which a batch divides."""

from __future__ import annotations

import jax
import pytest

from fmjax.distributed.layout import lay_out
from fmjax.errors import UserError


def config(batch_size: int = 8, accumulate: int = 1) -> dict:
    mesh = {"axes": {"data": 2, "fsdp": 4}, "rules": "fsdp"}
    return {"mesh": mesh, "data": {"batch_size": batch_size}, "train": {"accumulate": accumulate}}


def test_a_layout():
    layout = lay_out(config())
    assert dict(layout.mesh.shape) == {"data": 2, "fsdp": 4} and layout.rules["embed"] == "fsdp"
    place = layout.of_batch({"labels": jax.ShapeDtypeStruct((8,), "int32")})["labels"]
    assert place.shard_shape((8,)) == (1,)
    with layout.active():
        assert dict(jax.sharding.get_abstract_mesh().shape) == {"data": 2, "fsdp": 4}
    assert not jax.sharding.get_abstract_mesh().shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 12},
            "data.batch_size=12 / train.accumulate=1=12: is not divisible by 8 devices",
        ),
        (
            {"batch_size": 16, "accumulate": 4},
            "train.accumulate=4=4: is not divisible by 8 devices",
        ),
        ({"accumulate": 3}, "data.batch_size=8 does not divide into train.accumulate=3 parts"),
        ({"accumulate": 0}, "train.accumulate=0 parts"),
    ],
)
def test_a_batch_has_to_divide(settings, message):
    with pytest.raises(UserError) as raised:
        lay_out(config(**settings))
    assert message in str(raised.value)


def mesh(rules: str, axes: dict[str, int], **more) -> dict:
    return {"mesh": {"axes": axes, "rules": rules} | more, "data": {"batch_size": 8}}


@pytest.mark.parametrize(
    ("rules", "axes", "shape", "said"),
    [
        ("dp", {"data": -1}, {"data": 8}, ""),
        ("fsdp", {"data": -1}, {"fsdp": 8}, "mesh.rules=fsdp: mesh.axes is {'fsdp': 8}"),
        (
            "fsdp_tp",
            {"data": -1},
            {"fsdp": 8},
            "mesh.rules=fsdp_tp: mesh.axes is {'fsdp': 8}; add tensor to mesh.axes to divide more",
        ),
        ("fsdp_context", {"data": -1}, {"fsdp": 8}, "mesh.rules=fsdp_context: mesh.axes is {'fsdp': 8}"),
        (
            "fsdp",
            {"data": 8},
            {"data": 8},
            "warning: mesh.rules=fsdp divides parameters over fsdp, which mesh.axes={'data': 8} lacks: "
            "each of 8 devices holds all of them",
        ),
        ("fsdp", {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 4}, ""),
    ],
)
def test_rules_that_divide_parameters_find_their_axis_or_say_that_they_do_not(rules, axes, shape, said, capsys):
    assert dict(lay_out(mesh(rules, axes)).mesh.shape) == shape
    assert capsys.readouterr().err.strip() == said


def test_a_table_of_ones_own_and_one_device_are_left_as_they_are(capsys):
    own = mesh("dp", {"data": -1}, table={"embed": "data", "act_batch": "data"})
    assert dict(lay_out(own).mesh.shape) == {"data": 8}
    assert dict(lay_out(mesh("fsdp", {"data": -1}), jax.devices()[:1]).mesh.shape) == {"fsdp": 1}
    assert capsys.readouterr().err == ""
