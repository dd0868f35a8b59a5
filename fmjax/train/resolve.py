"""Resolves the model settings that a config leaves open, by name or from weights or processors."""

from __future__ import annotations

import dataclasses

import flax.linen as nn

from fmjax import models
from fmjax.contracts import Config, PacksPairs, Processors, Task
from fmjax.data import kinds
from fmjax.data.kinds import text
from fmjax.errors import UserError
from fmjax.inference.pretrained import Pretrained
from fmjax.models import Family


def resolve_model(
    config: Config, source: Pretrained | None, processors: Processors, task: Task
) -> nn.Module:
    """Returns the model, with the size named in the config or that of the starting weights.

    Raises UserError if family, size, processors or vocabulary are incompatible.
    """
    if (named := config["data"].get("tokenizer")) and "text" not in processors:
        raise UserError(
            f"data.tokenizer={named} only applies to tasks that read text; leave it out"
        )
    section = dict(config["model"])
    name = section.pop("name")
    family = models.family(name)
    check_kinds(config, family, processors)
    if source is not None and "size" not in section:
        if (theirs := source.family.name) != name:
            raise UserError(
                f'init.weights holds a "{theirs}", but model.name="{name}"; add '
                f"--config.model.name={theirs}"
            )
        section = dataclasses.asdict(source.model.settings) | section
    else:
        section = fresh_settings(family, processors) | section
    check_vocabulary(section, processors)
    model: nn.Module = family.build(heads=task.heads, **section)
    settings = dataclasses.asdict(model.settings)
    for setting, value in task.model_settings.items():
        if settings.get(setting) != value:
            raise UserError(
                f"task.{setting}={value} differs from the model's, "
                f"model.{setting}={settings.get(setting)}; make them agree"
            )
    if task.packs_pairs and not isinstance(model, PacksPairs):
        raise UserError(
            f'task.pack=true: model.name="{name}" does not read packed pairs; set it to false'
        )
    return model


def check_kinds(config: Config, family: Family, processors: Processors) -> None:
    """Raises UserError if the task reads other kinds of data than the family has settings for."""
    name, fields = config["model"]["name"], set(family.Settings.__dataclass_fields__)
    read = {processor.kind: type(processor) for processor in processors.values()}
    foreign = [kind for kind in read.values() if not fields.issuperset(kind.model_settings)]
    known = [kind for kind in kinds.known() if kind.model_settings]
    wanted = [kind for kind in known if fields.issuperset(kind.model_settings)]
    if foreign or any(kind.kind not in read for kind in wanted):
        words = " and ".join(kind.reads for kind in read.values())
        unlike = f'reads {words}, unlike model.name="{name}"'
        raise UserError(f'task.name="{config["task"]["name"]}" {unlike}; change one of them')


def fresh_settings(family: Family, processors: Processors) -> Config:
    """Returns the settings of a new model that its processors determine."""
    sizes = processors.sizes()
    if isinstance(texts := processors.get("text"), text.Processor):
        return sizes | family.settings_from_tokenizer(texts.tokenizer)
    return sizes


def check_vocabulary(section: Config, processors: Processors) -> None:
    """Raises UserError if the tokenizer has more pieces than the model has embeddings."""
    pieces = processors.sizes().get("vocab_size", 0)
    size = section.get("vocab_size", pieces)
    if size < pieces:
        raise UserError(
            f"the tokenizer has {pieces} pieces, more than model.vocab_size={size} embeddings; "
            "leave model.vocab_size out to fit it to the tokenizer, or name the "
            "weights' own tokenizer"
        )
