"""What a run's config leaves open: the tokenizer and the model, from the data, the weights or the run itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn

from fmjax import models, tasks
from fmjax.data.records import Bundle, Source
from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from fmjax.decoding.loop import settings_for
from fmjax.distributed.hosts import say
from fmjax.errors import UserError, nearest
from fmjax.inference.pretrained import Pretrained
from fmjax.runs import folder as run_folder
from fmjax.tasks.corpus import texts

Config = dict[str, Any]


def resolve_tokenizer(config: Config, workdir: Path | None, source: Pretrained | None, train: Source) -> Tokenizer:
    """Returns the run's tokenizer: stored in the run, or named, or that of the weights, or trained here on the training data.

    Raises UserError if the named one is not the one that the weights were trained with.
    """
    data = config["data"]
    if workdir is not None:
        return load_tokenizer(workdir / run_folder.TOKENIZER)
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
    kind, size = data["tokenizer_kind"], data["vocab_size"]
    say(f"tokenizer: training {kind} with {size} pieces on the training data")
    return train_tokenizer(training_texts(tasks.make(config["task"]), train), kind, size, lowercase=data.get("lowercase", True))


def training_texts(task: Any, train: Any) -> Iterator[str]:
    """Yields the texts of the training data, of all parts of a mixture, by the columns that the task reads."""
    if isinstance(train, Bundle):
        for part, source in train.parts.items():
            yield from training_texts(task.tasks[part], source)
    else:
        usual = (getattr(task, "column", "") or getattr(task, "text", "text"),)
        for column in dict.fromkeys(getattr(task, "text_columns", usual)):
            yield from texts(train, column)


def resolve_model(config: Config, source: Pretrained | None, tokenizer: Tokenizer | None, task: Any) -> nn.Module:
    """Returns the model: of the size named in the config, or of that of the weights it starts from.

    Raises UserError if family, size or vocabulary do not fit each other.
    """
    if tokenizer is None and config["data"].get("tokenizer"):
        raise UserError(f"data.tokenizer={config['data']['tokenizer']} is of tasks that read text; leave it out")
    section = dict(config["model"])
    name = section.pop("name")
    family = models.family(name)
    if (tokenizer is not None) != ("vocab_size" in family.Settings.__dataclass_fields__):
        read = "text" if tokenizer else "images"
        raise UserError(f'task.name="{config["task"]["name"]}" reads {read}, unlike model.name="{name}"; change one of them')
    if source is not None and "size" not in section:
        if (theirs := source.family.name) != name:
            raise UserError(f'init.from holds a "{theirs}" but model.name="{name}"; add --config.model.name={theirs}')
        section = dataclasses.asdict(source.model.settings) | section
    elif tokenizer is not None:
        section = {"vocab_size": tokenizer.vocab_size} | family.settings_from_tokenizer(tokenizer) | section
    if tokenizer is not None and section["vocab_size"] < tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, more than model.vocab_size={section['vocab_size']} embeddings; "
            "leave model.vocab_size out to fit it to the tokenizer, or name the weights' own tokenizer"
        )
    model = family.build(heads=task.heads, **section)
    if getattr(task, "patch_size", None) not in (None, getattr(model.settings, "patch_size", None)):
        raise UserError(
            f"task.patch_size={task.patch_size} is not the model's, model.patch_size={model.settings.patch_size}; make them agree"
        )
    if any(getattr(part, "pack", False) for part in getattr(task, "tasks", {"": task}).values()) and not hasattr(model, "packs"):
        raise UserError(f'task.pack=true: model.name="{name}" does not read packed pairs; set it to false')
    return model


def check_generation(task: Any, model: Any, tokenizer: Tokenizer | None, length: int) -> None:
    """Raises UserError if the settings of generation of a task are none, or ask for more than the model has positions."""
    if tokenizer is not None and hasattr(task, "generation"):
        settings = settings_for(tokenizer, task.generation, model.settings)
        if getattr(task, "needs", "") == "generation":
            settings.limits(1 if hasattr(model, "encode") else length, getattr(model.settings, "positions", 0))


def check_measures(config: Config, task: Any) -> None:
    """Raises UserError if the metric that chooses the best step, or ends the run, is not one of the task's."""
    stopping = config["train"]["early_stopping"]
    chosen = {"checkpoint.best": config["checkpoint"].get("best")}
    chosen |= {"train.early_stopping.metric": stopping["metric"]} if stopping["patience"] else {}
    for key, metric in chosen.items():
        if metric and metric not in task.measures:
            hint = nearest(metric, task.measures)
            raise UserError(f'{key}="{metric}" is not a metric of this task{hint}; it has {", ".join(task.measures)}')
