"""What a training step will need on hardware that is not here: memory, time, and what it sends between chips.

For a TPU slice the real step is compiled, sharded, by the TPU's own compiler (`jax.experimental.topologies` and the libtpu
wheel; no TPU is touched and no array made), its layers scanned whatever the config says. For a GPU or a CPU the figures are
analytic. Of the data only the first records are read, for the shapes of a batch, and a tokenizer is trained on those alone: the
vocabulary is as large as the config says.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from fmjax import models, optim, tasks
from fmjax.data.kinds import lifecycle
from fmjax.data.records import Subset
from fmjax.data.splits import open_sources
from fmjax.distributed import sharding
from fmjax.distributed.sharding import batch_shardings, in_force
from fmjax.errors import UserError, nearest, one_line
from fmjax.hardware import CHIPS, Chip
from fmjax.planning.hlo import Traffic, collectives
from fmjax.randomness import dropout_key
from fmjax.train.experiment import Config, abstract_training, check_batch, total_steps
from fmjax.train.resolve import resolve_model
from fmjax.train.state import TrainState
from fmjax.train.step import make_step
from fmjax.train.wrappers import mix

RECORDS = 200  # of the data that are looked at
PIECES = 1000  # of the tokenizer that is trained on them
# What libtpu reads of its surroundings, set where there is no TPU; without the last, two processes could not compile at once.
DEVICELESS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind: a TPU slice of some shape, a number of GPUs, or this machine's CPU."""

    written: str
    chip: Chip | None  # None: a CPU, of which no figures are known
    count: int
    tpu: bool

    def devices(self) -> Sequence[Any]:
        """Returns the devices, which are not here. Raises UserError if libtpu is not installed or knows no such slice."""
        if not self.tpu:
            return [Absent(index) for index in range(self.count)]
        os.environ.update({name: os.environ.get(name, value) for name, value in DEVICELESS.items()})
        kind, shape = self.written.split(":")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"v5litepod-{self.count}" if kind == "v5e" else f"{kind}-{2 * self.count}")
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}").devices
        except Exception as error:
            if "libtpu" in str(error) or isinstance(error, ImportError | NotImplementedError):
                raise UserError(f"--topology={self.written}: needs libtpu to compile; pip install 'fmjax[plan]'") from None
            reason = one_line(error, 200)
            raise UserError(f"--topology={self.written}: libtpu has no such slice ({reason}); give another") from None


@dataclasses.dataclass(frozen=True)
class Absent:
    """A device that is not here, for the shape of a mesh."""

    id: int
    platform: str = "absent"
    device_kind: str = "absent"
    process_index: int = 0


def read_topology(text: str) -> Topology:
    """Returns what "v5e:4x4", "gpu:h200", "gpu:h200:8", "cpu" or "cpu:8" stands for. Raises UserError if it is none of these."""
    kind, *rest = text.split(":")
    gpus = [name for name in CHIPS if not name.startswith("v")]
    tpus = [name for name in CHIPS if name.startswith("v")]
    form = "give v5e:4x4, v5p:4x4x8, gpu:h200, gpu:h200:8, cpu or cpu:8"
    if kind == "gpu" and rest and rest[0] in gpus and len(rest) <= 2 and all(part.isdigit() for part in rest[1:]):
        return Topology(text, CHIPS[rest[0]], int(rest[1]) if rest[1:] else 1, False)
    if kind == "cpu" and len(rest) <= 1 and all(part.isdigit() for part in rest):
        return Topology(text, None, int(rest[0]) if rest else 1, False)
    if kind in tpus and len(rest) == 1 and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", rest[0]):
        return Topology(text, CHIPS[kind], math.prod(map(int, rest[0].split("x"))), True)
    known = gpus if kind == "gpu" else [*tpus, "gpu", "cpu"]
    asked = rest[0] if kind == "gpu" and rest else kind
    raise UserError(f'--topology="{text}" is not known{nearest(asked, known)}; {form}')


@dataclasses.dataclass(frozen=True)
class Step:
    """A config's training step, abstract."""

    config: Config
    model: Any
    task: Any
    mesh: Mesh
    rules: sharding.Rules
    spec: dict[str, jax.ShapeDtypeStruct]
    optimizer: optim.Optimizer
    abstract: TrainState

    @property
    def parts(self) -> int:
        return int(self.config["train"].get("accumulate", 1))

    @property
    def key(self) -> Any:
        """The abstract key of dropout."""
        return jax.eval_shape(lambda: dropout_key(0, self.config["train"].get("dropout_rng", "threefry2x32")))


def describe_step(config: Config, mesh: Mesh) -> Step:
    """Returns the step that a config describes, over a mesh. Raises UserError for whatever does not fit."""
    rules = sharding.resolve_rules(config["mesh"]["rules"], config["mesh"].get("table"))
    sharding.check_used(rules, mesh, own=bool(config["mesh"].get("table")))
    check_batch(config, rules, mesh)
    if origin := config.get("init", {}).get("from"):
        raise UserError(f"init.from={origin}: a plan reads no weights; leave it out, and name the model's sizes")
    made = tasks.make(config["task"])
    source = first_records(open_sources(config["data"], made.splits)["train"])
    task = tasks.make(config["task"] | made.resolve(source))
    data, model_config = config["data"], config["model"]
    processors = lifecycle.fit_all(task, source, data | {"vocab_size": min(PIECES, data["vocab_size"])})
    if "text" in processors and "vocab_size" in models.family(model_config["name"]).Settings.__dataclass_fields__:
        model_config = {"vocab_size": data["vocab_size"]} | model_config
    model = mix(resolve_model(config | {"model": model_config}, None, processors, task), task)
    examples = task.examples(source, processors, config["data"]["max_length"], train=True)
    steps = config["train"].get("steps") or total_steps(config, len(examples))
    spec, optimizer, abstract = abstract_training(config, model, examples, max(steps, 1), mesh, rules)
    return Step(config, model, task, mesh, rules, spec, optimizer, abstract)


def first_records(source: Any) -> Any:
    """Returns the first records of a source, or of each part of a bundle."""
    if hasattr(source, "parts"):
        return type(source)({part: first_records(one) for part, one in source.parts.items()})
    return Subset(source, np.arange(min(RECORDS, len(source))), {"first": RECORDS})


def device_bytes(tree: Any) -> int:
    """Returns the bytes that each device holds of a tree of abstract arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def saved_bytes(step: Step) -> int:
    """Returns the bytes per device of what the forward pass keeps for the backward pass, by formula.

    They are the residuals of the loss's vjp at its whole shape, over the devices that share the batch and its length: heads
    and widths that are sharded as well make it less.
    """
    rows = {name: (array.shape[0] // step.parts, *array.shape[1:]) for name, array in step.spec.items()}
    batch = {name: jax.ShapeDtypeStruct(rows[name], array.dtype) for name, array in step.spec.items()}
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), step.abstract.params)

    def residuals(params: Any, batch: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            return sum(step.task.loss(step.model.apply({"params": params}, batch, rngs={"dropout": key}), batch).values())

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, batch, step.key).jaxpr
    kept = {id(var): var.aval for var in jaxpr.outvars if var not in jaxpr.invars and hasattr(var.aval, "shape")}
    whole = sum(math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8) for aval in kept.values())
    shared = {axis for logical in ("act_batch", "act_length") for axis in sharding.mesh_axes(logical, step.rules, step.mesh)}
    return whole // math.prod(step.mesh.shape[axis] for axis in shared)


def compile_step(step: Step) -> Any:
    """Returns the compiled step, of abstract arrays. Raises UserError if the compiler says that it does not fit."""
    shardings = batch_shardings(step.spec, step.rules, step.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shardings[name]) for name, array in step.spec.items()
    }
    trained = optim.trainable(step.abstract.params, step.config["optim"].get("freeze", ()))
    function = make_step(step.model, step.task, step.optimizer.transform, trained, step.parts)
    whole = jax.NamedSharding(step.mesh, jax.sharding.PartitionSpec())
    key = jax.ShapeDtypeStruct(step.key.shape, step.key.dtype, sharding=whole)
    placed = jax.tree.map(lambda leaf: leaf.sharding, step.abstract)
    with jax.set_mesh(step.mesh), nn.logical_axis_rules(in_force(step.rules, step.mesh)):
        return jax.jit(function, donate_argnums=0, out_shardings=(placed, None)).lower(step.abstract, batch, key).compile()


def plan(config: Config, topology: Topology, compiled: bool = True) -> dict[str, Any]:
    """Returns the plan of a config on a topology: bytes per device, FLOPs, traffic, seconds a step, and whether it fits.

    Raises UserError for a config or topology that does not fit together.
    """
    begun = time.perf_counter()
    if topology.tpu and compiled:  # an unrolled step says the same, after as many times longer as there are layers
        config = config | {"model": config["model"] | {"scan_layers": True}}
    mesh = sharding.make_mesh(config["mesh"]["axes"], topology.devices())
    step = describe_step(config, mesh)
    held = {
        "parameters": device_bytes(step.abstract.params),
        "optimizer": device_bytes(step.abstract.opt_state),
        "gradients": device_bytes(step.abstract.params),
        "activations": saved_bytes(step),
    }
    result: dict[str, Any] = {
        "topology": topology.written,
        "devices": topology.count,
        "mesh": dict(mesh.shape),
        "rules": config["mesh"]["rules"] if not config["mesh"].get("table") else "table",
        "model_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(step.abstract.params)),
        "bytes_per_device": held,
        "flops_per_step": 3 * step.model.forward_flops(step.spec),
        "analytic": not (topology.tpu and compiled),
    }
    sent: dict[str, Traffic] = {}
    total = sum(held.values())
    if topology.tpu and compiled:
        total, sent = with_compiler(step, result, total)
    elif topology.count > 1:
        sent = analytic_traffic(step)
    result["collectives"] = {kind: traffic._asdict() for kind, traffic in sent.items()}
    result["total_bytes"] = total
    if topology.chip:
        result |= roofline(step, topology, result)
        result["fits"] = total <= topology.chip.memory and not result.get("refused")
        result["hint"] = "" if result["fits"] else hint(step, topology, held)
    result["seconds_to_plan"] = time.perf_counter() - begun
    return result


def with_compiler(step: Step, result: dict[str, Any], estimate: int) -> tuple[int, dict[str, Traffic]]:
    """Compiles the step; returns the bytes a device needs and its traffic, and adds what the compiler says to the result."""
    try:
        program = compile_step(step)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result["refused"] = one_line(error, 200)
        return estimate, {}
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    result["compiler"] = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "flops_loops_once": cost.get("flops", 0.0),
        "bytes_loops_once": cost.get("bytes accessed", 0.0),
    }
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return total, collectives(program.as_text(), step.mesh.size)


def analytic_traffic(step: Step) -> dict[str, Traffic]:
    """Returns what data-parallel and FSDP rules send: each sharded parameter gathered twice, its gradient reduced once."""
    gathered = reduced = 0.0
    for leaf in jax.tree.leaves(step.abstract.params):
        whole = math.prod(leaf.shape) * leaf.dtype.itemsize
        own = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        gathered += 2 * (whole - own)
        reduced += whole - own if own < whole else 2 * whole * (1 - 1 / step.mesh.size)
    count = len(jax.tree.leaves(step.abstract.params))
    found = {"all-gather": Traffic(2 * count, gathered), "all-reduce": Traffic(count, reduced)}
    return {kind: traffic for kind, traffic in found.items() if traffic.sent}


def roofline(step: Step, topology: Topology, result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the least seconds a step can take, by its slowest resource, and the share of the peak that this would be.

    A step multiplies three times as much as its forward pass, four times where everything is computed again. It reads its
    parameters in three passes and its optimizer's state in one, writes both, and writes and reads what it keeps.
    """
    chip, held = topology.chip, result["bytes_per_device"]
    assert chip is not None
    again = {"none": 0.0, "dots": 0.0, "everything": 1 / 3}[getattr(step.model.settings, "remat", "none")]
    moved = 4 * held["parameters"] + 2 * held["gradients"] + 2 * held["optimizer"] + 2 * step.parts * held["activations"]
    seconds = {
        "compute": result["flops_per_step"] * (1 + again) / topology.count / chip.flops,
        "memory": moved / chip.bandwidth,
        "links": sum(traffic["sent"] for traffic in result["collectives"].values()) / chip.link,
    }
    slowest = max(seconds, key=seconds.__getitem__)
    least = seconds[slowest]
    return {
        "bytes_moved": moved,
        "seconds": seconds,
        "bound": slowest,
        "step_seconds": least,
        "mfu": result["flops_per_step"] / topology.count / chip.flops / least,
    }


def hint(step: Step, topology: Topology, held: Mapping[str, int]) -> str:
    """Returns the setting that would most likely make a step fit."""
    assert topology.chip is not None
    state = held["parameters"] + held["optimizer"] + held["gradients"]
    if state > topology.chip.memory:
        need = math.ceil(state * step.mesh.size / topology.chip.memory)
        whole = state == sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves((step.abstract.params, step.abstract.opt_state, step.abstract.params))
        )
        if whole and topology.count > 1:
            return "the state stands whole on every device: --config.mesh.rules=fsdp --config.mesh.axes='{\"fsdp\": -1}'"
        return f"the state alone needs about {need} such chips: take more, or --config.optim.name=adafactor"
    if getattr(step.model.settings, "remat", "everything") != "everything":
        return "--config.model.remat=everything, which keeps of each layer only what it read"
    rows = step.config["data"]["batch_size"]
    if step.parts < rows // step.mesh.size:
        return f"--config.train.accumulate={2 * step.parts}, which halves what is kept at once"
    return "a mesh with a tensor axis and --config.mesh.rules=fsdp_tp, or more chips"

