"""From a config to everything a run needs, checked on the host before anything is compiled or written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from fmjax import optim, pytree, tasks
from fmjax.config import READING, check_resumable, read_config
from fmjax.data.splits import open_sources
from fmjax.data.storage.fingerprints import data_differences
from fmjax.data.stream.batches import eval_batches
from fmjax.data.stream.buckets import Bucketed
from fmjax.data.stream.examples import find_overlap, make_examples
from fmjax.data.stream.packing import fill_of
from fmjax.data.stream.tolerance import SKIPPED, Guarded, Tolerance
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.distributed import hosts, sharding
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.inference.pretrained import Pretrained, load, reads_text
from fmjax.runs import folder as run_folder
from fmjax.runs.checkpoint import CheckpointReader
from fmjax.train.resolve import check_generation, check_measures, resolve_model, resolve_tokenizer
from fmjax.train.state import TrainState, abstract_params, abstract_state, create_state, with_params
from fmjax.train.wrappers import mix

Config = dict[str, Any]

# Where a model is initialised from other weights, these alone may start fresh.
FRESH = ("^head/", "^encoder/pooler/")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A resolved config and what it stands for."""

    config: Config
    workdir: Path
    resumed: bool
    mesh: Mesh
    rules: sharding.Rules
    tokenizer: Tokenizer | None  # None: of a task that reads images
    task: Any
    model: Any  # a Linen module, or of a mixture what stands for it
    examples: Mapping[str, Any]  # by split
    data: Config  # fingerprints, for provenance
    steps: int
    spec: dict[str, jax.ShapeDtypeStruct]
    optimizer: optim.Optimizer
    abstract: TrainState
    source: Pretrained | None  # what the parameters start from
    tolerance: Tolerance  # of bad records, and which were left out
    notes: Config  # about the data, for provenance

    @property
    def batch_size(self) -> int:
        return int(self.config["data"]["batch_size"])

    @property
    def seed(self) -> int:
        return int(self.config["train"]["seed"])

    def initial_state(self) -> TrainState:
        """Returns the state of step 0: fresh, or with the parameters of `init.from`; says which of them start fresh."""
        state = create_state(self.model, self.optimizer.transform, self.spec, self.abstract, self.seed)
        if self.source is None:
            return state
        origin = f"init.from={self.config['init']['from']}"
        params, fresh, unused = pytree.merge(state.params, self.source.params, FRESH, origin)
        say(f"{origin}: fresh {', '.join(fresh) or 'none'}; not used {', '.join(unused) or 'none'}")
        return with_params(params, self.optimizer.transform, self.abstract)

    def eval_batches(self, split: str) -> Any:
        """Returns the batches of a split, every example once."""
        return eval_batches(self.examples[split], batch_size=self.batch_size, seed=self.seed, rows=self.rows)

    @property
    def rows(self) -> np.ndarray | None:
        """Which rows of a batch this host reads, None being all."""
        named = ("act_batch",)
        return hosts.rows_of(sharding.spec_sharding("rows", (self.batch_size,), named, self.rules, self.mesh), self.batch_size)


def prepare(given: Config, workdir: Path) -> Experiment:
    """Returns the experiment that a config describes, or, in its run directory, the one to be continued.

    Nothing is written but the empty run directory. Raises UserError for whatever does not fit.
    """
    resumed = run_folder.check_workdir(workdir)
    config = continued(given, workdir) if resumed else given
    rules = sharding.resolve_rules(config["mesh"]["rules"], config["mesh"].get("table"))
    mesh = sharding.make_mesh(config["mesh"]["axes"])
    sharding.check_used(rules, mesh, own=bool(config["mesh"].get("table")))
    check_batch(config, rules, mesh)

    made = tasks.make(config["task"])
    check_reading(config["data"])
    tolerance = Tolerance(config["data"].get("on_error", "fail"), run_folder.left_out(workdir), say)
    with tolerance.active():
        sources = open_sources(config["data"], getattr(made, "splits", {}))
    data = {split: opened.fingerprint() for split, opened in sources.items()}
    origin = config.get("init", {}).get("from")
    # A run that was stopped before its first checkpoint starts from the same weights again.
    source = load(origin) if origin and not (resumed and CheckpointReader(workdir / run_folder.CHECKPOINTS).steps()) else None
    sources["train"], found = tolerance.apply(sources["train"], made.resolve)
    settings, tokenizer = config["task"] | found, None
    if reads_text(made):
        given_tokenizer = partial(resolve_tokenizer, config, workdir if resumed else None, source)
        sources["train"], tokenizer = tolerance.apply(sources["train"], given_tokenizer)
    data |= {"tokenizer": tokenizer.sha256} if tokenizer else {}
    if resumed:
        check_same_data(workdir, data)

    task = tasks.make(settings)
    check_measures(config, task)
    model = mix(resolve_model(config, source, tokenizer, task), task)
    config = config | {"task": settings, "model": {"name": config["model"]["name"]} | dataclasses.asdict(model.settings)}
    check_generation(task, model, tokenizer, config["data"]["max_length"])
    check_positions(config["data"]["max_length"], getattr(model.settings, "positions", 0))
    examples = make_examples(task, sources, tokenizer, config, tolerance)
    if isinstance(examples["train"], Bucketed):
        config = config | {"data": config["data"] | {"buckets": examples["train"].borders}}
    notes = {} if resumed else find_overlap(task, sources) | ({"fill": fill} if (fill := fill_of(examples["train"])) else {})
    size = config["data"]["batch_size"]
    if len(examples["train"]) < size:
        raise UserError(
            f"the training data has {len(examples['train'])} examples, fewer than data.batch_size={size}; "
            "lower the batch size or give more data"
        )
    steps = total_steps(config, len(examples["train"]))
    if hasattr(examples["train"], "check"):
        examples["train"].check(steps, size)
    spec, optimizer, abstract = abstract_training(config, model, examples["train"], steps, mesh, rules)
    if source is not None:
        source = dataclasses.replace(source, params=source.family.fit_params(source.params, model.settings))
        pytree.merge(abstract.params, source.params, FRESH, f"init.from={origin}")
    return Experiment(
        config, workdir, resumed, mesh, rules, tokenizer, task, model, examples, data, steps, spec, optimizer, abstract, source,
        tolerance, notes,
    )  # fmt: skip


def check_positions(length: int, positions: int) -> None:
    """Raises UserError if rows are longer than the position table; 0 is no limit."""
    if 0 < positions < length:
        raise UserError(
            f"data.max_length={length} is longer than the position table, model.positions={positions}; "
            "lower the one or raise the other"
        )


def abstract_training(
    config: Config, model: nn.Module, examples: Any, steps: int, mesh: Mesh, rules: sharding.Rules
) -> tuple[dict[str, jax.ShapeDtypeStruct], optim.Optimizer, TrainState]:
    """Returns the shapes of a global batch, the optimizer, and the state with its shardings, with no array made."""
    size = config["data"]["batch_size"]
    # Where bad records are left out, the first may be one.
    first = Guarded(examples, config["data"].get("on_error", "fail") != "fail", lambda index: None)
    spec = {
        name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
        for name, array in next(eval_batches(first, batch_size=1, seed=0)).items()
        if name not in ("valid", SKIPPED)
    }
    params = abstract_params(model, spec, mesh, rules)
    optimizer = optim.build(config["optim"], params, steps)
    return spec, optimizer, abstract_state(params, optimizer.transform, mesh)


def continued(given: Config, workdir: Path) -> Config:
    """Returns the stored, resolved config of a run, with what may change at a restart taken from the given one.

    Raises UserError with the differences if anything else has changed.
    """
    stored = read_config(workdir)
    check_resumable(stored["fmjax"]["given"], given)
    config = {key: value for key, value in stored.items() if key != "fmjax"}
    every = {key: value for key, value in given["train"].items() if key.endswith("_every") or key in ("steps", "epochs")}
    return config | {
        "data": config["data"] | {key: given["data"][key] for key in READING if key in given["data"]},
        "checkpoint": given["checkpoint"],
        "mesh": given["mesh"],
        "train": config["train"] | every,
    }


def check_batch(config: Config, rules: sharding.Rules, mesh: Mesh) -> None:
    """Raises UserError if the batch does not divide over accumulation and devices."""
    size, parts = config["data"]["batch_size"], config["train"].get("accumulate", 1)
    if parts < 1 or size % parts:
        raise UserError(f"data.batch_size={size} does not divide into train.accumulate={parts} parts; change one of them")
    sharding.check_batch_size(f"data.batch_size={size} / train.accumulate={parts}", size // parts, rules, mesh)


def check_reading(data: Config) -> None:
    """Raises UserError if the settings of how batches are read are out of range."""
    for key in ("workers", "prefetch", "stall_seconds"):
        if data.get(key, 0) < 0:
            raise UserError(f"data.{key}={data[key]}: must not be negative; 0 is none")


def check_same_data(workdir: Path, data: Config) -> None:
    """Raises UserError with the differences if the data are not those that the run began with."""
    if changed := data_differences(run_folder.read_provenance(workdir).get("data", {}), data):
        raise UserError(
            f"--workdir={workdir}: the data have changed since the run began ({'; '.join(changed)}); "
            "restore them, or start a new run in another folder"
        )


def total_steps(config: Config, examples: int) -> int:
    """Returns the number of steps: as given, or of as many epochs, the last step filling up the last epoch.

    Raises UserError unless exactly one of train.steps and train.epochs is given and positive.
    """
    steps, epochs = config["train"].get("steps"), config["train"].get("epochs")
    if (steps is None) == (epochs is None):
        raise UserError("give one of train.steps and train.epochs, not both; --config.train.steps=none unsets the first")
    count = steps if steps is not None else math.ceil(epochs * examples / config["data"]["batch_size"])
    if count < 1:
        given = f"steps={steps}" if epochs is None else f"epochs={epochs}"
        raise UserError(f"train.{given}: must be positive; raise it")
    return count
