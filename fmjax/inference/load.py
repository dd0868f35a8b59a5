"""`load(path)`: a model from a Hugging Face folder, a run directory or a checkpoint of llama2.c."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fmjax import contracts, models, pytree, tasks
from fmjax.config import is_run, read_config
from fmjax.config.json_files import read_json
from fmjax.contracts import Processors, PyTree
from fmjax.data.kinds import image, lifecycle, preprocessor_config, text
from fmjax.data.tokenizers.tokenizer import load_tokenizer
from fmjax.decoding.settings import GENERATION, from_config
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.filesystems import paths
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import RunPath, run_path
from fmjax.hardware import explained
from fmjax.hub import families, folders, llama2c
from fmjax.hub.tensors import check_finite
from fmjax.inference.pretrained import Pretrained, abstract_params
from fmjax.layers.kernels.choice import AUTO
from fmjax.runs.best import stored_best
from fmjax.runs.checkpoint_reader import CheckpointReader
from fmjax.runs.folder import CHECKPOINTS, has_failed_start

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def load(path: str | os.PathLike[str]) -> Pretrained:
    """Returns the model of a Hugging Face folder, of a run directory (also at gs://) at its best
    step (the latest, if none is best), or of a checkpoint of llama2.c, a file that ends in .bin.

    Raises UserError if it is none of these, is incomplete, or holds a model that is not supported.
    """
    path = run_path(path)
    if isinstance(path, BucketPath):
        return load_from_bucket(path)
    if path.is_file() and path.suffix.lower() == ".bin":
        return load_llama2c(path)
    if path.is_file():
        raise UserError(
            f"{path}: is a file; give the folder that contains it, or a .bin file of llama2.c"
        )
    with explained():
        return load_run(path) if is_run(path) or has_failed_start(path) else load_reference(path)


def load_from_bucket(path: BucketPath) -> Pretrained:
    """Returns the model of a run in a bucket.

    Raises UserError if there is no run, or if a request fails.
    """
    with explained(), paths.explained():
        path.check()
        if is_run(path) or has_failed_start(path):
            return load_run(path)
        if path.exists():
            raise UserError(f"{path}: is not a run of fmjax; to load it, copy it to a local folder")
    raise UserError(f"{path}: there is no such folder; correct the name of the run")


def load_llama2c(path: Path) -> Pretrained:
    """Returns the model of a checkpoint of llama2.c."""
    config, tensors, tokenizer = llama2c.read(path)
    family, reference = models.family("llama"), families.table_of("llama")
    model = family.build(heads=reference.heads(config), **reference.read_settings(config))
    loaded = folders.fit_weights(path, tensors, reference, abstract_params(model))
    processors = Processors(*([text.Processor(tokenizer)] if tokenizer else []))
    generation = from_config(config)
    return Pretrained(config, family, model, loaded.params, processors, generation=generation)


def load_reference(folder: Path) -> Pretrained:
    """Returns the model of a Hugging Face folder; `architectures` in its config says which."""
    config = folders.read_config(folder)
    name, reference = families.reference_for(config, folders.model_type(config) or "")
    family = models.family(name)
    model = family.build(heads=reference.heads(config), **reference.read_settings(config))
    loaded = folders.read_weights(folder, reference, abstract_params(model))
    if loaded.fresh:
        lost = f"{reference.architecture(config)} lacks its {', '.join(loaded.fresh)}"
        raise UserError(
            f"{folder}: {lost}; download the complete weights, or correct architectures in "
            "config.json"
        )
    if loaded.unused:
        say(f"warning: {folder}: not used: {', '.join(loaded.unused)}")
    params = pytree.unnames(pytree.names(loaded.params) | pytree.names(loaded.others))
    file = folder / GENERATION
    generation = read_json(file) if file.exists() else from_config(config)
    processors = reference_processors(folder, reference.inputs, model.settings)
    return Pretrained(config, family, model, params, processors, generation=generation)


def reference_processors(folder: Path, inputs: Sequence[str], settings: PyTree) -> Processors:
    """Returns the tokenizer of a Hugging Face folder, if it has one, and the image processor of a
    model that reads images.
    """
    found: list[contracts.Processor] = []
    if any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        found.append(text.Processor(load_tokenizer(folder)))
    if "pixel_values" in inputs:
        read = preprocessor_config.read(folder, settings.image_size, settings.channels)
        found.append(image.Processor.of(read))
    return Processors(*found)


def load_run(folder: RunPath) -> Pretrained:
    """Returns the model of a run directory: its moving average where it keeps one."""
    none = f"{folder}: the run has no checkpoint yet; train it first, with the same --workdir"
    if has_failed_start(folder):
        raise UserError(none)
    config = read_config(folder)
    task = tasks.make(config["task"])
    # The stored kernel depends on the machine that trained.
    settings = dict(config["model"])
    settings |= {"attention": AUTO} if "attention" in settings else {}
    if "context" in settings:  # of rotary positions: the rows that it trained on may be longer
        settings["context"] = max(settings["context"], config["data"]["max_length"])
    family = models.family(settings.pop("name"))
    model = family.build(heads=task.heads, **settings)
    checkpoints = CheckpointReader(folder / CHECKPOINTS, best=stored_best(config, task))
    step = checkpoints.best()
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise UserError(none)
    item = "ema" if "ema" in checkpoints.items(step) else "params"
    params = checkpoints.restore(step, {item: abstract_params(model)})[item]
    for name, leaf in pytree.names(params).items():
        advice = "use an earlier checkpoint, or train again"
        check_finite(f"{folder} at step {step}", name, np.asarray(leaf), advice)
    task = task.main  # of a mixture, which was trained with the heads of all its parts
    model = model.clone(heads=task.heads)
    return Pretrained(config, family, model, params, lifecycle.restore(folder, task), task, step)
