"""Facts that a person should know before a run trains."""

from __future__ import annotations

import dataclasses

from fmjax.contracts.types import Config


@dataclasses.dataclass(frozen=True)
class Fact:
    """One line of the block at the start of a run, which `provenance.json` holds as well.

    Attributes:
      name: a word or two, such as "labels".
      text: the line, for a person.
      values: the same as JSON holds it, for the report and other programs.
      warning: what is probably wrong and how to fix it; empty if nothing is.
    """

    name: str
    text: str
    values: Config = dataclasses.field(default_factory=dict)
    warning: str = ""
