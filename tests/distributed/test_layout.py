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
