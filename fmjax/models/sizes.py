"""From a named size and a config's settings to a checked model; every mistake is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol, TypeVar

from fmjax.contracts import Model, Value
from fmjax.errors import UserError, nearest
from fmjax.layers.heads import HeadTable
from fmjax.layers.stack import Layers

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a model computes: the settings that every family has in common."""

    stochastic_depth: float = 0.0  # the last layer's rate; the first layer's is 0
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"  # or dots, everything: what the backward pass recomputes

    def stacked(self, count: int) -> Layers:
        """Returns the settings of a stack of so many layers."""
        return Layers(count, self.scan_layers, self.remat)


class TableModel(Model, Protocol):
    """A model whose heads come from a table."""

    def head_makers(self) -> HeadTable:
        """Returns the builder of each kind of head that the family has."""


SettingsT = TypeVar("SettingsT", bound=Compute)
ModelT = TypeVar("ModelT", bound=TableModel)


def resolve(
    settings: type[SettingsT],
    sizes: Mapping[str, Mapping[str, Value]],
    size: str,
    given: Mapping[str, Value],
) -> SettingsT:
    """Returns `settings(**sizes[size], **given)`; given values override those of the named size.

    Raises UserError for an unknown size or setting.
    """
    if size not in sizes:
        hint, choices = nearest(size, sizes), ", ".join(sizes)
        raise UserError(f'model.size="{size}" is not known{hint}; choose one of {choices}')
    known = [field.name for field in dataclasses.fields(settings)]
    for name in given:
        if name not in known:
            raise UserError(
                f"model.{name} is not a setting{nearest(name, known)}; there are {', '.join(known)}"
            )
    return settings(**{**sizes[size], **given})


def check_divides(width_name: str, width: int, heads_name: str, heads: int) -> None:
    """Raises UserError if attention heads do not divide the width that they share; the names are
    those of the settings."""
    if width % heads:
        sizes = f"model.{width_name}={width} is not divisible by model.{heads_name}={heads}"
        raise UserError(f"{sizes}; change one")


def checked(model: ModelT) -> ModelT:
    """Returns the model. Raises UserError if its compute type is unknown, stochastic depth leaves
    no layer, or it lacks a head that the task needs."""
    settings: Compute = model.settings
    if settings.dtype not in DTYPES:
        raise UserError(
            f'model.dtype="{settings.dtype}" is not supported; choose one of {", ".join(DTYPES)}'
        )
    if not 0 <= settings.stochastic_depth < 1:
        rate = f"model.stochastic_depth={settings.stochastic_depth}"
        raise UserError(f"{rate}: must be at least 0 and less than 1")
    makers = model.head_makers()
    for kind in model.heads:
        if kind not in makers:
            known = ", ".join(makers)
            raise UserError(
                f'the task needs a head "{kind}", which this model lacks; it has {known}'
            )
    return model
