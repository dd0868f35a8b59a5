"""The tables that say what Hugging Face calls each family, one file each; see
`fmjax.hub.reference`."""

from __future__ import annotations

import importlib

from fmjax.config import names
from fmjax.errors import UserError, nearest
from fmjax.hub.reference import Reference

TABLE = "REFERENCE"


def reference(family: str) -> Reference | None:
    """Returns the counterpart of a family in Hugging Face, None if it has none.

    A family of fmjax has it in the file of its name here, one outside of fmjax as `REFERENCE` in
    its own module.
    """
    if "." in family:
        found = vars(importlib.import_module(family)).get(TABLE)
        return found if isinstance(found, Reference) else None
    return table_of(family) if family in names.choices(__name__, TABLE) else None


def table_of(family: str) -> Reference:
    """Returns the table of a family of fmjax that has one."""
    found: Reference = importlib.import_module(f"{__name__}.{family}").REFERENCE
    return found


def reference_of(model_type: str) -> tuple[str, Reference]:
    """Returns the family of a `model_type` of Hugging Face, and its table.

    Raises UserError listing those that are handled.
    """
    tables = {family: table_of(family).all() for family in names.choices(__name__, TABLE)}
    known = {
        kind: (family, one)
        for family, all_of in tables.items()
        for one in all_of
        for kind in one.model_types
    }
    if model_type not in known:
        choices = f"{nearest(model_type, known)}; those that are: {', '.join(known)}"
        raise UserError(f'config.json: model_type="{model_type}" is not handled{choices}')
    return known[model_type]
