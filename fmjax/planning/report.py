"""The text of a plan: the resources of a step, and the sharding of each parameter."""

from __future__ import annotations

import json
import math

import flax.linen as nn
import jax

from fmjax import pytree
from fmjax.contracts import Config, Record
from fmjax.distributed.sharding import named_axes
from fmjax.planning.plan import describe_step
from fmjax.planning.topology import Topology
from fmjax.train.state import init_params

GIB = 2**30


def table(result: Config) -> str:
    """Returns a plan as lines of text."""
    held = result["bytes_per_device"]
    axes = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    lines = [
        f"{result['model_parameters']:,} parameters on {result['topology']}: {result['devices']} "
        f"devices ({axes}), "
        f"rules {result['rules']}",
        f"attention kernel: {result['attention']}",
        "per device, GiB",
        *(f"  {name:<12} {size / GIB:10.3f}" for name, size in held.items()),
    ]
    lines += [
        f"logits of {head}: {size['rows']:,} rows at once, {size['chunk'] / GIB:.3f} GiB instead "
        f"of {size['whole'] / GIB:.3f}"
        for head, size in result["chunked_logits"].items()
    ]
    if compiler := result.get("compiler"):
        lines += [
            "as compiled, GiB",
            *(f"  {name:<12} {compiler[name] / GIB:10.3f}" for name in MEMORY),
        ]
    if "refused" in result:
        lines.append(f"the compiler rejects it: {result['refused']}")
    lines.append(f"needs {result['total_bytes'] / GIB:.2f} GiB per device")
    lines.append(
        f"{result['flops_per_step']:.4g} FLOPs per step (forward and backward, by formula)"
    )
    for kind, traffic in result["collectives"].items():
        lines.append(
            f"  {kind:<18} {traffic['times']:>6} times, {traffic['sent'] / GIB:10.3f} GiB sent per "
            "device"
        )
    if "fits" in result:
        seconds = ", ".join(f"{name} {value:.4g}" for name, value in result["seconds"].items())
        lines.append(f"{result['bytes_moved'] / GIB:.2f} GiB moved between memory and chip")
        lines.append(
            f"seconds per step, at least: {seconds}; bound by {result['bound']}, MFU at most "
            f"{result['mfu']:.1%}"
        )
        lines.append("fits" if result["fits"] else f"does not fit; try {result['hint']}")
    if result["analytic"]:
        lines.append("estimated by formula; nothing was compiled")
    return "\n".join(lines)


MEMORY = ("arguments", "outputs", "aliased", "temporaries")


def sharding_rows(config: Config, topology: Topology) -> list[Record]:
    """Returns the name, shape, logical axes, mesh axes and bytes per device of each parameter.

    Raises UserError like `plan`.
    """
    step = describe_step(config, topology.devices())
    boxed = jax.eval_shape(
        lambda: init_params(step.built.model, step.abstract.spec, jax.random.key(0))
    )
    placed = pytree.names(step.abstract.state.params)
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    ):
        name, (value, axes) = pytree.path_name(path), named_axes(leaf)
        found = placed[name].sharding
        spec = [*found.spec, *[None] * (len(value.shape) - len(found.spec))]
        size = math.prod(found.shard_shape(value.shape)) * value.dtype.itemsize
        written = [
            "+".join((part,) if isinstance(part, str) else part) if part else None for part in spec
        ]
        rows.append(
            {
                "name": name,
                "shape": list(value.shape),
                "axes": list(axes),
                "spec": written,
                "bytes_per_device": size,
            }
        )
    return rows


def sharding_table(config: Config, topology: Topology, as_json: bool = False) -> str:
    """Returns the sharding of each parameter, as lines of text or one JSON object."""
    rows = sharding_rows(config, topology)
    total = sum(row["bytes_per_device"] for row in rows)
    if as_json:
        return json.dumps(
            {"topology": topology.written, "parameters": rows, "bytes_per_device": total}
        )
    width = max(len(row["name"]) for row in rows)
    lines = []
    for row in rows:
        axes = ", ".join(
            f"{axis or '-'} {size}{f' over {spec}' if spec else ''}"
            for axis, size, spec in zip(row["axes"], row["shape"], row["spec"], strict=True)
        )
        lines.append(f"{row['name']:<{width}}  {row['bytes_per_device']:>13,}  {axes}")
    return "\n".join([*lines, f"{'bytes per device':<{width}}  {total:>13,}"])
