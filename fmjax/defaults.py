"""The config that every experiment starts from: each key there is, with its default.

A config file calls `experiment(model, task)` and sets what is its own. The `model` and `task`
sections have the fields of the family's `Settings` and the task's `Task`, so a key is declared
once, where it is used. Keys without a value are
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


def experiment(model: str, task: str, *more: str) -> ConfigDict:
    """Returns the default config of a model family and a task; of several tasks, a mixture of them,
    the first the main one.
    """
    config = ConfigDict()
    config.model = ConfigDict(
        {"name": model, "size": placeholder(str)} | unset(models.family(model).Settings)
    )
    config.task = (
        mixture(task, *more) if more else ConfigDict({"name": task} | fields(tasks.task(task).Task))
    )
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
            # "hash" is faster on CPUs; "rbg" on TPUs, and not the same on every kind of device.
            "dropout_rng": "threefry2x32",
            # Ends the run when the metric has not improved in `patience` evaluations; 0: never.
            # `mode`: as below.
            "early_stopping": {"metric": "loss", "mode": placeholder(str), "patience": 0},
        }
    )
    # `best`: a metric of the task; its best step is kept besides the last `keep`, and preferred by
    # evaluation. `mode`, max or min, follows from the metric unless that is unknown, as of a task
    # of your own.
    config.checkpoint = ConfigDict(
        {"every": 1000, "keep": 2, "best": placeholder(str), "mode": placeholder(str)}
    )
    # The rules are dp, fsdp, fsdp_tp or fsdp_context; or one's own `table` of logical axes, {"mlp":
    # "tensor", ...}.
    config.mesh = ConfigDict({"axes": open_dict(data=-1), "rules": "dp", "table": open_dict()})
    # A run directory or a Hugging Face folder; `from` is the old name of `weights`.
    config.init = ConfigDict({"weights": placeholder(str), "from": placeholder(str)})
    return config.lock()


def data() -> ConfigDict:
    """Returns the section of the data: where they are, how they become tokens and batches."""
    return ConfigDict(
        {
            # By the files' ending; or one of fmjax.data.sources, such as text, csv, parquet or
            # tfds.
            "source": "auto",
            # split -> file, list, glob or folder, here or at gs://, or a part, "a.txt[:90%]"; none:
            # python_docs
            "files": open_dict(),
            # Several sources in place of files.train: name -> files (a path, or splits), weight,
            # epochs, cap, and any of the keys about sources here: {"books": {"files":
            # "books/*.txt", "weight": 0.7}, "wiki": {...}}; no weights: by size.
            "mixture": open_dict(),
            # Shares are weights ** (1 / temperature): above 1 small sources count for more.
            "temperature": 1.0,
            # Step -> weights from after that step on, {"1000": {"wiki": 0.5}}; the rest stay.
            "curriculum": open_dict(),
            "name": placeholder(str),  # of a TFDS data set, as glue/sst2
            "data_dir": placeholder(str),
            "download": False,  # whether TFDS may fetch what is not there
            "record": placeholder(str),  # of text files: paragraph, line or file
            # Names of the columns of a csv or tsv file without a header, of parallel files; of
            # parquet and arrow, those to read.
            "columns": placeholder(tuple),
            "hold_out": placeholder(
                float
            ),  # share of the training data to validate on where no validation is given
            "hold_out_by": placeholder(
                str
            ),  # column whose values stay together then, as the title of an article
            "balance": "none",  # of the training data's classes: or oversample, undersample
            "balance_power": 1.0,  # how far: 0 leaves the classes as they are, 1 makes them equal
            "tokenizer": placeholder(
                str
            ),  # a folder or file; unset: that of init.weights, or trained on the data
            "tokenizer_kind": "wordpiece",  # or bpe, unigram, t5, word, char, byte
            # Whether a tokenizer that is trained here drops capital letters; char and byte never
            # do.
            "lowercase": True,
            "vocab_size": 8000,
            "batch_size": 32,
            "max_length": 128,
            # Lengths of batches where a row is one text: found in the data ("auto", "auto:6"),
            # given (32, 64, 128), or none.
            "buckets": ("auto",),
            # At a bad record; or skip:N, to leave out up to N of them, each counted and reported.
            "on_error": "fail",
            "workers": 0,  # processes that prepare batches; 0: a thread
            "prefetch": 4,  # batches that are prepared ahead
            # Of waiting for a batch, after which a line says what is being read; 0: never.
            "stall_seconds": 60.0,
        }
    )


def optim() -> ConfigDict:
    """Returns the section of the optimizer."""
    return ConfigDict(
        {
            "name": "adamw",  # or adafactor, lion, muon
            "learning_rate": 1e-4,
            "schedule": "linear",  # or cosine, inverse_sqrt, constant
            "warmup_steps": placeholder(int),
            "warmup_ratio": placeholder(float),
            "end_fraction": 0.0,  # of the rate, that linear and cosine fall to
            # An algorithm's own settings; unset, they have the defaults of `algorithms.py`.
            "b1": placeholder(float),
            "b2": placeholder(float),
            "eps": placeholder(float),
            "beta": placeholder(float),
            "decay_rate": placeholder(float),
            "clipping_threshold": placeholder(float),
            "multiply_by_parameter_scale": placeholder(bool),
            "min_dim_size_to_factor": placeholder(int),
            "weight_decay": 0.01,
            "l1": 0.0,  # penalties in the loss, which no_decay is spared too
            "l2": 0.0,
            "no_decay": ("bias$", "norm/scale$"),
            "clip_norm": placeholder(float),
            "freeze": (),
            "multipliers": open_dict(),  # regular expression -> factor on the learning rate
            "layer_decay": 1.0,
            "ema": placeholder(float),
        }
    )


def mixture(*names: str) -> ConfigDict:
    """Returns the section of a mixture of tasks: for each a part with its own settings, the factor
    of its loss, its split.
    """
    own = {"factor": 1.0, "split": "train"}
    parts = {
        name: ConfigDict({"name": name} | own | fields(tasks.task(name).Task)).lock()
        for name in names
    }
    return ConfigDict({"name": "mixture", "parts": open_dict(**parts)})


def fields(settings: type) -> dict[str, Any]:
    """Returns the fields of a dataclass with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(settings)}


def unset(settings: type) -> dict[str, Any]:
    """Returns the fields of a dataclass as placeholders of their types: what a named size or given
    weights may fill in.
    """
    types = typing.get_type_hints(settings)
    return {field.name: placeholder(types[field.name]) for field in dataclasses.fields(settings)}
