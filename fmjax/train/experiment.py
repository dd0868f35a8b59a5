"""From a config to everything a run needs, checked on the host before anything is compiled or written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from fmjax import models, optim, pytree, sharding, tasks
from fmjax.config import check_resumable, differences, read_config
from fmjax.data.pipeline import eval_batches
from fmjax.data.sources import Source, hold_out, open_source
from fmjax.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from fmjax.errors import UserError, nearest
from fmjax.pretrained import Pretrained, load
from fmjax.tasks.corpus import texts
from fmjax.train import rundir
from fmjax.train.checkpoint import CheckpointReader
from fmjax.train.logs import say
from fmjax.train.state import TrainState, abstract_params, abstract_state, create_state, with_params

Config = dict[str, Any]

# Where a model is initialised from other weights, these alone may start fresh.
FRESH = ("^head/", "^encoder/pooler/")
SOURCE_OPTIONS = ("record", "columns", "name", "data_dir", "download")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A resolved config and what it stands for."""

    config: Config
    workdir: Path
    resumed: bool
    mesh: Mesh
    rules: sharding.Rules
    tokenizer: Tokenizer
    task: Any
    model: nn.Module
    examples: Mapping[str, Any]  # by split
    data: Config  # fingerprints, for provenance
    steps: int
    spec: dict[str, jax.ShapeDtypeStruct]
    optimizer: optim.Optimizer
    abstract: TrainState
    source: Pretrained | None  # what the parameters start from

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
        return eval_batches(self.examples[split], batch_size=self.batch_size, seed=self.seed)


def prepare(given: Config, workdir: Path) -> Experiment:
    """Returns the experiment that a config describes, or, in its run directory, the one to be continued.

    Nothing is written but the empty run directory. Raises UserError for whatever does not fit.
    """
    resumed = rundir.check_workdir(workdir)
    config = continued(given, workdir) if resumed else given
    rules = sharding.resolve_rules(config["mesh"]["rules"])
    mesh = sharding.make_mesh(config["mesh"]["axes"])
    check_batch(config, rules, mesh)

    sources = open_sources(config["data"])
    origin = config.get("init", {}).get("from")
    # A run that was stopped before its first checkpoint starts from the same weights again.
    source = load(origin) if origin and not (resumed and CheckpointReader(workdir / rundir.CHECKPOINTS).steps()) else None
    settings = config["task"] | tasks.make(config["task"]).resolve(sources["train"])
    tokenizer = resolve_tokenizer(config, workdir if resumed else None, source, sources["train"])
    data = {split: opened.fingerprint() for split, opened in sources.items()} | {"tokenizer": tokenizer.sha256}
    if resumed:
        check_same_data(workdir, data)

    task = tasks.make(settings)
    check_measures(config, task)
    model = resolve_model(config, source, tokenizer, task)
    config = config | {"task": settings, "model": {"name": config["model"]["name"]} | dataclasses.asdict(model.settings)}
    if config["data"]["max_length"] > model.settings.positions:
        raise UserError(
            f"data.max_length={config['data']['max_length']} is longer than the position table, "
            f"model.positions={model.settings.positions}; lower the one or raise the other"
        )
    length = config["data"]["max_length"]
    examples = {
        split: task.examples(opened, tokenizer, length, train=split == "train") for split, opened in sources.items()
    }
    size = config["data"]["batch_size"]
    if len(examples["train"]) < size:
        raise UserError(
            f"the training data has {len(examples['train'])} examples, fewer than data.batch_size={size}; "
            "lower the batch size or give more data"
        )
    steps = total_steps(config, len(examples["train"]))
    spec = {
        name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
        for name, array in next(eval_batches(examples["train"], batch_size=1, seed=0)).items()
        if name != "valid"
    }
    params = abstract_params(model, spec, mesh, rules)
    optimizer = optim.build(config["optim"], params, steps)
    abstract = abstract_state(params, optimizer.transform, mesh)
    if source is not None:
        pytree.merge(params, source.params, FRESH, f"init.from={origin}")
    return Experiment(
        config, workdir, resumed, mesh, rules, tokenizer, task, model, examples, data, steps, spec, optimizer, abstract, source
    )


def continued(given: Config, workdir: Path) -> Config:
    """Returns the stored, resolved config of a run, with what may change at a restart taken from the given one.

    Raises UserError with the differences if anything else has changed.
    """
    stored = read_config(workdir)
    check_resumable(stored["fmjax"]["given"], given)
    config = {key: value for key, value in stored.items() if key != "fmjax"}
    every = {key: value for key, value in given["train"].items() if key.endswith("_every") or key in ("steps", "epochs")}
    return config | {
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


def open_split(data: Config, split: str) -> Source:
    """Returns the data of one split, by the config's `data` section; `hold_out` makes the validation split of files
    that have none. Raises UserError if the split is not there."""
    files = data["files"]
    share = data.get("hold_out") if files and "validation" not in files else None
    options = {name: data[name] for name in SOURCE_OPTIONS if name in data}
    if share and split in ("train", "validation") and "train" in files:
        return hold_out(open_source(data["source"], files["train"], split="train", **options), share)[split == "validation"]
    if files and split not in files:
        raise UserError(f'data.files has no "{split}", only {", ".join(files)}; give --config.data.files.{split}=FILE')
    return open_source(data["source"], files.get(split), split=split, **options)


def open_sources(data: Config) -> dict[str, Source]:
    """Returns the training and, unless there is none, the validation data."""
    validated = not data["files"] or "validation" in data["files"] or data.get("hold_out")
    return {split: open_split(data, split) for split in ("train", "validation") if split == "train" or validated}


def resolve_tokenizer(config: Config, workdir: Path | None, source: Pretrained | None, train: Source) -> Tokenizer:
    """Returns the run's tokenizer: stored in the run, or named, or that of the weights, or trained here on the training data.

    Raises UserError if the named one is not the one that the weights were trained with.
    """
    data = config["data"]
    if workdir is not None:
        return load_tokenizer(workdir / rundir.TOKENIZER)
    theirs = source.tokenizer if source else None
    if data.get("tokenizer"):
        named = load_tokenizer(data["tokenizer"])
        if theirs is not None and theirs.sha256 != named.sha256:
            raise UserError(
                f"data.tokenizer={data['tokenizer']} is not the tokenizer of init.from={config['init']['from']}; "
                "leave data.tokenizer out to use that of the weights"
            )
        return named
    if theirs is not None:
        return theirs
    if source is not None:
        raise UserError(f"init.from={config['init']['from']} has no tokenizer; name one with --config.data.tokenizer=DIR")
    column = config["task"].get("column") or config["task"].get("text", "text")
    kind, size = data["tokenizer_kind"], data["vocab_size"]
    say(f"tokenizer: training {kind} with {size} pieces on the training data")
    return train_tokenizer(texts(train, column), kind, size)


def resolve_model(config: Config, source: Pretrained | None, tokenizer: Tokenizer, task: Any) -> nn.Module:
    """Returns the model: of the size named in the config, or of that of the weights it starts from.

    Raises UserError if family, size or vocabulary do not fit each other.
    """
    section = dict(config["model"])
    name = section.pop("name")
    family = models.family(name)
    if source is not None and "size" not in section:
        if source.family is not family:
            theirs = source.family.__name__.rpartition(".")[2]
            raise UserError(f'init.from holds a "{theirs}" but model.name="{name}"; add --config.model.name={theirs}')
        section = dataclasses.asdict(source.model.settings) | section
    section.setdefault("vocab_size", tokenizer.vocab_size)
    if source is None and family.Settings.position_offset:
        # Positions begin after the padding id in RoBERTa and its kin; another offset could not be exported.
        section.setdefault("position_offset", tokenizer.pad_id + 1)
    if section["vocab_size"] < tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, more than model.vocab_size={section['vocab_size']} embeddings; "
            "leave model.vocab_size out to fit it to the tokenizer, or name the weights' own tokenizer"
        )
    return family.build(heads=task.heads, **section)


def check_measures(config: Config, task: Any) -> None:
    """Raises UserError if the metric that chooses the best step, or ends the run, is not one of the task's."""
    stopping = config["train"]["early_stopping"]
    chosen = {"checkpoint.best": config["checkpoint"].get("best")}
    chosen |= {"train.early_stopping.metric": stopping["metric"]} if stopping["patience"] else {}
    for key, metric in chosen.items():
        if metric and metric not in task.measures:
            hint = nearest(metric, task.measures)
            raise UserError(f'{key}="{metric}" is not a metric of this task{hint}; it has {", ".join(task.measures)}')


def check_same_data(workdir: Path, data: Config) -> None:
    """Raises UserError with the differences if the data are not those that the run began with."""
    if changed := differences(rundir.read_provenance(workdir).get("data", {}), data):
        raise UserError(
            f"--workdir={workdir}: the data have changed since the run began ({'; '.join(changed[:3])}); "
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
