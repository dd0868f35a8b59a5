"""What a run's config leaves open: the processors and the model, from the data, the weights or the run itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn

from fmjax import contracts, models
from fmjax.contracts import Config, Encodes, Generates, Model, PacksPairs, Processors, Task
from fmjax.data import kinds
from fmjax.data.kinds import lifecycle, text
from fmjax.decoding.settings import settings_for
from fmjax.distributed.hosts import say
from fmjax.errors import UserError, nearest
from fmjax.inference.pretrained import Pretrained
from fmjax.models import Family


def resolve_processors(config: Config, task: Task, workdir: Path | None, source: Pretrained | None, train: Any) -> Processors:
    """Returns the run's processors of the columns that its task reads.

    Each is that stored in the run, if it is resumed; or the named one; or that which follows from the task's settings; or
    that of the weights; or one fitted here to the training data.

    Args:
      config: the run's.
      task: with the settings that follow from the data.
      workdir: of a run that is resumed, else None.
      source: what the parameters start from.
      train: the training data, of a mixture of tasks a `Bundle`.

    Raises UserError if a named processor is not the one that the weights were trained with, or the weights have none.
    """
    if workdir is not None:
        return lifecycle.restore(workdir, task)
    found = {
        key: resolve_processor(group, key, config, source) for key, group in lifecycle.groups(task, train).items()
    }
    return Processors(named=found)


def resolve_processor(group: lifecycle.Group, key: str, config: Config, source: Pretrained | None) -> contracts.Processor:
    """Returns the processor of a new run for a group of columns."""
    processor, data = group.processor, config["data"]
    theirs = source.processors.get(key) if source else None
    named = processor.named(data)
    if named is not None:
        if theirs is not None and theirs.sha256 != named.sha256:
            setting = f"data.{processor.what}"
            raise UserError(
                f"{setting}={data[processor.what]} is not the {processor.what} of init.weights={config['init']['weights']}; "
                f"leave {setting} out to use that of the weights"
            )
        return named
    if group.settings is not None:
        return lifecycle.fit(group, data)
    if theirs is not None:
        return theirs
    if source is not None:
        name = f"; name one with --config.data.{processor.what}=DIR" if processor.what in data else "; start from other weights"
        raise UserError(f"init.weights={config['init']['weights']} has no {processor.what}{name}")
    if line := processor.announcement(data):
        say(line)
    return lifecycle.fit(group, data)


def resolve_model(config: Config, source: Pretrained | None, processors: Processors, task: Task) -> nn.Module:
    """Returns the model: of the size named in the config, or of that of the weights it starts from.

    Raises UserError if family, size, processors or vocabulary do not fit each other.
    """
    if "text" not in processors and config["data"].get("tokenizer"):
        raise UserError(f"data.tokenizer={config['data']['tokenizer']} is only for tasks that read text; leave it out")
    section = dict(config["model"])
    name = section.pop("name")
    family = models.family(name)
    check_kinds(config, family, processors)
    if source is not None and "size" not in section:
        if (theirs := source.family.name) != name:
            raise UserError(f'init.weights holds a "{theirs}" but model.name="{name}"; add --config.model.name={theirs}')
        section = dataclasses.asdict(source.model.settings) | section
    else:
        section = fresh_settings(family, processors) | section
    check_vocabulary(section, processors)
    model: nn.Module = family.build(heads=task.heads, **section)
    settings = dataclasses.asdict(model.settings)
    for setting, value in task.model_settings.items():
        if settings.get(setting) != value:
            raise UserError(
                f"task.{setting}={value} is not the model's, model.{setting}={settings.get(setting)}; make them agree"
            )
    if task.packs_pairs and not isinstance(model, PacksPairs):
        raise UserError(f'task.pack=true: model.name="{name}" does not read packed pairs; set it to false')
    return model


def check_kinds(config: Config, family: Family, processors: Processors) -> None:
    """Raises UserError if the task reads another kind of data than the family: it has no setting for what follows from it."""
    name, fields = config["model"]["name"], family.Settings.__dataclass_fields__
    read = {processor.kind: type(processor) for processor in processors.values()}
    foreign = [kind for kind in read.values() if not set(kind.model_settings) <= set(fields)]
    wanted = [kind for kind in kinds.known() if kind.model_settings and set(kind.model_settings) <= set(fields)]
    if foreign or any(kind.kind not in read for kind in wanted):
        words = " and ".join(kind.reads for kind in read.values())
        raise UserError(f'task.name="{config["task"]["name"]}" reads {words}, unlike model.name="{name}"; change one of them')


def fresh_settings(family: Family, processors: Processors) -> Config:
    """Returns the settings of a fresh model that follow from its processors."""
    texts = processors.get("text")
    followed: Config = {}
    if isinstance(texts, text.Processor):
        followed = family.settings_from_tokenizer(texts.tokenizer)
    return processors.sizes() | followed


def check_vocabulary(section: Config, processors: Processors) -> None:
    """Raises UserError if the tokenizer has more pieces than the model has embeddings."""
    pieces = processors.sizes().get("vocab_size", 0)
    if section.get("vocab_size", pieces) < pieces:
        raise UserError(
            f"the tokenizer has {pieces} pieces, more than model.vocab_size={section['vocab_size']} embeddings; "
            "leave model.vocab_size out to fit it to the tokenizer, or name the weights' own tokenizer"
        )


def check_generation(task: Task, model: Model, processors: Processors, length: int) -> None:
    """Raises UserError if the settings of generation of a task are invalid, or ask for more than the model has positions."""
    if task.generation is not None and "text" in processors and isinstance(model, Generates):
        settings = settings_for(processors.of(text.Processor).tokenizer, task.generation, model)
        if task.needs_generation:
            settings.limits(1 if isinstance(model, Encodes) else length, model.settings.positions)


def check_measures(config: Config, task: Task) -> None:
    """Raises UserError if the metric that chooses the best step, or ends the run, is not one of the task's."""
    stopping = config["train"]["early_stopping"]
    chosen = {"checkpoint.best": config["checkpoint"].get("best")}
    chosen |= {"train.early_stopping.metric": stopping["metric"]} if stopping["patience"] else {}
    for key, metric in chosen.items():
        if metric and metric not in task.measures:
            hint = nearest(metric, task.measures)
            raise UserError(f'{key}="{metric}" is not a metric of this task{hint}; it has {", ".join(task.measures)}')
