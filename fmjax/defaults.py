"""The config that every experiment starts from: all keys with their defaults.

A config file calls `experiment(model, task)` and changes some keys. The `model` and `task` sections
have the fields of the family's `Settings` and the task's `Task`, so each key is declared once,
where it is used. Keys without a value are placeholders, which are left out unless set.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fmjax import models, tasks
from fmjax.config import open_dict


def experiment(model: str, task: str, *more: str) -> ConfigDict:
    """Returns the default config of a model family and a task. Several tasks form a mixture, the
    first being the main one.
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
            "steps": placeholder(int),  # set either steps or epochs
            "epochs": placeholder(float),
            "log_every": 10,
            "eval_every": 0,  # 0: only at the end
            "seed": 0,
            "accumulate": 1,  # parts that a batch is split into; their gradients are added up
            "max_nonfinite": 10,  # steps in a row without a finite loss that end the run
            # "hash" is faster on CPUs. "rbg" is faster on TPUs, but differs between kinds of
            # devices.
            "dropout_rng": "threefry2x32",
            # Ends the run when the metric has not improved in `patience` evaluations; 0: never.
            # `mode`: see below.
            "early_stopping": {"metric": "loss", "mode": placeholder(str), "patience": 0},
        }
    )
    # `best`: a metric of the task; its best step is kept in addition to the last `keep`, and
    # preferred by evaluation. `mode`, max or min, is only needed for metrics of your own tasks.
    config.checkpoint = ConfigDict(
        {"every": 1000, "keep": 2, "best": placeholder(str), "mode": placeholder(str)}
    )
    # The rules are dp, fsdp, fsdp_tp, fsdp_context or fsdp_expert; or your own `table` of logical
    # axes, {"mlp": "tensor", ...}.
    config.mesh = ConfigDict({"axes": open_dict(data=-1), "rules": "dp", "table": open_dict()})
    # A run directory or a Hugging Face folder; `from` is the old name of `weights`.
    config.init = ConfigDict({"weights": placeholder(str), "from": placeholder(str)})
    return config.lock()


def splits() -> dict[str, Any]:
    """Returns the keys of the data section that make splits of the training data."""
    return {
        # Share of the training data to validate on where no validation is given; with `time`,
        # the latest records, or a number of last ones, for each value of `hold_out_by` if set.
        "hold_out": placeholder(float),
        "hold_out_test": placeholder(float),  # the same for the test data
        # Column whose values stay together then, as the title of an article.
        "hold_out_by": placeholder(str),
        # Time at which the validation data begin, and that of the test data, if wanted.
        "hold_out_from": placeholder(tuple),
        "time": placeholder(str),  # column of times: numbers or ISO dates
        # FOLD/FOLDS, such as 0/5, of the values of `hold_out_by` or of the records; the fold
        # is validated on, in place of `hold_out`.
        "fold": placeholder(str),
        # Column, as of users: a record has all values of a group in lists, in time order.
        "group_by": placeholder(str),
    }


def data() -> ConfigDict:
    """Returns the data section: location of the data, tokenization, batching."""
    return ConfigDict(
        {
            # Inferred from the file extension; or one of fmjax.data.sources, such as text, csv,
            # parquet or tfds.
            "source": "auto",
            # split -> file, list, glob or folder, local or at gs://, or a part, "a.txt[:90%]";
            # unset: python_docs
            "files": open_dict(),
            # Several sources in place of files.train: name -> files (a path, or splits), weight,
            # epochs, cap, and any other key about sources: {"books": {"files": "books/*.txt",
            # "weight": 0.7}, "wiki": {...}}; without weights, by size.
            "mixture": open_dict(),
            # Shares are weights ** (1 / temperature); above 1, small sources count for more.
            "temperature": 1.0,
            # Step -> weights after that step, {"1000": {"wiki": 0.5}}; other weights do not change.
            "curriculum": open_dict(),
            "name": placeholder(str),  # of a data set of TFDS or the Hub, such as glue/sst2
            "data_dir": placeholder(str),
            "download": False,  # whether TFDS may download missing data sets
            # The record of text files: paragraph, line or file; of json, the list of the records.
            "record": placeholder(str),
            # Column names of csv and tsv files without a header, and of parallel files; for Parquet
            # and Arrow, the columns to read.
            "columns": placeholder(tuple),
            **splits(),
            "balance": "none",  # of the training data's classes: or oversample, undersample
            "balance_power": 1.0,  # how far: 0 leaves the classes as they are, 1 makes them equal
            "tokenizer": placeholder(
                str
            ),  # a folder or file; unset: that of init.weights, or trained on the data
            # The folder of token stores, such as a local SSD or a folder that all hosts share, or
            # an address, where stores are read but not built; unset: the cache ($FMJAX_CACHE).
            "store": placeholder(str),
            "tokenizer_kind": "wordpiece",  # or bpe, unigram, t5, word, char, byte
            # Whether a tokenizer trained here lowercases; char and byte never do.
            "lowercase": True,
            "vocab_size": 8000,
            "batch_size": 32,
            "max_length": 128,
            # Lengths of batches whose rows are single texts: inferred from the data ("auto",
            # "auto:6"), given (32, 64, 128), or none.
            "buckets": ("auto",),
            # fail, or skip:N to skip up to N bad records, each counted and
            # reported.
            "on_error": "fail",
            # Whether to read all data again and compare its digests, instead of trusting those that
            # are remembered.
            "verify": False,
            "workers": 0,  # processes that prepare batches; 0: a thread
            "prefetch": 4,  # number of batches to prepare in advance
            # Seconds of waiting for a batch after which a line says what is being read; 0: never.
            "stall_seconds": 60.0,
        }
    )


def optim() -> ConfigDict:
    """Returns the optimizer section."""
    return ConfigDict(
        {
            "name": "adamw",  # or adafactor, lion, muon
            "learning_rate": 1e-4,
            "schedule": "linear",  # or cosine, inverse_sqrt, constant
            "warmup_steps": placeholder(int),
            "warmup_ratio": placeholder(float),
            "end_fraction": 0.0,  # fraction of the peak rate at the end of linear and cosine
            # An algorithm's own settings; their defaults are in `algorithms.py`.
            "b1": placeholder(float),
            "b2": placeholder(float),
            "eps": placeholder(float),
            "beta": placeholder(float),
            "decay_rate": placeholder(float),
            "clipping_threshold": placeholder(float),
            "multiply_by_parameter_scale": placeholder(bool),
            "min_dim_size_to_factor": placeholder(int),
            "weight_decay": 0.01,
            "l1": 0.0,  # penalties in the loss; no_decay exempts from them, too
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
    """Returns the section of a mixture of tasks. Each task is a part with its own settings, the
    factor of its loss, and its split.
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
    """Returns the fields of a dataclass as typed placeholders, which a named size or given weights
    may fill in.
    """
    hints = typing.get_type_hints(settings)
    fields = dataclasses.fields(settings)
    return {field.name: placeholder(without_none(hints[field.name])) for field in fields}


def without_none(kind: Any) -> Any:
    """Returns the type of the values of a field that may be None: float for float | None."""
    parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return parts[0] if isinstance(kind, types.UnionType) and len(parts) == 1 else kind
