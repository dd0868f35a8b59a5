"""Converts between Hugging Face folders and run directories, in both directions."""

from __future__ import annotations

import dataclasses
import os
from contextlib import closing

import jax.numpy as jnp

from fmjax import pytree
from fmjax.config import is_run, to_dict, write_config
from fmjax.contracts import Processors
from fmjax.data.kinds import lifecycle
from fmjax.decoding.settings import token_limit
from fmjax.defaults import experiment
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import RunPath, explained, run_path
from fmjax.inference.export import special_type
from fmjax.inference.folder_task import folder_task
from fmjax.inference.load import load
from fmjax.inference.pretrained import UNLIMITED, Pretrained, abstract_params
from fmjax.runs import folder as run_folder
from fmjax.runs.checkpoint import Checkpoints
from fmjax.runs.lock import locked


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Writes the model of a run directory, or of a checkpoint of llama2.c, as a Hugging Face
    folder, or a Hugging Face folder as a run at step 0.

    Raises UserError if the source cannot be read, the target has other content, or the other format
    has no such model."""
    with explained():
        convert_path(run_path(source), run_path(target))


def convert_path(source: RunPath, target: RunPath) -> None:
    """Converts as `convert`. Raises OSError if a bucket does not answer."""
    exported = is_run(source) or source.is_file()
    if exported and isinstance(target, BucketPath):
        raise UserError(
            f"--to={target}: a Hugging Face folder is written to a local folder; name one, and "
            "copy it to the bucket"
        )
    pretrained = load(source)
    if exported:
        pretrained.save(str(target))
    else:
        write_run(pretrained, target)
    say(f"{source} is now {'a Hugging Face folder' if exported else 'a run at step 0'} in {target}")


def write_run(pretrained: Pretrained, target: RunPath) -> None:
    """Writes a run at step 0 with a model's parameters. Raises UserError if the folder is not empty
    or no task fits.
    """
    task = folder_task(
        pretrained.config, pretrained.model, pretrained.processors, pretrained.class_name
    )
    for kind in lifecycle.missing(task, pretrained.processors):
        raise UserError(
            f"the Hugging Face folder has no {kind.what}, which a run needs; add {kind.file} to it"
        )
    if run_folder.check_workdir(target):
        raise UserError(f"--to={target}: already contains a run; name a new folder")
    family = pretrained.family.name
    config = to_dict(experiment(family, type(task).__module__.rpartition(".")[2]))
    settings = pretrained.model.settings
    config["model"] = {"name": family} | dataclasses.asdict(settings)
    config["task"] |= vars(task)
    if special := special_type(pretrained.config, family):
        config["init"] = config.get("init", {}) | {"model_type": special}
    config["data"]["max_length"] = min(UNLIMITED, token_limit(settings) or UNLIMITED)
    with locked(target):
        needed = {key: pretrained.processors[key] for key in lifecycle.groups(task)}
        lifecycle.store(target, Processors(named=needed))
        held = pytree.names(pretrained.params)
        params = pytree.map_named(
            lambda name, _: jnp.asarray(held[name]), abstract_params(pretrained.model)
        )
        with closing(Checkpoints(target / run_folder.CHECKPOINTS)) as checkpoints:
            checkpoints.save(0, {"params": params}, {})
        write_config(target, config)
