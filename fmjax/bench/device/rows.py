"""Rows of the device check's table."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterable, Sequence

from fmjax.bench.table import markdown
from fmjax.bench.workloads import Result

# Whether a check holds; a measurement, which has no bound; what was not run, and why.
PASSED, FAILED, MEASURED, SKIPPED, ERROR = "pass", "FAIL", "measured", "skipped", "ERROR"
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
HEAD = ("part", "what", "result", "compared with", "status")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. A later row of the same part and the same `what` replaces it."""

    what: str
    result: str
    against: str = ""  # what the result is compared with: a bound, a peer, an anchor
    status: str = MEASURED
    facts: Result = dataclasses.field(default_factory=dict)  # its numbers, for the JSON file
    part: str = ""


def first_line(error: BaseException) -> str:
    """Returns the kind of an exception and the first line of its message, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return said[:160]


def failed(what: str, error: BaseException) -> Row:
    """Returns the row of what ended in an exception."""
    return Row(what, first_line(error), status=ERROR)


def skipped(what: str, why: str) -> Row:
    """Returns the row of what was not run."""
    return Row(what, why, status=SKIPPED)


def merged(rows: Sequence[Row], new: Row) -> list[Row]:
    """Returns the rows with a new one, in the place of the one that it replaces."""
    own = (new.part, new.what)
    if not any((row.part, row.what) == own for row in rows):
        return [*rows, new]
    return [new if (row.part, row.what) == own else row for row in rows]


def table(rows: Iterable[Row], width: int = 0) -> str:
    """Returns the table, with the name of a part in its first line alone.

    With a width, longer cells go on in the next line: for a terminal.
    """
    lines: list[Sequence[str]] = []
    before = None
    for row in rows:
        part = "" if row.part == before else row.part
        cells = [part, row.what, row.result, row.against, row.status]
        cells = [cell.replace("|", "/") for cell in cells]
        parts = [textwrap.wrap(cell, width) if width else [cell] for cell in cells]
        lines += itertools.zip_longest(*parts, fillvalue="")
        before = row.part
    return markdown(HEAD, lines)


def counts(rows: Sequence[Row]) -> str:
    """Returns how many rows have each status, such as "3 pass, 1 skipped"."""
    found = dict.fromkeys((PASSED, FAILED, ERROR, MEASURED, SKIPPED), 0)
    for row in rows:
        found[row.status] += 1
    return ", ".join(f"{count} {status}" for status, count in found.items() if count)


def size(count: float) -> str:
    """Returns a number of bytes in words."""
    unit, factor = next(pair for pair in UNITS if count >= pair[1] or pair is UNITS[-1])
    return (
        f"{count / factor:.1f} {unit}" if count < 100 * factor else f"{count / factor:.0f} {unit}"
    )


def holds(rows: Iterable[Row], checks: Iterable[str]) -> bool:
    """Returns whether nothing in the parts `checks` failed; what was skipped did not."""
    parts = frozenset(checks)
    return not any(row.part in parts and row.status in (FAILED, ERROR) for row in rows)
