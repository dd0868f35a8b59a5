"""The tables that say what Hugging Face calls each family, one file each; see
`fmjax.hub.reference`."""

from __future__ import annotations

import importlib

from fmjax.config import names
from fmjax.contracts import Config
from fmjax.errors import UserError, nearest
from fmjax.hub.reference import Reference

TABLE = "REFERENCE"
FAMILY = "fmjax_family"  # the key of config.json that names a family outside of fmjax


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


def reference_for(config: Config, model_type: str) -> tuple[str, Reference]:
    """Returns the family of a config of Hugging Face and its table, for its `model_type`.

    A model of a family outside of fmjax names it, by its module with dots. Raises UserError for one
    that is not permitted or lacks a table, and as `reference_of` does.
    """
    family = config.get(FAMILY)
    if not isinstance(family, str):
        return reference_of(model_type)
    names.extension(family, TABLE, f"config.json: {FAMILY}")
    if (table := reference(family)) is None:
        raise UserError(f'config.json: {FAMILY}="{family}" has no table {TABLE}; define it there')
    return family, next((one for one in table.all() if model_type in one.model_types), table)


def is_known(model_type: str) -> bool:
    """Returns whether a family of fmjax has a `model_type` of Hugging Face."""
    return model_type in known_types()


def reference_of(model_type: str) -> tuple[str, Reference]:
    """Returns the family of a `model_type` of Hugging Face, and its table.

    Raises UserError listing those that are handled.
    """
    known = known_types()
    if model_type not in known:
        choices = f"{nearest(model_type, known)}; supported: {', '.join(known)}"
        raise UserError(f'config.json: model_type="{model_type}" is not supported{choices}')
    return known[model_type]


def known_types() -> dict[str, tuple[str, Reference]]:
    """Returns the family and the table of each `model_type` that fmjax handles."""
    tables = {family: table_of(family).all() for family in names.choices(__name__, TABLE)}
    return {
        kind: (family, one)
        for family, all_of in tables.items()
        for one in all_of
        for kind in one.model_types
    }
