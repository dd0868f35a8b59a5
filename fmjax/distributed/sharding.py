"""Sharding: the mesh, logical axis names, and the rules that map them to mesh axes.

Parameters name their axes where they are defined (`vocab embed heads kv mlp expert layers`),
activations where they are constrained (`act_batch act_length act_embed act_heads act_mlp`; inside a
layer of experts `act_expert act_expert_rows`). A table of RULES maps those names to mesh axes, and
`jax.jit` with `NamedSharding` (formerly `pjit`) does the rest, as in T5X and GSPMD (Xu et al.
2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import flax.linen as nn
import jax
import numpy as np
from flax.linen import spmd
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fmjax import pytree
from fmjax.contracts import PyTree
from fmjax.errors import UserError, nearest, one_line

Rules: TypeAlias = Mapping[str, str | tuple[str, ...]]
Shaped: TypeAlias = np.ndarray | jax.Array | jax.ShapeDtypeStruct

# The mesh axis across slices of TPUs, or machines with GPUs, which a slower network connects.
# Batches alone are divided over it: the gradients are all that it carries.
SLICE = "slice"

# Names that are not in a table are not sharded.
RULES: dict[str, Rules] = {
    "dp": {"act_batch": (SLICE, "data")},
    "fsdp": {"act_batch": (SLICE, "data", "fsdp"), "embed": "fsdp"},
    "fsdp_tp": {
        "act_batch": (SLICE, "data", "fsdp"),
        "embed": "fsdp",
        "vocab": "tensor",
        "heads": "tensor",
        "mlp": "tensor",
        "act_heads": "tensor",
        "act_mlp": "tensor",
    },
    "fsdp_context": {
        "act_batch": (SLICE, "data", "fsdp"),
        "act_length": "context",
        "embed": "fsdp",
    },
    # For models with experts, kernels [E,D,F]: outside of them, batches are divided over the
    # experts' axis, too.
    "fsdp_expert": {
        "act_batch": (SLICE, "data", "fsdp", "expert"),
        "act_expert": "expert",
        "act_expert_rows": (SLICE, "data", "fsdp"),
        "embed": "fsdp",
        "expert": "expert",
    },
}
PARAMETERS = ("vocab", "embed", "heads", "kv", "mlp", "expert", "layers")
ACTIVATIONS = (
    *("act_batch", "act_length", "act_embed", "act_heads", "act_mlp"),
    *("act_expert", "act_expert_rows"),
)
# Size in bytes from which an unsharded parameter is an error if rules shard others.
LARGE = 2**24


def resolve_rules(name: str, table: Mapping[str, str | Sequence[str]] | None = None) -> Rules:
    """Returns the rules with that name, or those of the config's own `table`.

    Raises UserError for unknown names.
    """
    known = (*PARAMETERS, *ACTIVATIONS)
    for axis, axes in (table or {}).items():
        if axis not in known:
            raise UserError(
                f'mesh.table: no axis is named "{axis}"{nearest(axis, known)}; '
                f"choose from {', '.join(known)}"
            )
        if not isinstance(axes, str | list | tuple) or not all(
            isinstance(one, str) for one in axes
        ):
            raise UserError(
                f"mesh.table.{axis}={axes}: is not an axis of the mesh; use a name, or a list of "
                "names"
            )
    if table:
        return {
            axis: written(axes if isinstance(axes, str) else tuple(axes))
            for axis, axes in table.items()
        }
    if name not in RULES:
        raise UserError(
            f'mesh.rules="{name}": no such table{nearest(name, RULES)}; '
            f"choose one of {', '.join(RULES)}, or write mesh.table"
        )
    return RULES[name]


def in_force(rules: Rules, mesh: Mesh) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns rules in Linen's form, without the axes that a mesh does not have."""
    return tuple(
        (logical, mesh_axes(logical, rules, mesh))
        for logical in rules
        if mesh_axes(logical, rules, mesh)
    )


def check_used(rules: Rules, mesh: Mesh, own: bool) -> None:
    """Raises UserError if no rule uses a mesh axis, since devices along it would all do the same
    work.

    Also raises UserError if a rule of the config's `own` table names an axis that the mesh lacks;
    named tables also work for smaller meshes.
    """
    for logical, axes in rules.items() if own else ():
        if lacking := [axis for axis in written(axes) if axis not in mesh.shape]:
            there = ", ".join(mesh.shape)
            raise UserError(
                f"mesh.table.{logical}={lacking[0]}: mesh.axes has only {there}; "
                "add it there, or drop the rule"
            )
    used = {axis for logical in rules for axis in mesh_axes(logical, rules, mesh)}
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            named = ", ".join(
                f"{logical}={'+'.join(written(axes))}" for logical, axes in rules.items()
            )
            raise UserError(
                f"mesh.axes: no rule uses {axis}={size}, so {size} devices would do the same work; "
                f"the rules are {named}; choose others with mesh.rules, or leave {axis} out"
            )


def parameter_axes(rules: Rules) -> list[str]:
    """Returns the mesh axes that rules shard parameters over, in the order of the rules."""
    named = [
        axis for logical, axes in rules.items() if logical in PARAMETERS for axis in written(axes)
    ]
    return [*dict.fromkeys(named)]


def written(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    """Returns the mesh axes of a rule as text."""
    return (axes,) if isinstance(axes, str) else axes


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh over all devices, for example for {"data": -1}; a size of -1 takes the
    remaining devices.

    Devices of several slices have the axis "slice", which is added where `axes` lacks it.
    `devices` may be those of a topology that is not attached. Raises UserError if the sizes do not
    multiply to their number.
    """
    count = jax.device_count() if devices is None else len(devices)
    slices = count_slices(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(axes if slices == 1 else with_slices(axes, slices, count), count)
    # Linen's logical constraints need Auto axes; the default of jax.make_mesh is Explicit.
    kinds = (AxisType.Auto,) * len(sizes)
    try:
        if slices > 1:
            grid = mesh_utils.create_hybrid_device_mesh(
                [1 if axis == SLICE else size for axis, size in sizes.items()],
                [size if axis == SLICE else 1 for axis, size in sizes.items()],
                jax.devices() if devices is None else devices,
                allow_split_physical_axes=True,
            )
            return Mesh(grid, tuple(sizes), axis_types=kinds)
        if devices is None:
            return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
        grid = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    except (NotImplementedError, ValueError) as error:
        reason = one_line(error, 200)
        raise UserError(
            f"mesh.axes={sizes}: the devices here cannot form this mesh ({reason}); choose other "
            "sizes"
        ) from error
    return Mesh(grid, tuple(sizes), axis_types=kinds)


def count_slices(devices: Sequence[jax.Device]) -> int:
    """Returns the number of slices that devices are in; 1 where their platform has none."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def with_slices(axes: Mapping[str, int], slices: int, devices: int) -> Mapping[str, int]:
    """Returns the axes of a mesh over several slices. Raises UserError for another number of them,
    or sizes that leave no room for it."""
    there = f"mesh.axes={dict(axes)}: the {devices} devices are in {slices} slices"
    if axes.get(SLICE, slices) != slices:
        raise UserError(f"{there}; set {SLICE}={slices}, or leave it out")
    if SLICE not in axes and math.prod(axes.values()) == devices:
        raise UserError(
            f"{there}, for which {SLICE}={slices} is added; divide one of the sizes by {slices}"
        )
    return {SLICE: slices, **axes}


def mesh_sizes(axes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Returns the size of each axis of a mesh over that many devices.

    Raises UserError if the sizes do not multiply to that number.
    """
    known = math.prod(size for size in axes.values() if size != -1)
    unknown = [name for name, size in axes.items() if size == -1]
    sizes = {name: devices // max(known, 1) if size == -1 else size for name, size in axes.items()}
    if (
        len(unknown) > 1
        or min(sizes.values(), default=0) < 1
        or math.prod(sizes.values()) != devices
    ):
        raise UserError(
            f"mesh.axes={dict(axes)}: the sizes must multiply to the {devices} devices here; "
            "change them; at most one may be -1 (all that are left)"
        )
    return sizes


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains an activation's sharding by logical names; does nothing without a mesh and rules
    in force.

    An axis of size 1, such as the length of a generated token, is not sharded. Raises UserError if
    any other axis does not divide.
    """
    rules: Rules = {logical: axes or () for logical, axes in nn.get_logical_axis_rules()}
    mesh = jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty:
        return x
    named = tuple(None if size == 1 else axis for axis, size in zip(logical, x.shape, strict=True))
    for axis, size in zip(named, x.shape, strict=True):
        check_divides(
            f"an activation of shape {x.shape}", axis, size, mesh_axes(axis, rules, mesh), mesh
        )
    constrained: jax.Array = spmd.with_logical_constraint(x, named)
    return constrained


def shard_embedded(x: jax.Array) -> jax.Array:
    """Shards [B,L,D], or [B,D] with one vector per row, like activations.

    Otherwise embeddings and their gradients inherit the sharding of the table, and the inputs of a
    head that of its kernel, and must be resharded.
    """
    return constrain(x, "act_batch", *["act_length"] * (x.ndim - 2), "act_embed")


def mesh_axes(logical: str | None, rules: Rules, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the mesh axes that rules shard a logical axis over, without axes that the mesh
    lacks."""
    axes = rules.get(logical, ()) if logical else ()
    return tuple(axis for axis in written(axes) if axis in mesh.shape)


def axes_in_force(logical: str | None, size: int) -> tuple[str, ...]:
    """Returns the mesh axes over which the rules in force divide an axis of that size.

    None without a mesh, or if they do not divide the size, such as that of a single row.
    """
    rules: Rules = {logical: axes or () for logical, axes in nn.get_logical_axis_rules()}
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in mesh_axes(logical, rules, mesh) if mesh.shape[axis] > 1)
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def spec_sharding(
    name: str, shape: tuple[int, ...], logical: tuple[str | None, ...], rules: Rules, mesh: Mesh
) -> NamedSharding:
    """Returns the sharding of one array, given the logical name of each of its axes.

    Raises UserError, naming the array, the axis and both numbers, if an axis does not divide.
    """
    spec: list[tuple[str, ...] | None] = []
    for size, axis in zip(shape, logical, strict=True):
        axes = mesh_axes(axis, rules, mesh)
        check_divides(name, axis, size, axes, mesh)
        spec.append(axes or None)
    used = [axis for axes in spec for axis in axes or ()]
    for axis in used:
        if used.count(axis) > 1:
            raise UserError(
                f"{name}: rules shard two of its axes ({', '.join(map(str, logical))}) over mesh "
                f"axis {axis}; use one mesh axis for each"
            )
    return NamedSharding(mesh, PartitionSpec(*spec))


def check_divides(
    name: str, axis: str | None, size: int, axes: tuple[str, ...], mesh: Mesh | AbstractMesh
) -> None:
    """Raises UserError, naming the array, the axis and both numbers, if a size does not divide over
    mesh axes."""
    ways = math.prod(mesh.shape[one] for one in axes)
    if size % ways:
        raise UserError(
            f'{name}: axis "{axis}" of size {size} is not divisible by the {ways} devices of mesh '
            "axis "
            f"{'+'.join(axes)}; change the size or mesh.axes"
        )


def parameter_shardings(boxed: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """Returns the tree of shardings of a tree of abstract parameters that carry their logical
    names.

    Raises UserError if an axis does not divide, for a large parameter that no rule shards while
    rules shard others, and for a mesh that divides experts if there are none.
    """
    check_experts(boxed, rules, mesh)
    sharded = any(
        mesh.shape[axis] > 1 for logical in PARAMETERS for axis in mesh_axes(logical, rules, mesh)
    )

    def one(path: tuple[object, ...], leaf: PyTree) -> NamedSharding:
        name, (value, logical) = pytree.path_name(path), named_axes(leaf)
        sharding = spec_sharding(name, value.shape, logical, rules, mesh)
        size = math.prod(value.shape) * value.dtype.itemsize
        if sharded and size >= LARGE and sharding.is_fully_replicated:
            axes = ", ".join(
                f"{axis or 'unnamed'} {length}"
                for axis, length in zip(logical, value.shape, strict=True)
            )
            raise UserError(
                f"{name}: {size / 2**20:,.0f} MiB would be replicated on each of {mesh.size} "
                "devices: no rule shards its axes "
                f"({axes}); name one of them in mesh.table, or choose another mesh.rules"
            )
        return sharding

    return jax.tree_util.tree_map_with_path(
        one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )


def check_experts(boxed: PyTree, rules: Rules, mesh: Mesh) -> None:
    """Raises UserError if the mesh divides experts and no parameter has them, since devices along
    that axis would hold the same parameters."""
    axes = [axis for axis in mesh_axes("expert", rules, mesh) if mesh.shape[axis] > 1]
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    if axes and not any("expert" in named_axes(leaf)[1] for leaf in leaves):
        raise UserError(
            f"mesh.axes: {axes[0]}={mesh.shape[axes[0]]} divides experts, and no parameter of the "
            'model has an axis "expert"; leave it out'
        )


def named_axes(leaf: PyTree) -> tuple[PyTree, tuple[str | None, ...]]:
    """Returns a parameter without its box, and the logical names of its axes, or None for axes
    without a name."""
    if isinstance(leaf, nn.Partitioned):
        return leaf.value, tuple(leaf.names)
    return leaf, (None,) * len(leaf.shape)


def batch_shardings(
    batch: Mapping[str, Shaped], rules: Rules, mesh: Mesh
) -> dict[str, NamedSharding]:
    """Returns the sharding of each array of a batch: the first axis over the data devices, the
    others not sharded."""
    return {
        name: spec_sharding(
            f"batch {name}", array.shape, ("act_batch",) + (None,) * (array.ndim - 1), rules, mesh
        )
        for name, array in batch.items()
    }


def check_batch_size(setting: str, size: int, rules: Rules, mesh: Mesh) -> None:
    """Raises UserError if a global batch of `size` rows does not divide over the data devices."""
    ways = math.prod(mesh.shape[axis] for axis in mesh_axes("act_batch", rules, mesh))
    if size < 1 or size % ways:
        raise UserError(
            f"{setting}={size}: is not divisible by {ways} devices; "
            f"use a multiple of {ways}, or fewer devices"
        )


def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def kept_axes(param: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> NamedSharding:
    """Returns a parameter's sharding for an array with the same axes, some of which may have size
    1."""
    spec = [*param.sharding.spec, *[None] * (len(shape) - len(param.sharding.spec))]
    sizes = zip(spec, shape, param.shape, strict=True)
    kept = [axes if size == whole else None for axes, size, whole in sizes]
    return NamedSharding(param.sharding.mesh, PartitionSpec(*kept))
