"""What a measurement says about a claim: whether it holds, and how it compares, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean, stdev
from typing import NamedTuple

from scipy import stats

from fmjax.experiments.entries import Claim, Experiment, Measured, Written
from fmjax.experiments.floors import FLOORS

EXACT = 1e-9  # what decimal fractions, such as .8 - .785, may be off by
MOST_DECIMALS = 4
SHARES = ("accuracy",)  # shares of examples, whose interval is binomial with a single seed
Rows = Mapping[str, Measured]  # by "RUN" or "RUN/FLOOR"
NOT_RUN = "not run yet"


class Verdict(NamedTuple):
    """A claim, the claimed value if it was measured before, what was measured now, and the verdict.

    `holds` is None where nothing was measured, or where there is nothing to compare it with.
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
    if before is not None and not math.isfinite(before):
        before = None  # that run diverged
    now = found.get(claim.run)
    value, floor = mean_of(now, claim.metric), best_floor(one, claim, found)
    words: list[str] = []
    holds: bool | None = None
    if now is None or value is None:
        words.append(NOT_RUN)
    else:
        holds, missed = judgment(claim, value, before)
        words.append(missed)
        if math.isfinite(value):
            if claim.published is not None and not (missed and before is None):
                words.append(compared(claim, value, claim.published, "the published value"))
            if floor is not None:
                words.append(compared(claim, value, floor[1], "its floor"))
        words += [one.runs[claim.run].note, now.note]
    interval = interval_of(now, claim.metric) if now else ""
    shown = f"{floor[0]} {number(floor[1])}" if floor else ""
    return Verdict(
        claim, label, before, value, interval, shown, holds, "; ".join(filter(None, words))
    )


def judgment(claim: Claim, value: float, before: float | None) -> tuple[bool | None, str]:
    """Returns whether a claim holds (None: there is nothing to compare with), and words on that."""
    if not math.isfinite(value):
        return False, f"{claim.metric} is not finite: the run diverged"
    aim = claim.published if before is None else before
    if aim is None:
        return None, "first measurement"
    if claim.worse(value, aim) <= claim.tolerance + EXACT:
        return True, ""
    kind = "the published" if before is None else "the claimed"
    return False, f"worse than {kind} {number(aim)} by more than {claim.tolerance:g}"


def compared(claim: Claim, value: float, other: float, name: str) -> str:
    """Returns a comparison in words."""
    by = claim.worse(value, other)
    if number(value) == number(other):
        return f"equal to {name}"
    return f"{'worse' if by > 0 else 'better'} than {name}"


def mean_of(row: Measured | None, metric: str) -> float | None:
    """Returns the mean over seeds, None if the metric was not measured."""
    values = row.values.get(metric) if row else None
    if not values:
        return None
    if len(values) == 1:
        return values[0]  # with the decimals that it was written with
    return mean(map(float, values)) if all(map(math.isfinite, values)) else math.nan


def best_floor(one: Experiment, claim: Claim, found: Rows) -> tuple[str, float] | None:
    """Returns the name and the value of the best of a claim's floors, None if none is known."""
    known = [
        (FLOORS[name][0], value)
        for name in claim.floors
        if (value := mean_of(found.get(f"{one.data_run(claim.run)}/{name}"), claim.metric))
        is not None
        and math.isfinite(value)
    ]
    pick = min if claim.better == "lower" else max
    return pick(known, key=lambda pair: pair[1]) if known else None


def interval_of(row: Measured, metric: str) -> str:
    """Returns half the width of the 95 % interval of the mean, in words: over seeds (Student's t),
    of a single seed's share of the examples (binomial), or none."""
    values, known = row.values.get(metric, ()), deviation(row, metric)
    if not all(map(math.isfinite, values)):
        return ""
    seeds = max(len(values), row.seeds)
    if seeds > 1:
        if known is None:
            return f"{seeds} seeds"
        half = stats.t.ppf(0.975, seeds - 1) * known / math.sqrt(seeds)
        return f"± {number(half)}, {seeds} seeds"
    if len(values) == 1 and metric in SHARES and row.examples:
        half = 1.96 * math.sqrt(values[0] * (1 - values[0]) / row.examples)
        return f"± {number(half)}, one seed"
    return "one seed" if values else ""


def deviation(row: Measured, metric: str) -> float | None:
    """Returns the standard deviation over seeds, None if it is not known."""
    values = row.values.get(metric, ())
    if not all(map(math.isfinite, values)):
        return None
    return stdev(map(float, values)) if len(values) > 1 else row.deviation.get(metric)


def number(value: float) -> str:
    """Returns a number as tables show it: .809, 1.709, 23.3; one of the file with as many decimals
    as it was written with, unless it has all."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    digits = 1 if size >= 10 else 4 if size > 0.98 and size < 1 else 3
    if isinstance(value, Written) and 0 < value.decimals <= MOST_DECIMALS:
        digits = value.decimals
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if size < 1 else text
