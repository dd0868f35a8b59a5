"""Curves of metrics over steps, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TypeAlias

from fmjax.contracts import Record
from fmjax.runs.logs import EVALUATION

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = (
    376,
    210,
    58,
    24,
    10,
)  # size of a figure and room for its labels, in pixels
POINTS = 300  # maximum points per curve; more are averaged in groups
Points: TypeAlias = Sequence[tuple[float, float]]  # (step, value)


def figures(records: Sequence[Record], first: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Returns a figure per metric. Training and validation share a figure if both have the metric.

    The figures of the metrics `first` are a separate list.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "nonfinite_steps") and isinstance(value, int | float):
                curves.setdefault(name, []).append((record["step"], value))
    names = dict.fromkeys(name.removeprefix(EVALUATION) for name in curves)
    chosen = [name for name in dict.fromkeys(first) if name in names]
    others = [name for name in names if name not in chosen]
    return drawn(chosen, curves), drawn(others, curves)


def drawn(names: Sequence[str], curves: Mapping[str, Points]) -> list[str]:
    """Returns a figure for each name."""
    return [figure(name, curves.get(name, []), curves.get(EVALUATION + name, [])) for name in names]


def figure(name: str, training: Points, validation: Points) -> str:
    """Returns an SVG of a metric over steps."""
    training, validation = thinned(training), thinned(validation)
    both = [*training, *validation]
    steps, values = (
        ticks(0, max(step for step, _ in both)),
        ticks(min(v for _, v in both), max(v for _, v in both)),
    )

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - MARGIN) * (step - steps[0]) / (steps[-1] - steps[0])

    def y(value: float) -> float:
        return MARGIN + (HEIGHT - BOTTOM - MARGIN) * (values[-1] - value) / (values[-1] - values[0])

    parts = []
    for value in values:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - MARGIN}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:,.10g}</text>'
        )
    parts += [
        f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step:,.10g}</text>'
        for step in steps
    ]
    legend = ""
    for kind, label, points in (
        ("first", "training", training),
        ("second", "validation", validation),
    ):
        if points:
            line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
            parts.append(f'<polyline class="{kind}" points="{line}"/>')
            parts.append(
                f'<circle class="{kind}" r="2.5" cx="{x(points[-1][0]):.1f}" '
                f'cy="{y(points[-1][1]):.1f}"/>'
            )
            legend += f' <span class="{kind}">{label}</span>'
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    image = f'<svg {size} role="img" aria-label="{escape(name)} over steps">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(name)}{legend}</figcaption>{image}</figure>"


def thinned(points: Points) -> Points:
    """Returns at most about POINTS points: averages of groups of neighbors."""
    size = math.ceil(len(points) / POINTS)
    groups = (
        [points[begin : begin + size] for begin in range(0, len(points), size)] if points else []
    )
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Returns two to seven round numbers, evenly spaced, that enclose a range; a single value lies
    between two.
    """
    span = high - low
    if span <= max(1e-6 * max(abs(low), abs(high)), 1e-300):  # one value, up to rounding
        span = abs(high) if abs(high) > 1e-300 else 1.0
    unit = 10.0 ** math.floor(math.log10(span / 3))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 5)
    # Apart from rounding, a bound that is a multiple of the step does not change.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]
