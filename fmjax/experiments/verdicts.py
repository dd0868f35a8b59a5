"""What a measurement says about a claim: whether it holds, and how it compares, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from scipy import stats

from fmjax.experiments.entries import Claim, Experiment, Measured
from fmjax.experiments.floors import FLOORS

SHARES = ("accuracy",)  # shares of examples, whose interval is binomial with a single seed
Rows = Mapping[str, Measured]  # by "RUN" or "RUN/FLOOR"
NOT_RUN = "not run yet"


class Verdict(NamedTuple):
    """A claim, the claimed value if it was measured before, what was measured now, and the verdict.

    `holds` is None where nothing was measured.
    """

    claim: Claim
    label: str
    claimed: float | None
    value: float | None
    interval: str
    floor: str
    holds: bool | None
    words: str


def verdicts(one: Experiment, claimed: Rows, found: Rows) -> list[Verdict]:
    """Returns a verdict on each claim of an experiment."""
    return [verdict(one, claim, claimed, found) for claim in one.claims]


def verdict(one: Experiment, claim: Claim, claimed: Rows, found: Rows) -> Verdict:
    """Returns the verdict on a claim: it holds if the mean over seeds is at most `tolerance` worse
    than the claimed one or, if there is none, than the published value."""
    label, before = one.runs[claim.run].label, mean_of(claimed.get(claim.run), claim.metric)
    now = found.get(claim.run)
    value, floor = mean_of(now, claim.metric), best_floor(one, claim, found)
    words: list[str] = []
    holds: bool | None = None
    if now is None or value is None:
        words.append(NOT_RUN)
    else:
        aim = claim.published if before is None else before
        holds = aim is None or claim.worse(value, aim) <= claim.tolerance
        if aim is not None and not holds:
            kind = "the published value" if before is None else "the claim"
            words.append(f"worse than {kind} by more than {claim.tolerance:g}")
        elif before is None and aim is not None:
            words.append("reaches the published value")
        if before is not None and claim.published is not None:
            words.append(compared(claim, value, claim.published, "the published value"))
        if floor is not None:
            words.append(compared(claim, value, floor[1], "its floor"))
        if now.note:
            words.append(now.note)
    interval = interval_of(now, claim.metric) if now else ""
    shown = f"{floor[0]} {number(floor[1])}" if floor else ""
    return Verdict(claim, label, before, value, interval, shown, holds, "; ".join(words))


def compared(claim: Claim, value: float, other: float, name: str) -> str:
    """Returns a comparison in words."""
    by = claim.worse(value, other)
    if number(value) == number(other):
        return f"equal to {name}"
    return f"{'worse' if by > 0 else 'better'} than {name}"


def mean_of(row: Measured | None, metric: str) -> float | None:
    """Returns the mean over seeds, None if the metric was not measured."""
    return mean(row.values[metric]) if row and row.values.get(metric) else None


def best_floor(one: Experiment, claim: Claim, found: Rows) -> tuple[str, float] | None:
    """Returns the name and the value of the best of a claim's floors, None if none is known."""
    known = [
        (FLOORS[name][0], value)
        for name in claim.floors
        if (value := mean_of(found.get(f"{one.data_run(claim.run)}/{name}"), claim.metric))
        is not None
    ]
    pick = min if claim.better == "lower" else max
    return pick(known, key=lambda pair: pair[1]) if known else None


def interval_of(row: Measured, metric: str) -> str:
    """Returns half the width of the 95 % interval of the mean, in words: over seeds (Student's t),
    of a single seed's share of the examples (binomial), or none."""
    values = row.values.get(metric, ())
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
        return f"± {number(half)}, {len(values)} seeds"
    if len(values) == 1 and metric in SHARES and row.examples:
        half = 1.96 * math.sqrt(values[0] * (1 - values[0]) / row.examples)
        return f"± {number(half)}, one seed"
    return "one seed" if values else ""


def number(value: float) -> str:
    """Returns a number as tables show it: .809, 1.708, 23.3."""
    size = abs(value)
    digits = 1 if size >= 10 else 4 if size > 0.98 and size < 1 else 3
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if size < 1 else text


def all_hold(found: Sequence[Verdict]) -> bool:
    """Returns whether no claim that was measured fails."""
    return all(one.holds is not False for one in found)
