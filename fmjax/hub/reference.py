"""Hugging Face's names for a family's classes, settings and weights, in one table, `Reference`.

The table of a family is `REFERENCE` in `fmjax/hub/families/<family>.py`. A setting of the reference
may be a path with dots, "text_config.hidden_size", which is read from and written to the section of
that name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np

from fmjax.contracts import Config, Heads, HostBatch, Value
from fmjax.errors import UserError, nearest
from fmjax.hub.rules import Names, Rules
from fmjax.hub.tensors import Tensor
from fmjax.layers.mlp import ACTIVATIONS

# The reference's setting -> ours, and the reference's default, which also determines the kind of
# value; None means any number or none.
Table: TypeAlias = Mapping[str, tuple[str, Value]]
# The kind of head -> the name of its output, or several names that the last axis is split into.
Outputs: TypeAlias = Mapping[str, str | tuple[str, ...]]

# Kinds of heads that have a number of classes.
CLASSED = ("classify", "classify_distilled", "tag")

# Keys of config.json that do not change what a model computes: bookkeeping, names, and settings of
# text generation.
NEUTRAL = (
    *(
        "_attn_implementation_autoset",
        "_class_name",
        "_commit_hash",
        "_diffusers_version",
        "_name_or_path",
    ),
    *(
        "_num_labels",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
    ),
    *(
        "cls_token_id",
        "dtype",
        "eos_token_id",
        "eos_token_ids",
        "finetuning_task",
        "fmjax_family",
        "fmjax_rows",
        "gradient_checkpointing",
    ),
    *(
        "id2label",
        "label2id",
        "language",
        "mask_token_id",
        "model_type",
        "name_or_path",
        "num_labels",
    ),
    *("output_attentions", "output_hidden_states", "output_past", "pad_token_id", "problem_type"),
    *("return_dict", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype"),
    *("torchscript", "transformers_version", "unk_token_id", "use_cache"),
    *(
        "do_sample",
        "early_stopping",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
    ),
    *("num_beams", "num_return_sequences", "repetition_penalty", "temperature", "top_k", "top_p"),
    *("renormalize_logits", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id"),
)


def unchanged(config: Config) -> Config:
    """Returns the config unchanged."""
    return config


def nothing_else(config: Config, settings: Config) -> Config:
    """Returns the settings unchanged."""
    return settings


def only_padding(settings: Value, pad_id: int | None) -> Config:
    """Returns the padding id, 0 if there is none."""
    return {"pad_token_id": pad_id or 0}


def same_batch(arrays: HostBatch, settings: Value) -> dict[str, np.ndarray]:
    """Returns the arrays unchanged: the model has the reference's inputs."""
    return dict(arrays)


def anything(name: str, tensor: Tensor) -> None:
    """Accepts any buffer."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A family's counterpart in Hugging Face: names of classes, settings and weights, and their
    conversion in both directions."""

    model_types: tuple[str, ...]  # its names in config.json; the first is written
    architectures: Mapping[
        str, Outputs
    ]  # class -> its heads and their outputs; the bare model first
    inputs: tuple[str, ...]  # the first has to be given
    settings: Table
    weights: Rules
    prefix: str = ""  # prefix of the names of the body's weights, except in a bare model
    # Stored copies of a shared weight -> ours; if there are several, the first that the model has.
    tied: Mapping[str, Names] = dataclasses.field(default_factory=dict)
    # Name endings of stored tensors that are not parameters -> their check.
    buffers: Mapping[str, Callable[[str, Tensor], None]] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Value] = dataclasses.field(
        default_factory=dict
    )  # settings that are supported only with this value
    unread: tuple[str, ...] = ()  # settings that have no effect here
    constants: Mapping[str, Value] = dataclasses.field(
        default_factory=dict
    )  # our settings that have a fixed value in the reference
    # Converts a config to the form that the tables describe
    prepare: Callable[[Config], Config] = unchanged
    # (config, our settings) -> all of our settings
    complete: Callable[[Config, Config], Config] = nothing_else
    # (our settings, padding id) -> the remaining settings of the config
    express: Callable[[Value, int | None], Config] = only_padding
    # (inputs, our settings) -> the model's inputs
    batch: Callable[[HostBatch, Value], dict[str, np.ndarray]] = same_batch
    # Whether generation adds the start token to decoder prompts that do not begin with it.
    starts_prompts: bool = True
    variants: tuple[Reference, ...] = ()  # other configs of the same family
    type_key: str = "model_type"  # the key of config.json that has the type

    def all(self) -> tuple[Reference, ...]:
        """Returns the reference and its variants."""
        return (self, *self.variants)

    def classes(self) -> dict[str, Outputs]:
        """Returns the classes of the reference and its variants, with the outputs of each."""
        return {name: outputs for one in self.all() for name, outputs in one.architectures.items()}

    def architecture(self, config: Config) -> str:
        """Returns the reference's class, the bare model if none is named.

        Raises UserError if it is not supported.
        """
        known = self.architectures
        name: str = (config.get("architectures") or list(known))[0]
        if name not in known:
            choices = f"{nearest(name, known)}; supported: {', '.join(known)}"
            raise UserError(f'config.json: architecture "{name}" is not supported{choices}')
        return name

    def heads(self, config: Config) -> dict[str, dict[str, int]]:
        """Returns the heads of a config's architecture, with their sizes."""
        kinds = self.architectures[self.architecture(config)]
        return {
            kind: {"classes": len(class_names(config))} if kind in CLASSED else {} for kind in kinds
        }

    def outputs(self, heads: Heads) -> Outputs:
        """Returns the names of the outputs of a model with these heads, whether or not the
        reference has such a model."""
        known = (outputs for outputs in self.classes().values() if set(outputs) == set(heads))
        return next(known, plain_outputs(heads))

    def exported(self, heads: Heads, model_type: str = "") -> tuple[Reference, str]:
        """Returns the config and class for a model with these heads, those of `model_type` if
        possible.

        Raises UserError if the reference has none.
        """
        for one in sorted(self.all(), key=lambda one: model_type not in one.model_types):
            for name, outputs in one.architectures.items():
                if set(outputs) == set(heads):
                    return one, name
        known = ", ".join(self.classes())
        raise UserError(
            f"the reference has no model with the heads {', '.join(heads)}; it has {known}"
        )

    def read_settings(self, config: Config) -> Config:
        """Returns the settings for `build` from a config.

        Raises UserError, naming each setting that is not supported.
        """
        settings = read_settings(self.prepare(config), self.settings, self.fixed, self.unread)
        return self.complete(config, settings | dict(self.constants))

    def write_config(self, settings: Value, pad_id: int | None = None) -> Config:
        """Returns the config for our settings.

        Raises UserError, naming a setting that the reference cannot express.
        """
        config = write_settings(settings, self.settings, self.constants)
        return config | {self.type_key: self.model_types[0]} | self.express(settings, pad_id)


def plain_outputs(heads: Heads) -> Outputs:
    """Returns the names of the heads' outputs without a reference: logits, or the kinds of several
    heads."""
    return {kind: "logits" if len(heads) == 1 else kind for kind in heads}


def class_names(config: Config) -> tuple[str, ...]:
    """Returns the names of a classifier's classes, in order.

    Raises UserError if `id2label` does not number them from 0.
    """
    names = config.get("id2label")
    if names is None:
        return tuple(f"LABEL_{index}" for index in range(config.get("num_labels") or 2))
    if not isinstance(names, dict) or set(names) != set(map(str, range(len(names)))):
        raise UserError(
            f'config.json: id2label={json.dumps(names)} does not number the classes "0", "1", '
            "...; correct it"
        )
    return tuple(str(names[str(index)]) for index in range(len(names)))


def read_settings(
    config: Config, table: Table, fixed: Mapping[str, Value], unread: Iterable[str]
) -> Config:
    """Returns our settings for a config of the reference; missing ones have the reference's
    default.

    Raises UserError, naming every key whose value differs from the one in `fixed`, and every
    unknown key that is set, since it may change what the model computes. `unread` and NEUTRAL are
    known not to. Activations must be known.
    """
    known = {*table, *fixed, *unread}
    values = dict(flat(config, sections(known)))
    refused = [
        shown(key, value)
        for key, value in values.items()
        if key not in known and key.rpartition(".")[2] not in NEUTRAL and value
    ]
    refused += other_values(values, fixed)
    if refused:
        raise UserError(
            f"config.json: not supported: {', '.join(refused)}; "
            "use another model, or remove what has no effect"
        )
    settings = {}
    for key, (name, default) in table.items():
        value: Value = values.get(key, default)
        settings[name] = value
        if not fits(value, default):
            raise UserError(
                f"config.json: {shown(key, value)} must be a value like {json.dumps(default)}; "
                "correct it"
            )
        if name.endswith("activation") and value not in ACTIVATIONS:
            choices = f"{nearest(value, ACTIVATIONS)}; supported: {', '.join(ACTIVATIONS)}"
            raise UserError(f"config.json: {shown(key, value)} is not supported{choices}")
    return settings


def shown(key: str, value: Value) -> str:
    """Returns a setting in the form used in messages."""
    return f"{key}={json.dumps(value)}"


def other_values(values: Mapping[str, Value], fixed: Mapping[str, Value]) -> list[str]:
    """Returns the fixed settings with a different value, for messages; None counts as missing."""
    return [
        f"{shown(key, values[key])} (only {json.dumps(value)} is)"
        for key, value in fixed.items()
        if values.get(key) not in (None, value)
    ]


def sections(paths: Iterable[str]) -> frozenset[str]:
    """Returns the sections in paths: "text_config" of "text_config.hidden_size"."""
    parts = [path.split(".") for path in paths]
    return frozenset(".".join(names[:depth]) for names in parts for depth in range(1, len(names)))


def flat(config: Config, inside: Collection[str], above: str = "") -> Iterator[tuple[str, Value]]:
    """Yields the settings of a config by path, including those in the sections `inside`.

    A null section counts as missing.

    Raises UserError if one of them is not an object.
    """
    for name, value in config.items():
        path = above + name
        if path not in inside:
            yield path, value
        elif isinstance(value, dict):
            yield from flat(value, inside, f"{path}.")
        elif value is not None:
            raise UserError(
                f"config.json: {shown(path, value)} must be an object; correct the config"
            )


def fits(value: Value, default: Value) -> bool:
    """Returns whether a value is of its default's kind. Counts are positive, other numbers not
    negative."""
    if default is None:
        return value is None or fits(value, 0.0)
    if isinstance(default, float):
        return type(value) in (int, float) and value >= 0
    return type(value) is type(default) and (type(value) is not int or value >= 1)


def write_settings(settings: Value, table: Table, constants: Mapping[str, Value]) -> Config:
    """Returns the config of the reference for our settings (a dataclass); paths become sections.

    Raises UserError for a setting that must have the value in `constants` in the reference.
    """
    require(settings, constants)
    config: Config = {}
    for path, (name, _) in table.items():
        *parents, key = path.split(".")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = getattr(settings, name)
    return config


def require(settings: Value, constants: Mapping[str, Value]) -> None:
    """Raises UserError if one of our settings differs from the only value that the reference
    supports."""
    for name, value in constants.items():
        if (own := getattr(settings, name)) != value:
            raise UserError(
                f"model.{name}={own} has no counterpart in Hugging Face, where it is {value}; "
                f"train with model.{name}={value}"
            )
