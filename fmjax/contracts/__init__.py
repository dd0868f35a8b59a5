"""Interfaces between the parts of fmjax: models, tasks, examples, sources of records, and
processors of columns.

Any class with the methods of a protocol satisfies it; a base class provides defaults for optional
attributes. No code checks whether an object has an attribute: optional values are None, empty or
zero.

Dimensions: B batch, L length, T target length, D width, V vocabulary.
"""

from fmjax.contracts.data import Examples, Order, Source
from fmjax.contracts.facts import Fact
from fmjax.contracts.models import Encodes, Generates, Model, PacksPairs
from fmjax.contracts.processors import Column, Processor, Processors
from fmjax.contracts.tasks import Task
from fmjax.contracts.types import (
    Arrays,
    Batch,
    Config,
    Example,
    Heads,
    HostBatch,
    Measures,
    PyTree,
    Record,
    Undrawn,
    Value,
    Where,
)

__all__ = [
    "Arrays",
    "Batch",
    "Column",
    "Config",
    "Encodes",
    "Example",
    "Examples",
    "Fact",
    "Generates",
    "Heads",
    "HostBatch",
    "Measures",
    "Model",
    "Order",
    "PacksPairs",
    "Processor",
    "Processors",
    "PyTree",
    "Record",
    "Source",
    "Task",
    "Undrawn",
    "Value",
    "Where",
]
