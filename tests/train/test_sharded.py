"""Any table of rules over any mesh trains as one device does, with dropout on, and compiles to no needless copies."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from support.cases import FAMILIES, case, losses, one_device

from fmjax.distributed import sharding

MESHES: dict[str, list[dict[str, int]]] = {
    "dp": [{"data": 8}],
    "fsdp": [{"fsdp": 8}, {"data": 2, "fsdp": 4}],
    "fsdp_tp": [{"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 2, "fsdp": 4}],
    "fsdp_context": [{"data": 2, "fsdp": 2, "context": 2}, {"fsdp": 4, "context": 2}],
}
LAYOUTS = [(rules, mesh) for rules, meshes in MESHES.items() for mesh in meshes]
# Every family under two layouts or so, every layout with two families or so: compiling takes long.
QUICK = [
    *[("bert", 3), ("bert", 5), ("gpt", 1), ("gpt", 4), ("llama", 0), ("llama", 6), ("t5", 2), ("t5", 5)],
    *[("transformer", 1), ("transformer", 6), ("bart", 3), ("vit", 0), ("vit", 4), ("mae", 2), ("mae", 3)],
]


@pytest.fixture(autouse=True, scope="module")
def quick():
    """The models are small: compiling them well costs more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
