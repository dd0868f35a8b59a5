"""Model families, one file per family, found by the file's name. Any module with `build` is a
family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fmjax.config import names
from fmjax.contracts import Config, HostBatch, PyTree
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError

MAKER = "build"
# Optional attributes of a module: their name there -> the field of Family.
OPTIONAL = {
    "INPUTS": "inputs",
    "checked_batch": "checked_batch",
    "settings_from_tokenizer": "settings_from_tokenizer",
    "fit_params": "fit_params",
    "SIZES": "sizes",
}


def unchecked(arrays: HostBatch, settings: Any) -> dict[str, np.ndarray]:
    """Returns the arrays unchanged."""
    return dict(arrays)


def no_settings(tokenizer: Tokenizer) -> Config:
    """Returns no settings."""
    return {}


def same_params(params: PyTree, settings: Any) -> PyTree:
    """Returns the parameters unchanged."""
    return params


@dataclasses.dataclass(frozen=True)
class Family:
    """The definitions in a family's module; all but `build` and `Settings` are optional there."""

    name: str  # the value of `model.name`
    # (heads=, size=, **settings) -> a Model that is a Linen module; raises UserError for
    # incompatible arguments
    build: Callable[..., Any]
    Settings: type[Any]  # a frozen dataclass
    inputs: tuple[str, ...] = ()  # what users may give; the first has to be there; empty: anything
    # (inputs, settings) -> a batch whose ids and shapes are checked; raises UserError. On the
    # device, a wrong id or shape would give a wrong answer, not an error.
    checked_batch: Callable[[HostBatch, Any], dict[str, np.ndarray]] = unchecked
    # Settings of a new model that its tokenizer determines.
    settings_from_tokenizer: Callable[[Tokenizer], Config] = no_settings
    # (parameters, settings) -> parameters for these settings, such as another image size.
    fit_params: Callable[[PyTree, Any], PyTree] = same_params
    # The values of `model.size`, with the settings of each.
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def family(name: str) -> Family:
    """Returns the family named `name`.

    Raises UserError, listing the families, if there is none, and like `names.extension`.
    """
    module = vars(names.find(__name__, name, MAKER, "model.name", "model"))
    if "Settings" not in module:
        raise UserError(f'model.name="{name}": the module has no `Settings`; define it there')
    given = {field: module[word] for word, field in OPTIONAL.items() if word in module}
    return Family(name, module[MAKER], module["Settings"], **given)


def families() -> dict[str, Family]:
    """Returns the families of fmjax by name."""
    return {name: family(name) for name in names.choices(__name__, MAKER)}
