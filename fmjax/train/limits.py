"""The allowed values of every config key: one table per section, checked before anything slow.

The tables of `model`, `task` and `optim` are next to the definitions of those settings, in
`models/sizes.py`, `tasks/settings.py` and `optim/settings.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fmjax import models, optim, tasks
from fmjax.config.limits import (
    Limit,
    check,
    choice,
    count,
    each,
    either,
    group,
    number,
    text,
    texts,
    truth,
    unique_texts,
)
from fmjax.contracts import Config, Value
from fmjax.data.partitions import Rules, fold_of
from fmjax.data.sources import kinds
from fmjax.data.splits import PART_KEYS
from fmjax.data.storage.remote import check_scheme, is_remote
from fmjax.data.stream import balance, mixing
from fmjax.data.stream.buckets import check_words
from fmjax.data.tokenizers import training
from fmjax.distributed.sharding import resolve_rules
from fmjax.errors import UserError, one_of
from fmjax.models import sizes
from fmjax.randomness import GENERATORS, MOST_SEED

TOKENS = 2**20  # maximum per row
ROWS = 2**24  # maximum per batch
HELD = "a fraction of the training data, or with data.time a number of last records"


def on_error(key: str, value: Value) -> None:
    """Raises UserError unless the value is a policy for bad records."""
    if not re.fullmatch("fail|skip:[0-9]+", str(value)):
        raise UserError(f'{key}="{value}": write fail, or skip:N to skip up to N bad records')


def fold(key: str, value: Value) -> None:
    """Raises UserError unless the value is a fold."""
    fold_of(value)


def source(key: str, value: Value) -> None:
    """Raises UserError unless the value is the name of a kind of source."""
    text(key, value)
    if "." in value:  # outside of fmjax
        kinds.find_kind(value)
    else:
        one_of(key, value, [kinds.AUTO, *kinds.kinds()])


def store(key: str, value: Value) -> None:
    """Raises UserError unless the value is the name of a folder, or the address of one."""
    text(key, value)
    if is_remote(value):
        check_scheme(value)


def lengths(key: str, value: Value) -> None:
    """Raises UserError unless the value is a list of lengths, or of a word that finds them."""
    each(either(text, count(1, TOKENS), words="lengths, such as 32,64, or auto"))(key, value)
    if value:
        check_words([str(word) for word in value])


FILES = either(text, texts, each(either(text, texts, words="")), words="a file, or a list of files")
AXIS = either(
    count(1), count(-1, -1), words="a whole number of devices, or -1 for all that are left"
)

TRAIN: dict[str, Limit] = {
    "steps": count(1, hint="a positive number"),
    "epochs": number(above=0, most=1e6, hint="a positive number"),
    "log_every": count(),
    "eval_every": count(),
    "seed": count(0, MOST_SEED),
    "accumulate": count(1, ROWS),
    "max_nonfinite": count(1),
    "dropout_rng": choice(GENERATORS),
    "early_stopping": group,
}
EARLY_STOPPING: dict[str, Limit] = {
    "metric": text,
    "mode": choice(("max", "min")),
    "patience": count(0, hint="0 means never"),
}
CHECKPOINT: dict[str, Limit] = {
    "every": count(0, hint="0 saves only at the end"),
    "keep": count(1, hint="the newest checkpoint must be kept to continue from; use 1 or more"),
    "best": text,
    "mode": choice(("max", "min")),
}
MESH: dict[str, Limit] = {"axes": each(AXIS), "rules": text, "table": group}
INIT: dict[str, Limit] = {"weights": text, "from": text}
DATA: dict[str, Limit] = {
    "source": source,
    "files": FILES,
    "mixture": group,
    "temperature": number(above=0, most=1e6, hint="1 leaves the weights unchanged"),
    "curriculum": group,
    "name": text,
    "data_dir": text,
    "download": truth,
    "record": text,  # each source checks it
    "columns": unique_texts,
    "hold_out": number(above=0, most=2**16, hint=HELD),
    "hold_out_test": number(above=0, most=2**16, hint=HELD),
    "hold_out_by": text,
    "hold_out_from": texts,
    "time": text,
    "fold": fold,
    "group_by": text,
    "balance": choice(balance.KINDS),
    "balance_power": number(least=0, most=1, hint="0 changes nothing, 1 makes the classes equal"),
    "tokenizer": text,
    "store": store,
    "tokenizer_kind": choice(training.KINDS),
    "lowercase": truth,
    "vocab_size": count(1, 2**24),
    "batch_size": count(1, ROWS),
    "max_length": count(1, TOKENS, hint="in tokens"),
    "buckets": lengths,
    "on_error": on_error,
    "verify": truth,
    "workers": count(0, 1024, hint="0 uses a thread"),
    "prefetch": count(0, 2**16),
    "stall_seconds": number(least=0, hint="0 means never"),
}
SECTIONS: dict[str, dict[str, Limit]] = {
    "train": TRAIN,
    "checkpoint": CHECKPOINT,
    "mesh": MESH,
    "init": INIT,
    "data": DATA,
}


def check_config(config: Config) -> None:
    """Raises UserError, naming the key, if a section is missing or a value is out of range.

    It only reads the config, so mistakes are found before any data is opened.
    """
    for section in ("model", "task", "data", "optim", "train", "checkpoint", "mesh"):
        if not isinstance(config.get(section), Mapping):
            raise UserError(
                f"config.{section}: is missing, or not a group of keys; start from "
                "fmjax.defaults.experiment(MODEL, TASK)"
            )
    for section, limits in SECTIONS.items():
        check(section, config.get(section) or {}, limits)
    stopping = config["train"].get("early_stopping") or {}
    check("train.early_stopping", stopping, EARLY_STOPPING)
    resolve_rules(config["mesh"].get("rules") or "", config["mesh"].get("table"))
    if config["data"].get("mixture"):
        check_mixture(config["data"])
    elif config["data"].get("files"):
        Rules.of(config["data"])
    optim.check_section(config["optim"])
    for section in ("model", "task"):
        text(f"{section}.name", config[section].get("name"))
    tasks.make(config["task"])
    check_model(config["model"])


def check_mixture(data: Config) -> None:
    """Raises UserError, naming the key, for what a source of a mixture cannot be, and for weights
    and a curriculum that do not fit.
    """
    for name in mixing.parts_of(data, PART_KEYS):
        check(f"data.mixture.{name}", data["mixture"][name], DATA)
    weights = {name: share.weight for name, share in mixing.shares(data).items()}
    # Those that follow from sizes, which are not known yet, are above 0.
    mixing.stages(data, {name: 1.0 if one is None else one for name, one in weights.items()})


def check_model(section: Config) -> None:
    """Raises UserError for an unknown family, and for a value that is out of range."""
    family = models.family(section["name"])
    sizes.check_section(family.Settings, section)
    if "size" in section:
        text("model.size", section["size"])
