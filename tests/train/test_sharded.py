"""Any table of rules over any mesh trains as one device does, with dropout on, and compiles to no needless copies."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import FAMILIES, case, losses, one_device

from fmjax.data.stream.batches import batch_shapes
from fmjax.distributed import sharding
from fmjax.distributed.layout import Layout
from fmjax.models import bert, deit, electra, gpt, t5, vit
from fmjax.train.budget import saved_bytes
from fmjax.train.kernels import attention_kernels, described
from fmjax.train.state import abstract_params

MESHES: dict[str, list[dict[str, int]]] = {
    "dp": [{"data": 8}],
    "fsdp": [{"fsdp": 8}, {"data": 2, "fsdp": 4}],
    "fsdp_tp": [{"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 2, "fsdp": 4}],
    "fsdp_context": [{"data": 2, "fsdp": 2, "context": 2}, {"fsdp": 4, "context": 2}],
}
LAYOUTS = [(rules, mesh) for rules, meshes in MESHES.items() for mesh in meshes]
# Compiling takes long: .ci/run has every layout of every family on the oldest Python, and one of `fsdp` on the newest too.
QUICK = [("vit", 4), ("llama", 6)]


@functools.cache
def alone(family: str, folder: Path) -> np.ndarray:
    return losses(case(family, folder), one_device(), sharding.RULES["dp"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield tmp_path_factory.mktemp("families")
    case.cache_clear()
    alone.cache_clear()


def compare(family: str, layout: int, folder: Path, capfd) -> None:
    rules, axes = LAYOUTS[layout]
    expected = alone(family, folder)
    assert np.ptp(expected) > 1e-3  # it does train
    capfd.readouterr()
    found = losses(case(family, folder), sharding.make_mesh(axes), sharding.RULES[rules])
    errors = capfd.readouterr().err
    assert "Involuntary full rematerialization" not in errors, errors
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "layout"), QUICK)
def test_sharded_training_is_that_of_one_device(family, layout, folder, capfd):
    compare(family, layout, folder, capfd)


@pytest.mark.full
@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_of_every_family(family, layout, folder, capfd):
    if (family, layout) not in QUICK:
        compare(family, layout, folder, capfd)


def test_a_divided_length_is_attended_in_a_ring(folder):
    """What plans and the start of a run say of the layout under which the tests above train, and what they count."""
    (rules, axes), found = LAYOUTS[6], case("llama", folder)
    layout, built = Layout(sharding.make_mesh(axes), sharding.RULES[rules]), found.experiment.built
    spec = batch_shapes(found.config, built.examples["train"])
    params = abstract_params(built.model, spec, layout.mesh, layout.rules)
    assert described(attention_kernels(built.model, built.task, params, spec, layout, found.config)) == "ring"
    plain = built.model.clone(settings=dataclasses.replace(built.model.settings, attention="xla"))
    bytes_ = [saved_bytes(model, built.task, params, spec, layout, found.config) for model in (built.model, plain)]
    assert bytes_[0] < bytes_[1]


SMALL = {"width": 48, "layers": 1, "attention_heads": 4, "mlp_width": 96}
TEXT = SMALL | {"vocab_size": 64, "positions": 16}
IMAGES = SMALL | {"image_size": 8, "patch_size": 2, "channels": 1}
T5 = SMALL | {"vocab_size": 64, "head_width": 12, "decoder_layers": 0}
# Without a constraint XLA copies gradients of the first whole; those of the others it shards well.
HEADS = [
    *[(bert, "classify", TEXT), (bert, "pooled", TEXT), (electra, "classify", TEXT)],
    *[(vit, "classify", IMAGES), (vit, "pooled", IMAGES), (deit, "classify_distilled", IMAGES)],
]
OTHER_HEADS = [
    *[(bert, "tag", TEXT), (bert, "classify_mean", TEXT), (electra, "rtd", TEXT)],
    *[(gpt, "classify", TEXT), (gpt, "classify_mean", TEXT), (t5, "classify_mean", T5)],
]


@pytest.mark.parametrize(
    ("family", "kind", "settings"),
    [*HEADS, *(pytest.param(*head, marks=pytest.mark.full) for head in OTHER_HEADS)],
)
def test_no_head_has_its_gradient_copied_whole(family, kind, settings, capfd):
    """A head's kernel is sharded along the vectors that it reads; their gradient stays by rows."""
    rules, mesh = sharding.RULES["fsdp_tp"], sharding.make_mesh({"tensor": 2, "fsdp": 4})
    model = family.build(heads={kind: {}}, **settings)
    text = {"input_ids": (8, 16), "pool_weights": (8, 16)}
    arrays = {"images": (8, 8, 8, 1)} if settings is IMAGES else text
    spec = {
        name: jax.ShapeDtypeStruct(shape, np.int32 if name == "input_ids" else np.float32)
        for name, shape in (arrays | {"weights": (8,)}).items()
    }
    places = sharding.batch_shardings(spec, rules, mesh)
    batch = {name: one.update(sharding=places[name]) for name, one in spec.items()}
    params = abstract_params(model, spec, mesh, rules)

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        made = jnp.square(model.apply({"params": params}, batch)[kind])
        return batch["weights"] @ made.reshape(len(made), -1).mean(axis=1)

    placed = jax.tree.map(lambda leaf: leaf.sharding, params)
    capfd.readouterr()
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.in_force(rules, mesh)):
        jax.jit(jax.grad(loss), out_shardings=placed).lower(params, batch).compile()
    errors = capfd.readouterr().err
    assert "Involuntary full rematerialization" not in errors, errors


@pytest.mark.full
@pytest.mark.parametrize("layout", [1, 4])
@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_every_algorithm_trains_sharded_as_on_one_device(family, name, layout, folder):
    """Lion and Muon step by the sign, and by something like it, of what a gradient that is zero but for rounding leaves to
    chance: with their rates small, that stays rounding."""
    settings = {"name": name, "b2": None, "eps": None, "learning_rate": 1e-3 if name == "adafactor" else 1e-5}
    settings |= {"min_dim_size_to_factor": 16} if name == "adafactor" else {}
    rules, axes = LAYOUTS[layout]
    found = losses(case(family, folder), sharding.make_mesh(axes), sharding.RULES[rules], optimizer_settings=settings)
    expected = losses(case(family, folder), one_device(), sharding.RULES["dp"], optimizer_settings=settings)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_sharded_logits_in_chunks_are_those_of_one_device(folder, capfd):
    """The vocabulary over `tensor`, the table's width and rows over `fsdp`; 64 rows on a device, 24 at once."""
    rules, axes = LAYOUTS[3]
    found = losses(case("gpt", folder), sharding.make_mesh(axes), sharding.RULES[rules], loss_chunk=24)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    np.testing.assert_allclose(found, alone("gpt", folder), rtol=0, atol=1e-5)
