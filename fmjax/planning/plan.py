"""Resources of a training step on hardware that is not available here: memory, time, and
communication between chips.

For a TPU slice, the TPU's own compiler compiles the real sharded step (with
`jax.experimental.topologies` and the libtpu wheel; no TPU is used and no array is created), with
scanned layers regardless of the config. For a GPU or a CPU, the numbers are analytic. Only the
first records of the data are read, for the shapes of a batch, and a tokenizer is trained only on
those: the vocabulary has the size in the config."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import topologies

from fmjax import models, tasks
from fmjax.config import describe_config
from fmjax.config.numbers import is_count
from fmjax.contracts import Config, PyTree, Value
from fmjax.data.kinds import lifecycle
from fmjax.data.records import Bundle, ConcatenatedSources, Source, Subset
from fmjax.data.splits import open_sources
from fmjax.data.stream.batches import batch_shapes
from fmjax.distributed.layout import accumulation, lay_out
from fmjax.distributed.sharding import batch_shardings
from fmjax.errors import UserError, nearest, one_line
from fmjax.hardware import CHIPS, Chip
from fmjax.planning.hlo import Traffic, collectives
from fmjax.randomness import dropout_key
from fmjax.train.budget import device_bytes, saved_bytes
from fmjax.train.chunks import chunked_logits, logits_bytes
from fmjax.train.kernels import attention_kernels, described
from fmjax.train.length import total_steps
from fmjax.train.limits import check_config
from fmjax.train.stages import Abstract, Built, build_model, describe, training_step

RECORDS = 200  # number of records that are read
PIECES = 1000  # vocabulary size of the tokenizer trained on them
# Environment variables of libtpu, set if there is no TPU; without the last one, two processes could
# not compile at once.
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
    chip: Chip | None  # None: a CPU, whose specifications are unknown
    count: int
    tpu: bool

    def devices(self) -> Sequence[PyTree]:
        """Returns the devices, which are not attached. Raises UserError if libtpu is not installed
        or does not know the slice.
        """
        if not self.tpu:
            platform = "gpu" if self.chip else "cpu"
            return [Absent(index, platform) for index in range(self.count)]
        os.environ.update({name: os.environ.get(name, value) for name, value in DEVICELESS.items()})
        kind, shape = self.written.split(":")
        os.environ.setdefault(
            "TPU_ACCELERATOR_TYPE",
            f"v5litepod-{self.count}" if kind == "v5e" else f"{kind}-{2 * self.count}",
        )
        try:
            return topologies.get_topology_desc(
                platform="tpu", topology_name=f"{kind}:{shape}"
            ).devices
        except Exception as error:
            if "libtpu" in str(error) or isinstance(error, ImportError | NotImplementedError):
                raise UserError(
                    f"--topology={self.written}: needs libtpu to compile; pip install libtpu"
                ) from None
            reason = one_line(error, 200)
            raise UserError(
                f"--topology={self.written}: libtpu has no such slice ({reason}); name another"
            ) from None


@dataclasses.dataclass(frozen=True)
class Absent:
    """A placeholder for a device that is not attached, for the shape of a mesh."""

    id: int
    platform: str
    device_kind: str = "absent"
    process_index: int = 0


def read_topology(text: str) -> Topology:
    """Parses "v5e:4x4", "gpu:h200", "gpu:h200:8", "cpu" or "cpu:8". Raises UserError for anything
    else.
    """
    kind, *rest = text.split(":")
    gpus = [name for name in CHIPS if not name.startswith("v")]
    tpus = [name for name in CHIPS if name.startswith("v")]
    form = "choose from v5e:4x4, v5p:4x4x8, gpu:h200, gpu:h200:8, cpu or cpu:8"
    if (
        kind == "gpu"
        and rest
        and rest[0] in gpus
        and len(rest) <= 2
        and all(map(is_count, rest[1:]))
    ):
        return Topology(text, CHIPS[rest[0]], int(rest[1]) if rest[1:] else 1, False)
    if kind == "cpu" and len(rest) <= 1 and all(map(is_count, rest)):
        return Topology(text, None, int(rest[0]) if rest else 1, False)
    if kind in tpus and len(rest) == 1 and re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){1,2}", rest[0]):
        return Topology(text, CHIPS[kind], math.prod(map(int, rest[0].split("x"))), True)
    known = gpus if kind == "gpu" else [*tpus, "gpu", "cpu"]
    asked = rest[0] if kind == "gpu" and rest else kind
    raise UserError(f'--topology="{text}" is not known{nearest(asked, known)}; {form}')


@dataclasses.dataclass(frozen=True)
class Step:
    """A config's training step, abstract."""

    built: Built
    abstract: Abstract

    @property
    def parts(self) -> int:
        return accumulation(self.built.config)

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        """The abstract key of dropout."""
        generator = self.built.config["train"].get("dropout_rng", "threefry2x32")
        key: jax.ShapeDtypeStruct = jax.eval_shape(lambda: dropout_key(0, generator))
        return key


def describe_step(config: Config, devices: Sequence[PyTree] | None = None) -> Step:
    """Returns the step of a config over devices.

    Raises UserError if the parts of the config do not fit together.
    """
    check_config(config)
    layout = lay_out(config, devices)
    if origin := config.get("init", {}).get("weights"):
        why = "a plan reads no weights; leave it out, and set the model's sizes"
        raise UserError(f"init.weights={origin}: {why}")
    built = build_from_first_records(config)
    spec = batch_shapes(config, built.examples["train"])
    return Step(built, describe(config, built.model, spec, built.steps, layout))


def build_from_first_records(config: Config) -> Built:
    """Returns the task, model and examples for the first records of the training data."""
    task = tasks.make(config["task"])
    source = first_records(open_sources(config["data"], task.splits)["train"])
    config = config | {"task": config["task"] | task.resolve(source)}
    task, data = tasks.make(config["task"]), config["data"]
    few = data | {"vocab_size": min(PIECES, data["vocab_size"])}
    processors = lifecycle.fit_all(task, source, few)
    fields = models.family(config["model"]["name"]).Settings.__dataclass_fields__
    if "text" in processors and "vocab_size" in fields:
        config = config | {"model": {"vocab_size": data["vocab_size"]} | config["model"]}
    config, model = build_model(config, None, processors, task)
    examples = task.examples(source, processors, data["max_length"], train=True)
    steps = config["train"].get("steps") or total_steps(config, len(examples))
    return Built(config, task, model, {"train": examples}, steps=max(steps, 1), notes={})


def first_records(source: Source | Bundle) -> PyTree:
    """Returns the first records of a source, or of each part of a bundle."""
    if isinstance(source, Bundle | ConcatenatedSources):
        return type(source)({part: first_records(one) for part, one in source.parts.items()})
    return Subset(source, np.arange(min(RECORDS, len(source))), {"first": RECORDS})


def compile_step(step: Step) -> PyTree:
    """Returns the compiled step for abstract arrays. Raises UserError if the compiler reports that
    it does not fit.
    """
    abstract, built = step.abstract, step.built
    layout, state = abstract.layout, abstract.state
    shardings = batch_shardings(abstract.spec, layout.rules, layout.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shardings[name])
        for name, array in abstract.spec.items()
    }
    function = training_step(built.config, built.model, built.task, abstract)
    whole = jax.NamedSharding(layout.mesh, jax.sharding.PartitionSpec())
    key = jax.ShapeDtypeStruct(step.key.shape, step.key.dtype, sharding=whole)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    with layout.active():
        jitted = jax.jit(function, donate_argnums=0, out_shardings=(places, None))
        return jitted.lower(state, batch, key).compile()


def plan_config(
    config: str | os.PathLike[str],
    topology: str,
    overrides: Mapping[str, Value] | None = None,
    analytic: bool = False,
) -> Config:
    """Returns the resources of a training step on hardware that you do not have. Trains nothing.

    Args:
      config: "path/to/file.py" or "path/to/file.py:argument".
      topology: "v5e:4x4", "v5p:4x4x8", "gpu:h200", "gpu:h200:8", "cpu" or "cpu:8".
      overrides: values by key, such as {"data.batch_size": 64}.
      analytic: whether to use formulas for a TPU, as for a GPU, instead of compiling.

    Returns bytes per device, FLOPs, traffic, seconds per step, and whether it fits, as JSON values.

    Raises UserError for a config or topology that does not fit together.
    """
    return plan(describe_config(config, overrides), read_topology(topology), compiled=not analytic)


def plan(config: Config, topology: Topology, compiled: bool = True) -> Config:
    """Returns the plan of a config on a topology: bytes per device, FLOPs, traffic, seconds per
    step, and whether it fits.

    Raises UserError for a config or topology that does not fit together.
    """
    begun = time.perf_counter()
    if (
        topology.tpu and compiled
    ):  # an unrolled step gives the same numbers, but compiles much longer
        config = config | {"model": config["model"] | {"scan_layers": True}}
    step = describe_step(config, topology.devices())
    state, layout, spec = step.abstract.state, step.abstract.layout, step.abstract.spec
    loss = (step.built.model, step.built.task, state.params, spec, layout, step.built.config)
    held = {
        "parameters": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "gradients": device_bytes(state.params),
        "activations": saved_bytes(*loss),
    }
    result: Config = {
        "topology": topology.written,
        "devices": topology.count,
        "mesh": dict(layout.mesh.shape),
        "rules": config["mesh"]["rules"] if not config["mesh"].get("table") else "table",
        "model_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "bytes_per_device": held,
        "attention": described(attention_kernels(*loss)),
        "chunked_logits": {
            head: dict(zip(("chunk", "whole"), logits_bytes(logits, layout), strict=True))
            | {"rows": logits.rows}
            for head, logits in chunked_logits(*loss).items()
        },
        "flops_per_step": 3 * step.built.model.forward_flops(spec),
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


def with_compiler(step: Step, result: Config, estimate: int) -> tuple[int, dict[str, Traffic]]:
    """Compiles the step. Returns the bytes that a device needs and its traffic, and adds the
    compiler's numbers to the result.
    """
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
    return total, collectives(program.as_text(), step.abstract.layout.mesh.size)


def analytic_traffic(step: Step) -> dict[str, Traffic]:
    """Returns the bytes sent under data-parallel and FSDP rules: sharded parameters are gathered
    twice, and gradients are reduced once.
    """
    gathered = reduced = 0.0
    for leaf in jax.tree.leaves(step.abstract.state.params):
        whole = math.prod(leaf.shape) * leaf.dtype.itemsize
        own = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        gathered += 2 * (whole - own)
        reduced += (
            whole - own if own < whole else 2 * whole * (1 - 1 / step.abstract.layout.mesh.size)
        )
    count = len(jax.tree.leaves(step.abstract.state.params))
    found = {"all-gather": Traffic(2 * count, gathered), "all-reduce": Traffic(count, reduced)}
    return {kind: traffic for kind, traffic in found.items() if traffic.sent}


def roofline(step: Step, topology: Topology, result: Config) -> Config:
    """Returns the minimum seconds per step, determined by its slowest resource, and the fraction of
    the peak FLOP/s.

    A step has three times the FLOPs of its forward pass, or four times if everything is recomputed.
    It reads its parameters three times and its optimizer state once, writes both, and writes and
    reads the stored activations."""
    chip, held = topology.chip, result["bytes_per_device"]
    assert chip is not None
    again = {"none": 0.0, "dots": 0.0, "everything": 1 / 3}[
        step.built.config["model"].get("remat", "none")
    ]
    moved = (
        4 * held["parameters"]
        + 2 * held["gradients"]
        + 2 * held["optimizer"]
        + 2 * step.parts * held["activations"]
    )
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
        need = math.ceil(state * step.abstract.layout.mesh.size / topology.chip.memory)
        whole = state == sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(
                (
                    step.abstract.state.params,
                    step.abstract.state.opt_state,
                    step.abstract.state.params,
                )
            )
        )
        if whole and topology.count > 1:
            return (
                "every device holds the whole state: --config.mesh.rules=fsdp "
                "--config.mesh.axes='{\"fsdp\": -1}'"
            )
        return (
            f"the state alone needs about {need} such chips: use more, or "
            "--config.optim.name=adafactor"
        )
    if step.built.config["model"].get("remat", "everything") != "everything":
        return "--config.model.remat=everything, which stores only the input of each layer"
    if step.built.config["model"].get("loss_chunk", 0) < 0:
        return "--config.model.loss_chunk=0, which computes large logits in chunks of rows"
    rows = step.built.config["data"]["batch_size"]
    if step.parts < rows // step.abstract.layout.mesh.size:
        return f"--config.train.accumulate={2 * step.parts}, which halves the activations in memory"
    return "a mesh with a tensor axis and --config.mesh.rules=fsdp_tp, or more chips"
