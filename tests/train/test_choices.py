"""Remat, scanned or unrolled layers, parts of a batch and bf16 do not change the loss but for rounding."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from support.cases import FAMILIES, case, losses, one_device

from fmjax.distributed import sharding

CHOICES = {
    "everything": {"remat": "everything"},
    "scanned": {"scan_layers": True},
    "scanned, dots": {"scan_layers": True, "remat": "dots"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield tmp_path_factory.mktemp("families")
    case.cache_clear()
    plain.cache_clear()


def run(family: str, folder: Path, **changes) -> np.ndarray:
    return losses(case(family, folder), one_device(), sharding.RULES["dp"], **changes)


def no_dropout(family: str, folder: Path) -> dict[str, float]:
    """A part of a batch has its own keys, so that with dropout the parts draw other masks than the whole."""
    names = dataclasses.asdict(case(family, folder).experiment.built.model.settings)
    return {name: 0.0 for name in names if name.endswith("dropout")}


@functools.cache
def plain(family: str, folder: Path, dropout: bool = True) -> np.ndarray:
    return run(family, folder, scan_layers=False, remat="none", **({} if dropout else no_dropout(family, folder)))


def compare(family: str, choice: str, folder: Path) -> None:
    found = run(family, folder, **({"scan_layers": False} | CHOICES[choice]))
    np.testing.assert_allclose(found, plain(family, folder), rtol=0, atol=1e-5)


QUICK = ("bert", "scanned, dots")


def test_remat_and_scan_do_not_change_the_loss(folder):
    compare(*QUICK, folder)


@pytest.mark.full
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_remat_and_scan_do_not_change_the_loss_of_any_family(family, choice, folder):
    if (family, choice) != QUICK:
        compare(family, choice, folder)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_do_not_change_the_loss(family, folder):
    found = run(family, folder, scan_layers=False, parts=4, **no_dropout(family, folder))
    np.testing.assert_allclose(found, plain(family, folder, dropout=False), rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_changes_the_loss_by_its_rounding(family, folder):
    """bf16 has eight bits: 2^-9 of each number, some of it averaged away over the batch."""
    found = run(family, folder, scan_layers=False, dtype="bfloat16")
    np.testing.assert_allclose(found, plain(family, folder), rtol=2e-2)
    assert not np.array_equal(found, plain(family, folder))
