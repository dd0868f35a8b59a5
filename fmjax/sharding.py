"""Where arrays live: the mesh, the logical axis names, and the rules that join them.

A parameter names its axes where it is made (`vocab embed heads kv mlp layers`), an activation where it is constrained
(`act_batch act_length act_embed act_heads act_mlp`). A table of RULES maps those names to mesh axes, and `jax.jit` with
`NamedSharding` (what `pjit` became) does the rest. The idea is that of T5X and GSPMD (Xu et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fmjax import pytree
from fmjax.errors import UserError, nearest

Rules = Mapping[str, str | tuple[str, ...]]

# Names that a table leaves out are not sharded.
RULES: dict[str, Rules] = {
    "dp": {"act_batch": "data"},
    "fsdp": {"act_batch": ("data", "fsdp"), "embed": "fsdp"},
    "fsdp_tp": {
        "act_batch": ("data", "fsdp"),
        "embed": "fsdp",
        "vocab": "tensor",
        "heads": "tensor",
        "mlp": "tensor",
        "act_heads": "tensor",
        "act_mlp": "tensor",
    },
}


def resolve_rules(name: str) -> Rules:
    """Returns the rules table of that name. Raises UserError if there is none."""
    if name not in RULES:
        raise UserError(
            f'mesh.rules="{name}": no such table{nearest(name, RULES)}; choose one of {", ".join(RULES)}'
        )
    return RULES[name]


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """Returns a mesh over all devices, e.g. of {"data": -1}; a size of -1 takes the devices that are left.

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    known = math.prod(size for size in axes.values() if size != -1)
    unknown = [name for name, size in axes.items() if size == -1]
    sizes = {name: devices // max(known, 1) if size == -1 else size for name, size in axes.items()}
    if len(unknown) > 1 or min(sizes.values(), default=0) < 1 or math.prod(sizes.values()) != devices:
        raise UserError(
            f"mesh.axes={dict(axes)}: the sizes must multiply to the {devices} devices here; "
            "give sizes that do, at most one of them -1"
        )
    # Linen's logical constraints are written for Auto axes; jax.make_mesh would give Explicit ones.
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains an activation's sharding by logical names; without a mesh and rules in force it does nothing."""
    return nn.with_logical_constraint(x, logical)


def _mesh_axes(logical: str | None, rules: Rules, mesh: Mesh) -> tuple[str, ...]:
    axes = rules.get(logical, ()) if logical else ()
    return tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if axis in mesh.shape)


def spec_sharding(name: str, shape: tuple[int, ...], logical: tuple[str | None, ...], rules: Rules, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of one array, given the logical name of each of its axes.

    Raises UserError, naming the array, the axis and both numbers, where an axis does not divide.
    """
    spec: list[tuple[str, ...] | None] = []
    for size, axis in zip(shape, logical, strict=True):
        axes = _mesh_axes(axis, rules, mesh)
        ways = math.prod(mesh.shape[a] for a in axes)
        if size % ways:
            raise UserError(
                f'{name}: axis "{axis}" of size {size} does not divide over the {ways} devices of mesh axis '
                f"{'+'.join(axes)}; change the size or mesh.axes"
            )
        spec.append(axes or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def parameter_shardings(boxed: Any, rules: Rules, mesh: Mesh) -> Any:
    """Returns the tree of shardings of a tree of abstract parameters that carry their logical names."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        shape = leaf.value.shape if isinstance(leaf, nn.Partitioned) else leaf.shape
        logical = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * len(shape)
        return spec_sharding(pytree.path_name(path), shape, logical, rules, mesh)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def batch_shardings(batch: Mapping[str, Any], rules: Rules, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of each array of a batch: its first axis over the data devices, the others whole."""
    return {
        name: spec_sharding(f"batch {name}", array.shape, ("act_batch",) + (None,) * (array.ndim - 1), rules, mesh)
        for name, array in batch.items()
    }


def check_batch_size(setting: str, size: int, rules: Rules, mesh: Mesh) -> None:
    """Raises UserError if a global batch of `size` rows does not divide over the data devices."""
    ways = math.prod(mesh.shape[axis] for axis in _mesh_axes("act_batch", rules, mesh))
    if size < 1 or size % ways:
        raise UserError(
            f"{setting}={size}: does not divide over {ways} devices; use a multiple of {ways}, or fewer devices"
        )
