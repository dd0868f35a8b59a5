"""Kinds of columns: one file per kind, which has a class `Processor` and is found by the kind's
name.

A task declares which columns it reads and of which kind they are (`Task.reads`). The kind's
processor loads a value, is fitted to the training data, is stored in the run, and determines some
model settings (`contracts.Processor`)."""

from __future__ import annotations

from fmjax import contracts
from fmjax.config import names


def find(kind: str) -> type[contracts.Processor]:
    """Returns the processor class of a kind. Raises UserError, listing the kinds, if there is
    none."""
    found: type[contracts.Processor] = names.find(
        __name__, kind, "Processor", "task.reads", "kind of column"
    ).Processor
    return found


def known() -> tuple[type[contracts.Processor], ...]:
    """Returns the processor classes of fmjax's own kinds."""
    return tuple(find(kind) for kind in names.choices(__name__, "Processor"))
