"""The layout of a run: its devices as a mesh, and the rules that shard array axes over it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding

from fmjax.contracts import Config
from fmjax.distributed import sharding
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.hardware import explained

DEFAULT_AXES = {"data": -1}  # of `defaults.py`


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the mesh axes that each logical array axis is sharded over."""

    mesh: Mesh
    rules: sharding.Rules

    @property
    def platform(self) -> str:
        """The platform of the devices: cpu, gpu or tpu."""
        platform: str = self.mesh.devices.flat[0].platform
        return platform

    @property
    def length_parts(self) -> int:
        """The number of parts into which the mesh divides the length of rows."""
        axes = sharding.mesh_axes("act_length", self.rules, self.mesh)
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Applies the mesh and the rules to everything traced in the block."""
        in_force = sharding.in_force(self.rules, self.mesh)
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(in_force):
            yield

    def of_batch(self, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
        """Returns the sharding of each array of a global batch, or of the batch's shapes."""
        return sharding.batch_shardings(batch, self.rules, self.mesh)


def lay_out(config: Config, devices: Sequence[Any] | None = None) -> Layout:
    """Returns the layout of a config over devices, by default all local ones.

    Raises UserError if the layout is invalid, or a batch does not divide over it.
    """
    section, size = config["mesh"], config["data"]["batch_size"]
    with explained():
        jax.devices()  # so that a missing device is reported first
    rules = sharding.resolve_rules(section["rules"], section.get("table"))
    mesh = sharding.make_mesh(chosen_axes(section, rules), devices)
    sharding.check_used(rules, mesh, own=bool(section.get("table")))
    parts = accumulation(config)
    if parts < 1 or size % parts:
        within = f"does not divide into train.accumulate={parts} parts"
        raise UserError(f"data.batch_size={size} {within}; change one of them")
    setting = f"data.batch_size={size} / train.accumulate={parts}"
    sharding.check_batch_size(setting, size // parts, rules, mesh)
    say_unsharded(section, rules, mesh)
    return Layout(mesh, rules)


def chosen_axes(section: Config, rules: sharding.Rules) -> Mapping[str, int]:
    """Returns the axes of the mesh: those of the config; or, if they are the default and a named
    table of rules shards parameters, the one axis that shards most of them.
    """
    axes: Mapping[str, int] = dict(section["axes"])
    own, divided = bool(section.get("table")), sharding.parameter_axes(rules)
    return {divided[0]: -1} if axes == DEFAULT_AXES and divided and not own else axes


def say_unsharded(section: Config, rules: sharding.Rules, mesh: Mesh) -> None:
    """Prints one line about the chosen axes, and a warning if rules that shard parameters shard
    none.
    """
    divided = sharding.parameter_axes(rules)
    lacking = [axis for axis in divided if axis not in mesh.shape]
    if mesh.size == 1 or not divided:
        return
    rest = f"; add {' and '.join(lacking)} to mesh.axes to divide more" if lacking else ""
    if dict(section["axes"]) == DEFAULT_AXES and not section.get("table"):
        say(f"mesh.rules={section['rules']}: mesh.axes is {dict(mesh.shape)}{rest}")
    elif lacking == divided:
        say(
            f"warning: mesh.rules={section['rules']} divides parameters over "
            f"{' and '.join(divided)}, which mesh.axes={dict(section['axes'])} lacks: each of "
            f"{mesh.size} devices holds all of them"
        )


def accumulation(config: Config) -> int:
    """Returns the number of batch parts for gradient accumulation."""
    return int(config.get("train", {}).get("accumulate", 1))


def length_parts(config: Config) -> int:
    """Returns the number of parts into which the mesh divides the length of rows."""
    section = config["mesh"]
    rules = sharding.resolve_rules(section["rules"], section.get("table"))
    mesh = sharding.make_mesh(chosen_axes(section, rules))
    return Layout(mesh, rules).length_parts
