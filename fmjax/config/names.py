"""Finds modules by the names in a config: a family, a task, a source, a kind of column.

A plain name is a file of fmjax's own folder. A name with a dot is a module outside fmjax, such as
"my_models.toy": its package must be listed in the environment variable FMJAX_EXTENSIONS. Otherwise
a stored config, which may come from someone else, could import any module."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from types import ModuleType

from fmjax.errors import UserError, nearest, one_line

EXTENSIONS = "FMJAX_EXTENSIONS"


@functools.cache
def choices(package: str, attribute: str) -> tuple[str, ...]:
    """Returns the modules of a package of fmjax that have the attribute, sorted. Other modules
    contain shared code.
    """
    names = names_in(package)
    return tuple(
        name for name in names if hasattr(importlib.import_module(f"{package}.{name}"), attribute)
    )


def names_in(package: str) -> list[str]:
    """Returns the names of the modules of a package of fmjax, sorted."""
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path))


def find(package: str, name: str, attribute: str, key: str, what: str) -> ModuleType:
    """Returns the module that the config key `key` names, which has the attribute; `what` describes
    it in errors.

    Raises UserError, listing the choices, if there is none, and for a module outside fmjax that is
    not allowed."""
    if "." in name:
        return extension(name, attribute, key)
    # Others are only imported for a message: what some of them import takes seconds.
    if name in names_in(package):
        module = importlib.import_module(f"{package}.{name}")
        if hasattr(module, attribute):
            return module
    known = choices(package, attribute)
    raise UserError(
        f'{key}="{name}": no such {what}{nearest(name, known)}; choose one of {", ".join(known)}'
    )


def extension(name: str, attribute: str, key: str) -> ModuleType:
    """Returns a module outside fmjax. Raises UserError if it is not allowed, missing, or lacks the
    attribute.
    """
    top = name.partition(".")[0]
    permitted = {word.strip() for word in os.environ.get(EXTENSIONS, "").split(",")} - {""}
    if top not in permitted:
        raise UserError(
            f'{key}="{name}" names a module outside fmjax; if you trust it, allow its package: '
            f"export {EXTENSIONS}={top}"
        )
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise UserError(
            f'{key}="{name}": cannot be imported ({type(error).__name__}: {one_line(error)}); fix '
            "it"
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f'{key}="{name}": the module has no `{attribute}`; define it there')
    return module
