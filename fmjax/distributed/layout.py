"""The layout of a run: its devices as a mesh, and the rules that divide axes of arrays over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding

from fmjax.contracts import Config
from fmjax.distributed import sharding
from fmjax.errors import UserError
from fmjax.hardware import explained


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and which of its axes each logical axis of an array is divided over."""

    mesh: Mesh
    rules: sharding.Rules

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes these the mesh and the rules of what is traced in the block."""
        in_force = sharding.in_force(self.rules, self.mesh)
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(in_force):
            yield

    def of_batch(self, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
        """Returns the sharding of each array of a global batch, or of its shapes."""
        return sharding.batch_shardings(batch, self.rules, self.mesh)


def lay_out(config: Config, devices: Sequence[Any] | None = None) -> Layout:
    """Returns the layout that a config describes over devices, by default all that are here.

    Raises UserError if it is none, or a batch does not divide over it.
    """
    section, size = config["mesh"], config["data"]["batch_size"]
    with explained():
        jax.devices()  # so that a device that is not there is said first
    rules = sharding.resolve_rules(section["rules"], section.get("table"))
    mesh = sharding.make_mesh(section["axes"], devices)
    sharding.check_used(rules, mesh, own=bool(section.get("table")))
    parts = accumulation(config)
    if parts < 1 or size % parts:
        within = f"does not divide into train.accumulate={parts} parts"
        raise UserError(f"data.batch_size={size} {within}; change one of them")
    setting = f"data.batch_size={size} / train.accumulate={parts}"
    sharding.check_batch_size(setting, size // parts, rules, mesh)
    return Layout(mesh, rules)


def accumulation(config: Config) -> int:
    """Returns the number of parts of a batch over which gradients are accumulated."""
    return int(config.get("train", {}).get("accumulate", 1))
