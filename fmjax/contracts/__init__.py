"""What the parts of fmjax promise each other: models, tasks, examples, sources of records, and
processors of columns.

A protocol is met by any class that has its methods; a base class gives what is optional its
default. Nothing asks an object whether it has an attribute: what may be absent is None, empty or
zero here.

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
