"""The two ways a command ends that are not bugs: the user's input is at fault, or the run was interrupted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is at fault. The message is one line: what, why, how to fix. Exit code 2."""


class Interrupted(Exception):
    """A signal stopped the run after its state was saved; the same command continues it. Exit code 75."""


def one_line(error: Exception, most: int = 0) -> str:
    """Returns what an error says as one line, at most so many letters of it; what a terminal would obey is spelt out."""
    line = " ".join(part.strip() for part in str(error).splitlines() if part.strip())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    return line[:most] if most else line


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ' (did you mean "x"?)' for the choice that resembles `name` most, or '' if none does."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
