"""Model families, one file each, found by the file's name or by the `model_type`s of the reference that they declare."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType

from fmjax.config import names
from fmjax.errors import UserError, nearest


@functools.cache
def families() -> dict[str, ModuleType]:
    """Returns the modules of this package that build models, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "MODEL_TYPES")}


def family(name: str) -> ModuleType:
    """Returns the family of that name. Raises UserError listing those there are, and as `names.extension` does."""
    if "." in name:
        return names.extension(name, "build", "model.name")
    known = families()
    if name not in known:
        raise UserError(f'model.name="{name}": no such model{nearest(name, known)}; choose one of {", ".join(known)}')
    return known[name]


def family_of(model_type: str) -> ModuleType:
    """Returns the family of the reference's `model_type`. Raises UserError listing those that are handled."""
    known = {kind: module for module in families().values() for kind in module.MODEL_TYPES}
    if model_type not in known:
        choices = f"{nearest(model_type, known)}; those that are: {', '.join(known)}"
        raise UserError(f'config.json: model_type="{model_type}" is not handled{choices}')
    return known[model_type]
