"""The exceptions that are not bugs: user errors and interruptions."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class UserError(Exception):
    """An error in the user's input. The message is one line: what is wrong, why, and how to fix it.
    Exit code 2."""


class RecordError(UserError):
    """A record of the data cannot be read or used. It is skipped if bad records are tolerated.

    Args:
      place: the location of the record, from `Source.where`: "reviews.tsv line 12".
      problem: what is wrong with it and how to fix it; the message is "PLACE: PROBLEM".
      index: the record's index in the source, if known.
      shown: text to show instead of the place, such as the path of an image that the record names.
    """

    def __init__(self, place: str, problem: str, index: int | None = None, shown: str = ""):
        super().__init__(f"{shown or place}: {problem}")
        self.place, self.problem, self.index, self.shown = place, problem, index, shown

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str, int | None, str]]:
        return RecordError, (self.place, self.problem, self.index, self.shown)


class Diverged(UserError):
    """The loss or the gradient of a run is not finite in too many steps."""


class Interrupted(Exception):
    """A signal stopped the run after its state was saved. The same command continues it.

    Exit code 75.
    """


def one_line(error: Exception, most: int = 0) -> str:
    """Returns an error's message as one line of at most `most` characters (0: all), control
    characters escaped."""
    line = " ".join(part.strip() for part in str(error).splitlines() if part.strip())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    return line[:most] if most else line


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ' (did you mean "x"?)' for the choice most similar to `name`, or '' if none is
    similar."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""


def one_of(key: str, value: object, choices: Iterable[str]) -> None:
    """Raises UserError, naming the config key or flag, unless its value is one of the choices."""
    choices = list(choices)
    if value not in choices:
        hint = nearest(str(value), choices)
        raise UserError(f'{key}="{value}"{hint}: choose one of {", ".join(choices)}')


def in_range(
    key: str,
    value: object,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    whole: bool = False,
    hint: str = "",
) -> None:
    """Raises UserError, naming the config key or flag, unless its value is a number within bounds.

    Args:
      key: the name of the setting.
      value: the given value; booleans, text, NaN and infinity are out of any range.
      least: the smallest number allowed.
      most: the largest number allowed.
      above: an exclusive lower bound.
      below: an exclusive upper bound.
      whole: whether it must be a whole number (of type int).
      hint: the meaning of the bounds, such as "0 means none".
    """
    number = math.nan
    if isinstance(value, int if whole else int | float) and not isinstance(value, bool):
        # An int with hundreds of digits cannot become a float; it is out of any bounded range.
        number = float(value) if abs(value) < 1e300 else math.copysign(math.inf, value)
    fits = (
        math.isfinite(number)
        and (least is None or number >= least)
        and (most is None or number <= most)
        and (above is None or number > above)
        and (below is None or number < below)
    )
    if not fits:
        raise UserError(
            f"{key}={value}: must "
            f"{bounds(least, most, above, below, whole)}{f'; {hint}' if hint else ''}"
        )


def bounds(
    least: float | None,
    most: float | None,
    above: float | None,
    below: float | None,
    whole: bool = False,
) -> str:
    """Returns the allowed range of a number in words."""
    if whole:
        within = bounds(least, most, above, below).removeprefix("be ")
        within = "" if within == "a number" else within
        within = "0 or more" if within == "not be negative" else within
        joint = " " if within.startswith("from") else ", "
        return f"be a whole number{joint}{within}" if within else "be a whole number"
    if (least, most, above, below) == (0, None, None, None):
        return "not be negative"
    if least is not None and most is not None:
        return f"be from {shown(least)} to {shown(most)}"
    limits = {"at least": least, "above": above, "at most": most, "less than": below}
    return "be " + (
        " and ".join(f"{word} {bound:g}" for word, bound in limits.items() if bound is not None)
        or "a number"
    )


def shown(bound: float) -> str:
    """Returns a bound as text; large whole numbers have all digits."""
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
