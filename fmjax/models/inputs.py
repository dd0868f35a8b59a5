"""Checks inputs on the host, since a wrong id or shape would give a wrong answer on the device, not
an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmjax.contracts import HostBatch
from fmjax.errors import UserError, nearest

# Inputs that belong to tokens; a family checks the shapes of other inputs itself.
TOKENS = (
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"),
    *("decoder_input_ids", "decoder_attention_mask", "decoder_position_ids"),
)


class Table(NamedTuple):
    """A table indexed by ids: its name, the number of rows from id 0 on, and of rows before it."""

    name: str
    rows: int
    before: int = 0


def checked_inputs(
    arrays: Mapping[str, Any], known: Sequence[str], axes: Sequence[str] = ("rows", "tokens")
) -> dict[str, np.ndarray]:
    """Returns the inputs as arrays; those of TOKENS are [B,L], whole numbers.

    `axes` are those of the tokens; for multiple choice: rows, choices, tokens. The first of the
    `known` names is required; if none is known, any name is allowed. Raises UserError for an
    unknown name, a wrong type, or different shapes for the same tokens.
    """
    for name in arrays:
        if known and name not in known:
            choices = f"{nearest(name, known)}; it takes {', '.join(known)}"
            raise UserError(f'"{name}" is not an input of this model{choices}')
    if known and known[0] not in arrays:
        also = f", and any of {', '.join(known[1:])}" if known[1:] else ""
        raise UserError(f"{known[0]} is missing; pass it{also}")
    inputs = {}
    for name, value in arrays.items():
        try:
            inputs[name] = np.asarray(value)
        except ValueError:
            raise UserError(
                f"{name}: its rows differ in length; pad them, and mask the padding with "
                "attention_mask"
            ) from None
        kinds = "biuf" if name.endswith("attention_mask") else "iu"
        if name in TOKENS and inputs[name].dtype.kind not in kinds:
            raise UserError(
                f"{name}: holds {inputs[name].dtype}, not whole numbers; use int32 or int64"
            )
    for name in inputs:
        if name in TOKENS:
            check_shape(name, inputs, axes)
    return inputs


def check_shape(name: str, inputs: Mapping[str, np.ndarray], axes: Sequence[str]) -> None:
    """Raises UserError if an array does not have the shape of the tokens that it belongs to, or
    those lack one of the axes."""
    target = name == "labels" or name.startswith("decoder_")
    main = "decoder_input_ids" if target else "input_ids"
    if target and main not in inputs and "labels" in inputs:
        main = "labels"
    if main not in inputs:
        raise UserError(f"{name} needs {main}, which is missing; pass both")
    shape = inputs[main].shape
    if len(shape) != len(axes) or 0 in shape:
        raise UserError(
            f"{main}: has shape {shape}; pass [{', '.join(axes)}], at least one of each"
        )
    sources = (other for other in inputs if other != "labels" and not other.startswith("decoder_"))
    source = next(sources, main)
    if inputs[source].shape[:1] != shape[:1]:
        raise UserError(
            f"{main}: has {shape[0]} rows, but {source} has shape {inputs[source].shape}; "
            "they must be equal"
        )
    # All rows may share one row of positions.
    if inputs[name].shape not in (shape, (1, shape[-1]) if name.endswith("position_ids") else ()):
        raise UserError(
            f"{name}: has shape {inputs[name].shape}, but {main} {shape}; they must be equal"
        )


def check_range(name: str, ids: np.ndarray, table: str, rows: int) -> None:
    """Raises UserError if an id is not a row of its table."""
    wrong = ids[(ids < 0) | (ids >= rows)]
    if wrong.size:
        raise UserError(
            f"{name}: {wrong[0]} is out of range; "
            f"the {table} has {rows} entries, 0 to {rows - 1}; correct the ids"
        )


def checked_ids(arrays: HostBatch, tables: Mapping[str, Table]) -> dict[str, np.ndarray]:
    """Returns a batch of ids, which are rows of tables, as int32, and of masks, as bool.

    Raises UserError like `check_range`.
    """
    batch = {}
    for name, array in arrays.items():
        if name in tables:
            table = tables[name]
            moved = array.astype(np.int64) + table.before if table.before else array
            check_range(name, moved, table.name, table.rows + table.before)
        # The range is checked before the conversion, which would wrap large numbers.
        batch[name] = array.astype(np.int32 if name in tables else bool)
    return batch


def check_length(tokens: int, positions: int) -> None:
    """Raises UserError if a row has more tokens than there are positions."""
    if tokens > positions:
        raise UserError(
            f"input_ids: {tokens} tokens exceed the {positions} positions of the model; shorten or "
            "split the text"
        )
