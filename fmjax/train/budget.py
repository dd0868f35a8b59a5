"""Estimates from shapes alone whether a training step fits into the memory of this machine.

Nothing is allocated. Layers are scanned and traced only once, so the answer takes a second even for
a model that would take minutes to trace and then not fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fmjax import optim, pytree
from fmjax.config.limits import MOST
from fmjax.contracts import Batch, Config, PyTree, Task
from fmjax.data.stream.batches import batch_spec
from fmjax.distributed import sharding
from fmjax.distributed.layout import Layout
from fmjax.errors import UserError
from fmjax.hardware import memory_of_devices
from fmjax.layers.kernels.call import lowered_for
from fmjax.randomness import dropout_key
from fmjax.train.chunks import chunked_logits, for_loss, logits_bytes, part_of_batch
from fmjax.train.state import BatchSpec, abstract_params, abstract_state
from fmjax.train.wrappers import MixtureModel, unmixed

GIB = 2**30
FEW = 1e9  # floating-point operations
TABLES = ("vocab_size", "target_vocab_size", "positions")


def device_bytes(tree: PyTree) -> int:
    """Returns the bytes per device of a tree of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def saved_bytes(
    model: PyTree, task: Task, params: PyTree, spec: BatchSpec, layout: Layout, config: Config
) -> int:
    """Returns the bytes per device that the forward pass stores for the backward pass, by formula.

    They are the residuals of the loss's vjp at its full shape, divided by the number of devices
    that share the batch and its length. Sharded heads and widths reduce it further. Logits that are
    computed in chunks count as one chunk."""
    batch = part_of_batch(spec, config)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    generator = config["train"].get("dropout_rng", "threefry2x32")
    key = jax.eval_shape(lambda: dropout_key(0, generator))
    chunked = chunked_logits(model, task, params, spec, layout, config)
    # No mesh is active here, so what a device computes at once is said.
    rows = pytree.unnames({name: logits.rows for name, logits in chunked.items()})
    model = for_loss(model, task, rows)

    def residuals(params: PyTree, batch: Batch, key: jax.Array) -> list[jax.Array]:
        def loss(params: PyTree) -> jax.Array:
            outputs = model.apply({"params": params}, batch, rngs={"dropout": key})
            return sum(task.loss(outputs, batch).values(), jnp.float32(0))

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    with lowered_for(layout.platform, shapes_only=True, length_parts=layout.length_parts):
        jaxpr = jax.make_jaxpr(residuals)(shapes, batch, key).jaxpr
    # JAX's own types: tokens have no shape, and keys no item size.
    kept = {
        id(var): var.aval
        for var in jaxpr.outvars
        if var not in jaxpr.invars and hasattr(var.aval, "shape")
    }
    whole = sum(
        math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8) for aval in kept.values()
    )
    working = max((logits_bytes(logits, layout)[0] for logits in chunked.values()), default=0)
    return int(whole // devices_per_batch(layout)) + working


def devices_per_batch(layout: Layout) -> int:
    """Returns the number of devices that share the rows of a batch and their length."""
    logical = ("act_batch", "act_length")
    shared = {
        axis for name in logical for axis in sharding.mesh_axes(name, layout.rules, layout.mesh)
    }
    return math.prod(layout.mesh.shape[axis] for axis in shared)


def scanned(model: PyTree) -> PyTree:
    """Returns a model with the same parameters whose layers are traced once."""
    if isinstance(model, MixtureModel):
        parts = {name: scanned(part) for name, part in model.parts.items()}
        return MixtureModel(scanned(model.model), parts)
    if "scan_layers" not in {field.name for field in dataclasses.fields(model.settings)}:
        return model  # a model of an extension, which may not have stacks
    return model.clone(settings=dataclasses.replace(model.settings, scan_layers=True))


def state_bytes(config: Config, params: PyTree, layout: Layout) -> dict[str, int]:
    """Returns the bytes per device of abstract parameters, their gradients and the optimizer."""
    # The number of steps only affects the schedule, which has no state.
    optimizer = optim.build(config["optim"], params, steps=MOST)
    state = abstract_state(params, optimizer.transform, layout.mesh)
    trained = optim.trainable(params, config["optim"].get("freeze", ()))
    updated = jax.tree.map(lambda leaf, chosen: leaf if chosen else None, params, trained)
    return {
        "parameters": device_bytes(params),
        "gradients": device_bytes(updated),
        "optimizer": device_bytes(state.opt_state),
    }


def needed_bytes(
    config: Config, model: PyTree, task: Task, spec: BatchSpec, layout: Layout
) -> dict[str, int]:
    """Returns the bytes per device of parameters, their gradients, optimizer and activations."""
    model = scanned(model)
    params = abstract_params(model, spec, layout.mesh, layout.rules)
    saved = saved_bytes(model, task, params, spec, layout, config)
    return state_bytes(config, params, layout) | {"activations": saved}


def is_small(model: PyTree, spec: BatchSpec) -> bool:
    """Returns whether a step fits any machine, by cheap formulas.

    A floating-point operation of the narrowest layer stores at most 5 bytes. Table lookups have no
    operations.
    """
    settings = vars(model.settings)
    rows = max(int(settings.get(name, 0)) for name in TABLES)
    return model.forward_flops(spec) < FEW and rows * int(settings.get("width", 1)) < FEW / 100


def check_state(config: Config, model: PyTree, layout: Layout) -> None:
    """Raises UserError as `check_memory` does, if parameters, gradients and optimizer alone have no
    room. It runs before any example is made."""
    model = scanned(unmixed(model))
    spec = batch_spec(model.one_row_batch())
    room = None if is_small(model, spec) else memory_of_devices()
    if room is None:
        return
    params = abstract_params(model, spec, layout.mesh, layout.rules)
    need = state_bytes(config, params, layout)
    if sum(need.values()) > room.per_device:
        raise UserError(too_large(config, need, sum(need.values()), room.per_device, room.what))


def check_memory(
    config: Config, model: PyTree, task: Task, spec: BatchSpec, layout: Layout
) -> None:
    """Raises UserError, in one line with the sizes, if a step needs more memory than available.

    The available memory comes from the devices or, for CPUs, from the operating system. If it is
    unknown, no step is rejected. A step that would fit must not be rejected, so only half of the
    activations are counted, since the compiler may store less than the formula, and as if all
    devices shared them, as they do if heads and widths are sharded, too.
    """
    room = None if is_small(model, spec) else memory_of_devices()
    if room is None:
        return
    need = needed_bytes(config, model, task, spec, layout)
    need["activations"] = need["activations"] * devices_per_batch(layout) // layout.mesh.size
    total = need["parameters"] + need["gradients"] + need["optimizer"] + need["activations"] // 2
    if total > room.per_device:
        raise UserError(too_large(config, need, total, room.per_device, room.what))


def too_large(config: Config, need: Mapping[str, int], total: int, room: float, what: str) -> str:
    """Returns the message for a step that does not fit, with the settings that would help most."""
    state = total - need.get("activations", 0) // 2
    sizes = ", ".join(f"{name} {size / GIB:,.1f}" for name, size in need.items())
    if state > room:
        how = (
            "choose a smaller model.size, model.layers or model.width, "
            "or shard it over more devices"
        )
    else:
        how = (
            f"lower data.batch_size={config['data']['batch_size']} or "
            f"data.max_length={config['data']['max_length']}, raise train.accumulate, "
            "or set model.remat=everything"
        )
    return (
        f"a training step needs about {total / GIB:,.1f} GiB per device ({sizes}), but {what} has "
        f"{room / GIB:,.1f}; {how}"
    )
