"""Chooses the processors of a run: those stored in it, named in the config, those of the weights
that it starts from, or fitted ones.
"""

from __future__ import annotations

from fmjax import contracts
from fmjax.config import read_config
from fmjax.contracts import Config, Processors, Source, Task
from fmjax.data.kinds import lifecycle
from fmjax.data.records import Bundle
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.filesystems.paths import RunPath


def choose_processors(
    config: Config,
    task: Task,
    workdir: RunPath | None,
    weights: Processors | None,
    train: Source | Bundle,
) -> Processors:
    """Returns the run's processors for the columns that its task reads.

    Each comes from the first of these that has it: the run, if it is resumed; the config; the
    task's settings; the weights; otherwise it is fitted to the training data.

    Args:
      config: the run's.
      task: with the settings that follow from the data.
      workdir: the folder of a run that is resumed, otherwise None.
      weights: those of the weights that the run starts from, if it does.
      train: the training data; a `Bundle` for a mixture of tasks.

    Raises UserError if a named processor is not the one that the weights were trained with, or the
    weights have none."""
    if workdir is not None:
        return restored_processors(config, task, workdir)
    found = {
        key: choose_processor(group, key, config, weights)
        for key, group in lifecycle.groups(task, train).items()
    }
    return Processors(named=found)


def restored_processors(config: Config, task: Task, workdir: RunPath) -> Processors:
    """Returns the processors stored in a run. Raises UserError if the config now names another
    location that has different ones.
    """
    found, before = lifecycle.restore(workdir, task), read_config(workdir)["data"]
    for key, group in lifecycle.groups(task).items():
        setting = group.processor.what
        path = config["data"].get(setting)
        named = group.processor.named(config["data"]) if path != before.get(setting) else None
        if named is not None and named.sha256 != found[key].sha256:
            raise UserError(
                f"data.{setting}={path}: is not the {setting} that the run started with, "
                f"{before[setting]}; use that one"
            )
    return found


def choose_processor(
    group: lifecycle.Group, key: str, config: Config, weights: Processors | None
) -> contracts.Processor:
    """Returns the processor of a new run for a group of columns."""
    processor, data = group.processor, config["data"]
    theirs = None if weights is None else weights.get(key)
    named = processor.named(data)
    if named is not None:
        if theirs is not None and theirs.sha256 != named.sha256:
            setting = f"data.{processor.what}"
            raise UserError(
                f"{setting}={data[processor.what]} is not the {processor.what} of "
                f"init.weights={config['init']['weights']}; "
                f"leave {setting} out to use that of the weights"
            )
        return named
    if group.settings is not None:
        return lifecycle.fit(group, data)
    if theirs is not None:
        return theirs
    if weights is not None:
        name = (
            f"; name one with --config.data.{processor.what}=DIR"
            if processor.what in data
            else "; start from other weights"
        )
        raise UserError(f"init.weights={config['init']['weights']} has no {processor.what}{name}")
    if line := processor.announcement(data):
        say(line)
    return lifecycle.fit(group, data)
