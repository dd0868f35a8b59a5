"""The tables of Hugging Face's names for each family, one file per family; see
`fmjax.hub.reference`."""

from __future__ import annotations

import importlib

from fmjax.config import names
from fmjax.contracts import Config
from fmjax.errors import UserError, nearest
from fmjax.hub.reference import Reference

TABLE = "REFERENCE"
FAMILY = "fmjax_family"  # the key of config.json that names a family outside fmjax


def reference(family: str) -> Reference | None:
    """Returns a family's counterpart in Hugging Face, None if it has none.

    For a family of fmjax, it is in the file of that name here; for one outside fmjax, it is
    `REFERENCE` in the family's module.
    """
    if "." in family:
        found = vars(importlib.import_module(family)).get(TABLE)
        return found if isinstance(found, Reference) else None
    return table_of(family) if family in names.choices(__name__, TABLE) else None


def table_of(family: str) -> Reference:
    """Returns the table of a family of fmjax, which must have one."""
    found: Reference = importlib.import_module(f"{__name__}.{family}").REFERENCE
    return found


def reference_for(config: Config, model_type: str) -> tuple[str, Reference]:
    """Returns the family and its table for the `model_type` of a Hugging Face config.

    The config of a family outside fmjax names its module with dots. Raises UserError for one that
    is not allowed or lacks a table, and like `reference_of`.
    """
    family = config.get(FAMILY)
    if not isinstance(family, str):
        return reference_of(model_type)
    names.extension(family, TABLE, f"config.json: {FAMILY}")
    if (table := reference(family)) is None:
        raise UserError(f'config.json: {FAMILY}="{family}" has no table {TABLE}; define it there')
    return family, next((one for one in table.all() if model_type in one.model_types), table)


def is_known(model_type: str) -> bool:
    """Returns whether fmjax has a family for a `model_type` of Hugging Face."""
    return model_type in known_types()


def reference_of(model_type: str) -> tuple[str, Reference]:
    """Returns the family for a `model_type` of Hugging Face, and its table.

    Raises UserError, listing the supported types, if there is none.
    """
    known = known_types()
    if model_type not in known:
        choices = f"{nearest(model_type, known)}; supported: {', '.join(known)}"
        raise UserError(f'config.json: model_type="{model_type}" is not supported{choices}')
    return known[model_type]


def known_types() -> dict[str, tuple[str, Reference]]:
    """Returns the family and the table of each `model_type` that fmjax supports."""
    tables = {family: table_of(family).all() for family in names.choices(__name__, TABLE)}
    return {
        kind: (family, one)
        for family, all_of in tables.items()
        for one in all_of
        for kind in one.model_types
    }
