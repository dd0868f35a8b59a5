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
import time
from collections.abc import Mapping, Sequence

import jax

from fmjax import models, tasks
from fmjax.config import describe_config
from fmjax.contracts import Config, PyTree, Value
from fmjax.data.kinds import lifecycle
from fmjax.data.records import Bundle, ConcatenatedSources, Selected, Source
from fmjax.data.splits import open_sources
from fmjax.data.stream.batches import batch_shapes
from fmjax.distributed.compiler import compiler_options
from fmjax.distributed.layout import accumulation, lay_out
from fmjax.distributed.sharding import SLICE, batch_shardings
from fmjax.errors import UserError, one_line
from fmjax.planning.hlo import BETWEEN_SLICES, Traffic, collectives
from fmjax.planning.topology import Topology, read_topology
from fmjax.randomness import dropout_key
from fmjax.train.budget import device_bytes, saved_bytes
from fmjax.train.chunks import chunked_logits, logits_bytes
from fmjax.train.kernels import attention_kernels, described
from fmjax.train.length import total_steps
from fmjax.train.limits import check_config
from fmjax.train.stages import Abstract, Built, build_model, describe, training_step

RECORDS = 200  # number of records that are read
PIECES = 1000  # vocabulary size of the tokenizer trained on them


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
    return Selected(source, range(min(RECORDS, len(source))), {"first": RECORDS})


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
        options = compiler_options(layout.mesh)
        jitted = jax.jit(
            function, donate_argnums=0, out_shardings=(places, None), compiler_options=options
        )
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
      topology: "v5e:4x4", "v5p:4x4x8:2" (two slices), "gpu:h200", "gpu:h200:8", "cpu" or "cpu:8".
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
    if topology.tpu and compiled:
        # An unrolled step compiles much longer; it may need less memory.
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
    gathered = reduced = between = 0.0
    mesh = step.abstract.layout.mesh
    slices = mesh.shape.get(SLICE, 1)
    inside = mesh.size // slices
    for leaf in jax.tree.leaves(step.abstract.state.params):
        whole = math.prod(leaf.shape) * leaf.dtype.itemsize
        own = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        gathered += 2 * (whole - own)
        reduced += whole - own if own < whole else 2 * whole * (1 - 1 / inside)
        # The devices of a slice reduce a part each with those of the others.
        part = own if own < whole else whole / inside
        between += 2 * part * (1 - 1 / slices)
    count = len(jax.tree.leaves(step.abstract.state.params))
    found = {
        "all-gather": Traffic(2 * count, gathered),
        "all-reduce": Traffic(count, reduced),
        BETWEEN_SLICES: Traffic(count, between),
    }
    return {kind: traffic for kind, traffic in found.items() if traffic.sent}


def roofline(step: Step, topology: Topology, result: Config) -> Config:
    """Returns the minimum seconds per step, determined by its slowest resource, and the fraction of
    the peak FLOP/s.

    A step has three times the FLOPs of its forward pass, or four times if its products are
    recomputed. It reads its parameters three times and its optimizer state once, writes both, and
    writes and reads the stored activations."""
    chip, held = topology.chip, result["bytes_per_device"]
    assert chip is not None
    remat = step.built.config["model"].get("remat", "none")
    again = 1 / 3 if remat in ("attention", "everything") else 0.0
    moved = (
        4 * held["parameters"]
        + 2 * held["gradients"]
        + 2 * held["optimizer"]
        + 2 * step.parts * held["activations"]
    )
    sent = {kind: traffic["sent"] for kind, traffic in result["collectives"].items()}
    between = sent.pop(BETWEEN_SLICES, 0.0)
    seconds = {
        "compute": result["flops_per_step"] * (1 + again) / topology.count / chip.flops,
        "memory": moved / chip.bandwidth,
        "links": sum(sent.values()) / chip.link,
    }
    if between and chip.network:
        seconds["network"] = between / chip.network
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
