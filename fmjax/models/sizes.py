"""From a named size and a config's settings to a model, with every mistake named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fmjax.errors import UserError, nearest

DTYPES = ("float32", "bfloat16")


def resolve(settings: Any, sizes: Mapping[str, Mapping[str, int]], size: str, given: Mapping[str, Any]) -> Any:
    """Returns `settings(**sizes[size], **given)`, the given values winning over those of the named size.

    Raises UserError for an unknown size or setting, or a value that is not of its field's type.
    """
    if size not in sizes:
        raise UserError(f'model.size="{size}" is not known{nearest(size, sizes)}; choose one of {", ".join(sizes)}')
    known = [field.name for field in dataclasses.fields(settings)]
    for name in given:
        if name not in known:
            raise UserError(f"model.{name} is not a setting{nearest(name, known)}; there are {', '.join(known)}")
    return settings(**{**sizes[size], **given})


def checked(model: Any) -> Any:
    """Returns the model. Raises UserError if its compute type is unknown, its heads do not divide its width, stochastic depth
    leaves no layer, or it lacks a head that the task needs."""
    settings = model.settings
    if settings.dtype not in DTYPES:
        raise UserError(f'model.dtype="{settings.dtype}" is not supported; choose one of {", ".join(DTYPES)}')
    # Where the width of heads is a setting of its own, they need not add up to the model's.
    if not getattr(settings, "head_width", 0) and settings.width % settings.attention_heads:
        raise UserError(
            f"model.width={settings.width} does not divide over model.attention_heads={settings.attention_heads}; change one"
        )
    if not 0 <= getattr(settings, "stochastic_depth", 0.0) < 1:
        raise UserError(f"model.stochastic_depth={settings.stochastic_depth}: must be at least 0 and less than 1")
    makers = model.head_makers()
    for kind in model.heads:
        if kind not in makers:
            raise UserError(f'the task needs a head "{kind}", which this model lacks; it has {", ".join(makers)}')
    return model
