"""Facts to show before a run trains."""

from __future__ import annotations

import dataclasses

from fmjax.contracts.types import Config


@dataclasses.dataclass(frozen=True)
class Fact:
    """One line of the summary at the start of a run, also stored in `provenance.json`.

    Attributes:
      name: a word or two, such as "labels".
      text: the line to print.
      values: the same as JSON values, for the report and other programs.
      warning: what is probably wrong and how to fix it; empty if nothing is.
    """

    name: str
    text: str
    values: Config = dataclasses.field(default_factory=dict)
    warning: str = ""
