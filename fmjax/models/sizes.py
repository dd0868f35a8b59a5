"""Builds checked models from a named size and a config's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from fmjax.config import limits
from fmjax.contracts import Model, PyTree, Value
from fmjax.errors import UserError, nearest
from fmjax.layers.heads import HeadTable, Lm, MaskedLm, chosen
from fmjax.layers.kernels import choice
from fmjax.layers.mlp import ACTIVATIONS
from fmjax.layers.stack import REMAT, Layers

DTYPES = ("float32", "bfloat16")

WIDTH, HEADS, TOKENS = 2**20, 2**16, 2**27  # upper limits of settings
RATE = limits.number(least=0, below=1)
# Limits of settings, by their name in any family.
LIMITS: dict[str, limits.Limit] = {
    "width": limits.count(1, WIDTH),
    "layers": limits.count(1, 1000),
    "attention_heads": limits.count(1, HEADS),
    "mlp_width": limits.count(1, WIDTH),
    "vocab_size": limits.count(1, TOKENS),
    "kv_heads": limits.count(0, HEADS),
    "head_width": limits.count(0, WIDTH),
    "embedding_width": limits.count(0, WIDTH),
    "positions": limits.count(0, TOKENS),
    "position_offset": limits.count(0, TOKENS),
    "token_types": limits.count(0, HEADS),
    "context": limits.count(1, TOKENS),
    "window": limits.count(0, TOKENS, hint="0 means no window"),
    "buckets": limits.count(1, HEADS),
    "max_distance": limits.count(1, TOKENS),
    "decoder_layers": limits.count(0, 1000),
    "decoder_attention_heads": limits.count(0, HEADS),
    "decoder_heads": limits.count(1, HEADS),
    "decoder_width": limits.count(1, WIDTH),
    "decoder_mlp_width": limits.count(0, WIDTH),
    "target_vocab_size": limits.count(0, TOKENS),
    "start_id": limits.count(0, TOKENS),
    "end_id": limits.count(0, TOKENS),
    "pad_id": limits.count(-1, TOKENS, hint="-1 means none"),
    "image_size": limits.count(1, 2**14),
    "patch_size": limits.count(1, 2**14),
    "channels": limits.count(1, 2**10),
    "class_tokens": limits.count(0, HEADS),
    "pooler_width": limits.count(0, WIDTH),
    "epsilon": limits.number(above=0, most=1),
    "initializer_range": limits.number(least=0, most=1000),
    "initializer_factor": limits.number(least=0, most=1000),
    "rotary_base": limits.number(above=0),
    "rotary_factor": limits.number(least=1, most=1e6),
    "rotary_low": limits.number(above=0, most=1e6),
    "rotary_high": limits.number(above=0, most=1e6),
    "rotary_context": limits.count(1, TOKENS),
    "activation": limits.choice(ACTIVATIONS),
    "pooler_activation": limits.choice(ACTIVATIONS),
    "dtype": limits.choice(DTYPES),
    "remat": limits.choice(REMAT),
    "attention": limits.choice(choice.NAMES),
    "loss_chunk": limits.count(-1, hint="0 chooses by size, -1 is all rows at once"),
    "stochastic_depth": RATE,
    "dropout": RATE,
    "embedding_dropout": RATE,
    "attention_dropout": RATE,
    "activation_dropout": RATE,
    "classifier_dropout": RATE,
    "span_dropout": RATE,
    "choice_dropout": RATE,
}
# Settings whose 0 means "none" or "same as another", in families where 0 is the default.
MAY_BE_ZERO = ("positions", "head_width", "decoder_mlp_width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a model computes: settings that all families share."""

    stochastic_depth: float = 0.0  # the last layer's rate; the first layer's is 0
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"  # or dots, attention, everything: what layers compute again, see stack.py
    # The kernel: auto (by the machine and the call), or xla, chunked, splash, flash, relative,
    # cudnn, pallas_gpu, ring; see layers/kernels/choice.py
    attention: str = "auto"
    # Rows per device whose logits over the vocabulary the loss computes at once; 0: all, or 1,024
    # where that would take more than 256 MiB; -1: all.
    loss_chunk: int = 0

    def stacked(self, count: int) -> Layers:
        """Returns the settings of a stack of `count` layers."""
        return Layers(count, self.scan_layers, self.remat, self.attention)


class TableModel(Model, Protocol):
    """A model whose heads come from a table."""

    def head_makers(self) -> HeadTable:
        """Returns a factory for each kind of head that the family has."""


SettingsT = TypeVar("SettingsT", bound=Compute)
ModelT = TypeVar("ModelT", bound=TableModel)


def resolve(
    settings: type[SettingsT],
    sizes: Mapping[str, Mapping[str, Value]],
    size: str,
    given: Mapping[str, Value],
) -> SettingsT:
    """Returns `settings(**sizes[size], **given)`; given values override those of the named size.

    Raises UserError for an unknown size or setting, and for a value that is out of range.
    """
    if size not in sizes:
        hint, choices = nearest(size, sizes), ", ".join(sizes)
        raise UserError(f'model.size="{size}" is not known{hint}; choose one of {choices}')
    known = [field.name for field in dataclasses.fields(settings)]
    for name in given:
        if name not in known:
            raise UserError(
                f"model.{name} is not a setting{nearest(name, known)}; choose from "
                f"{', '.join(known)}"
            )
    check_section(settings, {**sizes[size], **given})
    return settings(**{**sizes[size], **given})


def check_section(settings: type, given: Mapping[str, Value]) -> None:
    """Raises UserError, naming the key, if a value is not of its field's type or out of range.

    Keys that are not fields of `settings` pass.
    """
    limits.check("model", given, limits.of_fields(settings))
    limits.check("model", given, LIMITS)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name in MAY_BE_ZERO:
        if given.get(name) == 0 and defaults.get(name) != 0:
            raise UserError(f"model.{name}=0: must be at least 1")


def check_divides(width_name: str, width: int, heads_name: str, heads: int) -> None:
    """Raises UserError if the number of attention heads does not divide the width. The names are
    those of the settings."""
    if width % heads:
        sizes = f"model.{width_name}={width} is not divisible by model.{heads_name}={heads}"
        raise UserError(f"{sizes}; change one")


def checked(model: ModelT) -> ModelT:
    """Returns the model. Raises UserError if it lacks a head that the task needs."""
    makers = model.head_makers()
    for kind in model.heads:
        if kind not in makers:
            known = ", ".join(makers)
            raise UserError(
                f'the task needs a head "{kind}", which this model lacks; it has {known}'
            )
    return model


def with_chunks(
    model: PyTree, kinds: Iterable[str], rows: Mapping[str, int] | None = None
) -> PyTree:
    """Returns a model of the same parameters for a loss: its heads of these kinds, if they are over
    a vocabulary, may return `VocabularyLogits`.

    `rows` are those of a chunk by kind; by default `model.loss_chunk` decides. An extension's own
    heads stay as they are.
    """
    found = set(kinds) & set(model.heads)
    if not found or not isinstance(model.settings, Compute):
        return model
    makers = chosen(model.head_makers(), model.heads)
    heads = dict(model.heads)
    for kind in found:
        if isinstance(makers[kind](parent=None), Lm | MaskedLm):
            chunk = (rows or {}).get(kind, model.settings.loss_chunk)
            heads[kind] = {**heads[kind], "chunk": chunk}
    return model.clone(heads=heads)
