"""What one attention asks of a kernel, and for which machine. Letters as in `linear.py`; G key
heads, S keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from fmjax.contracts import PyTree
from fmjax.distributed.sharding import Rules, mesh_axes
from fmjax.layers.bias import RelativeBias
from fmjax.layers.mask import Mask

# The name of what attention stores for its backward pass, besides its arguments, in policies of
# rematerialization.
SAVED = "attention"


def to_save(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns arrays with that name."""
    return tuple(checkpoint_name(array, SAVED) for array in arrays)


@dataclasses.dataclass(frozen=True)
class Call:
    """One attention: its arrays, and what else it needs.

    A kernel returns [B,L,H,K]. Where a query attends to no key, the plain path averages all values;
    kernels give some finite numbers. Only padding has such queries, and nobody attends to padding.
    """

    q: jax.Array  # [B,L,H,K]
    k: jax.Array  # [B,S,G,K]
    v: jax.Array  # [B,S,G,K]
    mask: Mask
    scale: float  # of the scores
    # added to the scores: broadcastable to [B,H,L,S], or of distances
    bias: jax.Array | RelativeBias | None = None
    crosses: bool = False  # the keys are those of a memory
    drops: bool = False  # weights are dropped
    tapped: bool = False  # the caller reads or changes the weights

    @property
    def lengths(self) -> tuple[int, int]:
        """The numbers of queries and keys."""
        return self.q.shape[1], self.k.shape[1]

    def dense_bias(self) -> jax.Array | None:
        """Returns the bias, broadcastable to [B,H,L,S], if there is one."""
        if isinstance(self.bias, RelativeBias):
            return self.bias.dense(*self.lengths)
        return self.bias


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is for."""

    platform: str  # cpu, gpu or tpu
    shapes_only: bool = False  # nothing is compiled: a kernel that needs its machine is not traced
    # By how many devices the length is divided; None: as many as in the mesh in force.
    length_parts: int | None = None


TARGET: ContextVar[Target | None] = ContextVar("TARGET", default=None)


@contextmanager
def lowered_for(
    platform: str, shapes_only: bool = False, length_parts: int | None = None
) -> Iterator[None]:
    """What is traced in the block is for a platform (cpu, gpu or tpu), whatever this machine is.

    With `shapes_only` a kernel is represented by one that keeps arrays of the same shapes; kernels
    are chosen as for a length that is divided by `length_parts`, if given.
    """
    token = TARGET.set(Target(platform, shapes_only, length_parts))
    try:
        yield
    finally:
        TARGET.reset(token)


def target() -> Target:
    """Returns what is being traced for: as `lowered_for` says, or the devices of the mesh in force,
    which need not be here, or this machine."""
    if (stated := TARGET.get()) is not None:
        return stated
    device = jax.sharding.get_abstract_mesh().abstract_device
    return Target(jax.default_backend() if device is None else device.platform)


def rules_in_force() -> Rules:
    """Returns the rules of sharding in force, by logical axis."""
    return {logical: axes or () for logical, axes in nn.get_logical_axis_rules()}


def length_axes() -> tuple[str, ...]:
    """Returns the axes of the mesh in force that divide the length."""
    return mesh_axes("act_length", rules_in_force(), jax.sharding.get_abstract_mesh())


def length_parts() -> int:
    """Returns by how many devices the length is divided, 1 if it is not."""
    if (stated := target().length_parts) is not None:
        return stated
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in length_axes())


# Why a kernel that needs whole lengths refuses a divided one.
DIVIDED = "the mesh divides the length; set ring, or auto"

# The logical axes of the arrays that a kernel takes.
AXES: dict[str, tuple[str | None, ...]] = {
    "q": ("act_batch", "act_heads", None, None),
    "k": ("act_batch", "act_heads", None, None),
    "v": ("act_batch", "act_heads", None, None),
    "query_segments": ("act_batch", None),
    "key_segments": ("act_batch", None),
    "bias": ("act_batch", "act_heads", None, None),
    "distances": ("act_heads", None),
}


def over_mesh(
    kernel: Callable[[dict[str, jax.Array]], jax.Array],
    arrays: dict[str, jax.Array],
    axes: Mapping[str, tuple[str | None, ...]] = AXES,
) -> jax.Array:
    """Returns kernel(arrays), [B,H,L,K], where each device computes its rows and heads.

    XLA cannot divide a kernel over devices. The arrays have the names in `axes`, with heads before
    lengths; an axis of size 1 is not divided.
    """
    rules, mesh = rules_in_force(), jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(arrays)

    def spec(name: str, array: PyTree) -> PartitionSpec:
        named = zip(axes[name], array.shape, strict=True)
        return PartitionSpec(
            *(mesh_axes(axis if size > 1 else None, rules, mesh) or None for axis, size in named)
        )

    specs = {name: spec(name, array) for name, array in arrays.items()}
    divided = jax.shard_map(
        kernel, in_specs=(specs,), out_specs=spec("q", arrays["q"]), check_vma=False
    )
    result: jax.Array = divided(arrays)
    return result
