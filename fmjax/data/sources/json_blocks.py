"""JSON lines, parsed many at a time.

Arrow parses five times as fast as Python. It is used where its result is certainly that of
`json_object`: for objects of strings, whole numbers, booleans and nulls, each of the type that its
key had first. Arrow then accepts nothing that `json_object` refuses, except several objects in one
line, or an object in several lines, which `objects` finds. For everything else, the functions here
return None, and the records have to be parsed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fmjax.contracts import Record
from fmjax.data.records import json_object

if TYPE_CHECKING:
    import pyarrow as pa

TYPES = {str: "string", int: "int64", bool: "bool"}  # Arrow's names
OPENS, CLOSES, FEED, RETURN = b"{}\n\r"
Types = dict[str, str]


def objects(content: bytes) -> np.ndarray | None:
    """Returns the begin and end, int64 [lines, 2], of the lines that contain an object each; None
    if lines are neither empty nor begin and end in braces.

    A line that begins in a brace cannot continue an object that ended in one. So if there are as
    many objects as such lines, each line has one.
    """
    letters = np.frombuffer(content or b"\n", np.uint8)
    ends = np.flatnonzero(letters == FEED) + 1
    if not ends.size or ends[-1] < letters.size:
        ends = np.append(ends, letters.size)
    bounds = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    sizes = np.diff(bounds)[:, 0]
    last = letters[ends - 1]
    # Without the line break. An index of -1 is that of another line, which is not looked at.
    feed = last == FEED
    stops = ends - feed
    stops = stops - (feed & (sizes > 1) & (letters[stops - 1] == RETURN))
    filled = stops > bounds[:, 0]
    inside = bounds[filled]
    if not ((letters[inside[:, 0]] == OPENS) & (letters[stops[filled] - 1] == CLOSES)).all():
        return None
    return np.asarray(inside)


def table(content: bytes, lines: np.ndarray, types: Types) -> pa.Table | None:
    """Returns the columns of `lines`, the only ones of a text that are not empty, with an object
    each. The keys of the first that are not in `types` are added to them, unless the result is
    None.
    """
    # Imported here because importing pyarrow takes a moment.
    import pyarrow as pa
    import pyarrow.json

    own = dict(types)
    try:
        begin, end = lines[0]
        first = json_object(content[begin:end].decode())
        own |= {name: TYPES[type(it)] for name, it in first.items() if name not in own}
    except (IndexError, KeyError, ValueError):  # no line, a value of another type, a bad record
        return None
    options = pyarrow.json.ParseOptions(
        explicit_schema=pa.schema(list(own.items())), unexpected_field_behavior="error"
    )
    reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(content) + 1)
    try:
        found = pyarrow.json.read_json(pa.BufferReader(content), reading, options)
        found.validate(full=True)
    except pa.ArrowException:
        return None
    if found.num_rows != len(lines):
        return None
    types |= own
    return found


def records(content: bytes, count: int, columns: Sequence[str]) -> list[Record] | None:
    """Returns the records of a text of `count` lines that are not empty; missing values are
    None."""
    lines = objects(content)
    found = table(content, lines, {}) if lines is not None and len(lines) == count else None
    if found is None:
        return None
    values = {name: found[name].to_pylist() for name in found.column_names}
    nothing = [None] * count
    rows = zip(*(values.get(name, nothing) for name in columns), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]
