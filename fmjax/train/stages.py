"""The stages from a config to a training step, which training, plans and benchmarks share.

    Data      records, weights to start from, processors of the columns
    Built     task, model, examples, number of steps
    Abstract  shapes and shardings of a batch and the state, optimizer

All is checked here, on the host, before anything is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial

from fmjax import optim, tasks
from fmjax.contracts import Config, Examples, Processors, PyTree, Source, Task
from fmjax.data.kinds import lifecycle
from fmjax.data.kinds.choose import choose_processors
from fmjax.data.records import Bundle
from fmjax.data.splits import open_sources
from fmjax.data.storage import cache
from fmjax.data.storage.token_store import stored_in
from fmjax.data.stream.buckets import Bucketed
from fmjax.data.stream.examples import check_positions, make_examples
from fmjax.data.stream.tolerance import Tolerance
from fmjax.decoding.settings import check_generation
from fmjax.distributed.hosts import say
from fmjax.distributed.layout import Layout, accumulation
from fmjax.filesystems.paths import RunPath
from fmjax.inference.load import load
from fmjax.inference.pretrained import Pretrained
from fmjax.runs import best
from fmjax.runs import folder as run_folder
from fmjax.runs.checkpoint_reader import CheckpointReader
from fmjax.train.budget import check_state
from fmjax.train.chunks import for_loss
from fmjax.train.gradients import accumulated, sum_shardings
from fmjax.train.length import checked_steps
from fmjax.train.notes import notes_of
from fmjax.train.resolve import resolve_model
from fmjax.train.state import BatchSpec, TrainState, abstract_params, abstract_state
from fmjax.train.step import TrainStep, make_step
from fmjax.train.warm_start import start_from
from fmjax.train.wrappers import mix


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads."""

    config: Config  # with the task's settings that follow from the data
    sources: Mapping[str, Source | Bundle]  # by split
    fingerprints: Config  # for provenance
    tolerance: Tolerance  # of bad records, and which were left out
    pretrained: Pretrained | None  # the weights to start from
    processors: Processors


@dataclasses.dataclass(frozen=True)
class Built:
    """What trains, and on what."""

    config: Config  # resolved: as it is stored
    task: Task
    model: PyTree  # a Linen module that is a contracts.Model, or a MixtureModel
    examples: Mapping[str, Examples]  # by split
    steps: int
    notes: Config  # about the data, for provenance


@dataclasses.dataclass(frozen=True)
class Abstract:
    """What a step takes: shapes, dtypes and shardings without an array made, and the optimizer."""

    layout: Layout
    spec: BatchSpec  # of a global batch
    optimizer: optim.Optimizer
    state: TrainState


def open_data(
    config: Config, workdir: RunPath, resumed: bool, overridden: Collection[str] = ()
) -> Data:
    """Opens the data, and finds the processors and the task's settings that follow from them.

    `overridden` are the config's keys that do not come from its file. Raises UserError for data
    that cannot be read, or that have changed since the run began."""
    task = tasks.make(config["task"])
    tolerance = Tolerance(config["data"].get("on_error", "fail"), run_folder.left_out(workdir), say)
    verify = resumed and run_folder.needs_contents(workdir, config["data"])
    whole = {"verify": True} if verify else {}
    with tolerance.active():
        sources = open_sources(config["data"] | whole, task.splits)
    with cache.verifying(verify):
        facts = {split: source.fingerprint() for split, source in sources.items()}
    checkpoints = CheckpointReader(workdir / run_folder.CHECKPOINTS)
    origin = config.get("init", {}).get("weights")
    # A run that was stopped before its first checkpoint starts from the same weights again.
    pretrained = load(origin) if origin and not (resumed and checkpoints.steps()) else None
    if pretrained is not None:
        config = start_from(config, pretrained, overridden)
    sources["train"], settings = tolerance.apply(sources["train"], task.resolve)
    config = config | {"task": config["task"] | settings}
    task = tasks.make(config["task"])
    best.check_metrics(config, task)  # before a tokenizer is trained
    weights = None if pretrained is None else pretrained.processors
    find = partial(choose_processors, config, task, workdir if resumed else None, weights)
    sources["train"], processors = tolerance.apply(sources["train"], find)
    facts |= lifecycle.hashes(processors)
    if resumed:
        run_folder.check_same_data(workdir, facts)
    return Data(config, sources, facts, tolerance, pretrained, processors)


def build(data: Data, resumed: bool, layout: Layout) -> Built:
    """Returns the task, the model and the examples. Raises UserError where they do not fit."""
    task = tasks.make(data.config["task"])
    config, model = build_model(data.config, data.pretrained, data.processors, task)
    check_generation(task, model, data.processors, config["data"]["max_length"])
    check_positions(config)
    check_state(config, model, layout)
    sources = dict(data.sources)  # without bad records, once examples are made
    own = config["data"]
    with stored_in(own.get("store")), cache.verifying(bool(own.get("verify"))):
        examples = make_examples(task, sources, data.processors, config, data.tolerance)
    best.check_evaluated(config, examples)
    train = examples["train"]
    if isinstance(train, Bucketed):
        config = config | {"data": config["data"] | {"buckets": train.borders}}
    notes = {} if resumed else notes_of(task, sources, data.processors, train)
    return Built(config, task, model, examples, checked_steps(config, train), notes)


def build_model(
    config: Config, pretrained: Pretrained | None, processors: Processors, task: Task
) -> tuple[Config, PyTree]:
    """Returns the config with all of the model's settings, and the model."""
    model = mix(resolve_model(config, pretrained, processors, task), task)
    settings = {"name": config["model"]["name"]} | dataclasses.asdict(model.settings)
    return config | {"model": settings}, model


def describe(
    config: Config, model: PyTree, spec: BatchSpec, steps: int, layout: Layout
) -> Abstract:
    """Returns a step's abstract inputs. Raises UserError if they do not fit each other."""
    params = abstract_params(model, spec, layout.mesh, layout.rules)
    optimizer = optim.build(config["optim"], params, steps)
    state = abstract_state(params, optimizer.transform, layout.mesh)
    return Abstract(layout, spec, optimizer, state)


def training_step(config: Config, model: PyTree, task: Task, abstract: Abstract) -> TrainStep:
    """Returns the step, to be compiled."""
    params = abstract.state.params
    trained = optim.trainable(params, config["optim"].get("freeze", ()))
    update, parts = abstract.optimizer.transform, accumulation(config)
    make = partial(accumulated, parts=parts, shardings=sum_shardings(params, abstract.layout))
    return make_step(
        for_loss(model, task), task, update, trained, make_gradients=make if parts > 1 else None
    )
