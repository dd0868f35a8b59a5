"""The config that every experiment starts from: each key there is, with its default.

A config file calls `experiment(model, task)` and sets what is its own. The `model` and `task` sections have the fields
of the family's `Settings` and the task's `Task`, so a key is declared once, where it is used. Keys without a value are
placeholders: left out unless set.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fmjax import models, tasks
from fmjax.config import open_dict


def experiment(model: str, task: str) -> ConfigDict:
    """Returns the default config of a model family and a task."""
    config = ConfigDict()
    config.model = ConfigDict({"name": model, "size": placeholder(str)} | unset(models.family(model).Settings))
    config.task = ConfigDict({"name": task} | fields(tasks.task(task).Task))
    config.data = data()
    config.optim = optim()
    config.train = ConfigDict(
        {
            "steps": placeholder(int),  # one of steps and epochs
            "epochs": placeholder(float),
            "log_every": 10,
            "eval_every": 0,  # 0: at the end alone
            "seed": 0,
            "accumulate": 1,  # parts that a batch is split into, their gradients added up
            "max_nonfinite": 10,  # steps in a row without a finite loss that end the run
            "dropout_rng": "threefry2x32",  # "rbg" is faster, and not the same on every kind of device
            # Ends the run when the metric has not improved in `patience` evaluations; 0: never.
            "early_stopping": {"metric": "loss", "mode": "min", "patience": 0},
        }
    )
    # `best`: a metric of the task; its best step is kept besides the last `keep`, and preferred by evaluation.
    config.checkpoint = ConfigDict({"every": 1000, "keep": 2, "best": placeholder(str), "mode": "max"})
    config.mesh = ConfigDict({"axes": open_dict(data=-1), "rules": "dp"})
    config.init = ConfigDict({"from": placeholder(str)})  # a run directory or a Hugging Face folder
    return config.lock()


def data() -> ConfigDict:
    """Returns the section of the data: where they are, how they become tokens and batches."""
    return ConfigDict(
        {
            "source": "auto",  # by the files' ending; or text, jsonl, csv, tsv, tfds, python_docs
            "files": open_dict(),  # split -> file, list, glob or folder; none: the embedded corpus python_docs
            "name": placeholder(str),  # of a TFDS data set, as glue/sst2
            "data_dir": placeholder(str),
            "download": False,  # whether TFDS may fetch what is not there
            "record": placeholder(str),  # of text files: paragraph, line or file
            "columns": placeholder(tuple),  # names of the columns of a csv or tsv file without a header
            "hold_out": placeholder(float),  # share of the training data to validate on where no validation is given
            "tokenizer": placeholder(str),  # a folder or file; unset: that of init.from, or trained on the data
            "tokenizer_kind": "wordpiece",  # or bpe, unigram, word
            "vocab_size": 8000,
            "batch_size": 32,
            "max_length": 128,
        }
    )


def optim() -> ConfigDict:
    """Returns the section of the optimizer."""
    return ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-4,
            "schedule": "linear",  # or cosine, inverse_sqrt, constant
            "warmup_steps": placeholder(int),
            "warmup_ratio": placeholder(float),
            "end_fraction": 0.0,  # of the rate, that linear and cosine fall to
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "no_decay": ("bias$", "norm/scale$"),
            "clip_norm": placeholder(float),
            "freeze": (),
            "multipliers": open_dict(),  # regular expression -> factor on the learning rate
            "layer_decay": 1.0,
            "ema": placeholder(float),
        }
    )


def fields(settings: type) -> dict[str, Any]:
    """Returns the fields of a dataclass with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(settings)}


def unset(settings: type) -> dict[str, Any]:
    """Returns the fields of a dataclass as placeholders of their types: what a named size or given weights may fill in."""
    types = typing.get_type_hints(settings)
    return {field.name: placeholder(types[field.name]) for field in dataclasses.fields(settings)}
