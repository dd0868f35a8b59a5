"""`report.html`: what a run is, how it went and where it came from, on one page that needs neither network nor scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

from fmjax.config import read_config
from fmjax.config.json_files import write_atomically
from fmjax.contracts import Value
from fmjax.data.stream import packing
from fmjax.runs import folder as run_folder
from fmjax.runs.logs import EVALUATION, read_metrics

REPORT = "report.html"
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 380, 210, 58, 24, 10  # of a figure and the room for its labels, in pixels
POINTS = 300  # drawn of a curve; more are averaged in groups
Facts: TypeAlias = Mapping[str, Any]  # a config, provenance, or a record of metrics
Points: TypeAlias = Sequence[tuple[float, float]]  # (step, value)

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --faint: #6b7280; --line: #d6d9de;
  --first: #0b62c4; --second: #b4530a }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --ink: #e6e8eb; --faint: #9aa3af; --line: #3a4049; --first: #6cb2ff; --second: #f2a65a } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1180px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.1em; margin-top: 2em } .faint { color: var(--faint) }
.figures { display: flex; flex-wrap: wrap; gap: 8px } figure { margin: 0 } figcaption { padding-left: 58px; font-weight: 600 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: 2px 14px 2px 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--line); overflow-wrap: anywhere } td.number, th.number { text-align: right }
svg text { font: 11px system-ui, sans-serif; fill: var(--faint) } .grid { stroke: var(--line) }
.first, .second { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.first { stroke: var(--first) } .second { stroke: var(--second) }
text.first { fill: var(--first); stroke: none } text.second { fill: var(--second); stroke: none }
circle.first { fill: var(--first) } circle.second { fill: var(--second) } code { font-size: 0.92em }
"""


def write_report(workdir: Path) -> None:
    """Writes the report of a run directory from `config.json`, `provenance.json` and `metrics.jsonl`."""
    config, records = read_config(workdir), read_metrics(workdir)
    page = render(config, run_folder.read_provenance(workdir), records, workdir.resolve().name)
    write_atomically(workdir / REPORT, page)


def render(config: Facts, provenance: Facts, records: Sequence[Facts], name: str) -> str:
    """Returns the page: metrics, curves, config, provenance."""
    heading = f"{config['model']['name']}, {config['task']['name']}: {name}"
    settings = [(f"<code>{escape(key)}</code>", shown(value)) for key, value in leaves(config) if not key.startswith("fmjax.")]
    data = [(f"<code>{escape(key)}</code>", shown(value)) for key, value in leaves(provenance.get("data", {}))]
    parts = [
        f"<h1>{escape(heading)}</h1>",
        f'<p class="faint">{escape(progress(records))}</p>',
        evaluations(records),
        left_out(provenance),
        f'<div class="figures">{"".join(figures(records))}</div>',
        "<h2>Config</h2>",
        table(("key", "value"), settings),
        "<h2>Provenance</h2>",
        table(("start", "command", "software and devices"), starts(provenance)),
        table(("data", "fingerprint"), data),
    ]
    head = f'<meta charset="utf-8"><title>{escape(heading)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def leaves(node: Facts, path: str = "") -> Iterator[tuple[str, Value]]:
    """Yields the dotted path and the value of every leaf."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def progress(records: Sequence[Facts]) -> str:
    steps = [record["step"] for record in records]
    skipped = max((record.get("nonfinite_steps", 0) for record in records), default=0)
    return f"{max(steps, default=0):,} steps" + (f", {skipped} of them left out: loss or gradient not finite" if skipped else "")


def evaluations(records: Sequence[Facts]) -> str:
    """Returns the table of the evaluations on the validation split; of many, the first, the last and some between."""
    found = [record for record in records if any(name.startswith(EVALUATION) for name in record)]
    if not found:
        return ""
    chosen = [found[index] for index in spread(len(found), 12)]
    names = [name for name in found[-1] if name.startswith(EVALUATION)]
    rows: list[Sequence[str]] = [(f"{record['step']:,}", *(shown(record.get(name, "")) for name in names)) for record in chosen]
    return "<h2>Validation</h2>" + table(("step", *(name.removeprefix(EVALUATION) for name in names)), rows, numbers=True)


def left_out(provenance: Facts) -> str:
    """Returns how full the rows of training are, which bad records were left out, and how many records of validation are in the
    training data; nothing where nothing is known."""
    bad, shared = provenance.get("left_out", []), provenance.get("overlap", {})
    lines = []
    if provenance.get("fill"):
        lines.append(f"Training batches: {packing.describe(provenance['fill'])}.")
    if shared.get("records"):
        common = f"{shared['records']:,} of {shared['validation']:,} validation records"
        lines.append(f"{common} also occur in training; metrics will be too good.")
    if bad:
        lines.append(f"{len(bad):,} bad records were left out: " + "; ".join(bad[:20]) + ("; ..." if len(bad) > 20 else ""))
    return "<h2>Data</h2>" + "".join(f"<p>{escape(line)}</p>" for line in lines) if lines else ""


def spread(count: int, most: int) -> list[int]:
    """Returns at most `most` indices below `count`, evenly spread, the first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def starts(provenance: Facts) -> list[Sequence[str]]:
    """Returns a row for each time that the run was begun or continued."""
    rows: list[Sequence[str]] = []
    for start in provenance.get("starts", []):
        versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items() if version)
        origin = f"Python {start['python']}, {versions}; commit {start['commit'] or 'unknown'}; {start['devices']}"
        rows.append((escape(start["time"]), f"<code>{escape(' '.join(start['command']))}</code>", escape(origin)))
    return rows


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Returns an HTML table; the cells of `rows` are HTML already."""
    kind = ' class="number"' if numbers else ""
    top = "".join(f"<th{kind}>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{top}</tr>\n{body}</table>"


def shown(value: Value) -> str:
    """Returns a value as HTML, numbers with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(str(value)) if value is not None else '<span class="faint">unset</span>'


def figures(records: Sequence[Facts]) -> list[str]:
    """Returns a figure for each metric: of training and of validation in one where both have it."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "nonfinite_steps") and isinstance(value, int | float):
                curves.setdefault(name, []).append((record["step"], value))
    names = dict.fromkeys(name.removeprefix(EVALUATION) for name in curves)
    return [figure(name, curves.get(name, []), curves.get(EVALUATION + name, [])) for name in names]


def figure(name: str, training: Points, validation: Points) -> str:
    """Returns an SVG of a metric over steps."""
    training, validation = thinned(training), thinned(validation)
    both = [*training, *validation]
    steps, values = ticks(0, max(step for step, _ in both)), ticks(min(v for _, v in both), max(v for _, v in both))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - MARGIN) * (step - steps[0]) / (steps[-1] - steps[0])

    def y(value: float) -> float:
        return MARGIN + (HEIGHT - BOTTOM - MARGIN) * (values[-1] - value) / (values[-1] - values[0])

    parts = []
    for value in values:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - MARGIN}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:,.10g}</text>')
    parts += [f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step:,.10g}</text>' for step in steps]
    for kind, label, points in (("first", "training", training), ("second", "validation", validation)):
        if points:
            line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
            parts.append(f'<polyline class="{kind}" points="{line}"/>')
            parts.append(f'<circle class="{kind}" r="2.5" cx="{x(points[-1][0]):.1f}" cy="{y(points[-1][1]):.1f}"/>')
            place = MARGIN + (12 if kind == "first" else 26)
            parts.append(f'<text class="{kind}" x="{WIDTH - MARGIN - 4}" y="{place}" text-anchor="end">{label}</text>')
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    image = f'<svg {size} role="img" aria-label="{escape(name)} over steps">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(name)}</figcaption>{image}</figure>"


def thinned(points: Points) -> Points:
    """Returns at most about POINTS points: averages of groups of neighbors."""
    size = math.ceil(len(points) / POINTS)
    groups = [points[begin : begin + size] for begin in range(0, len(points), size)] if points else []
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Returns two to seven round numbers, evenly spaced, that enclose a range; one without extent lies between two."""
    span = high - low
    if span <= max(1e-6 * max(abs(low), abs(high)), 1e-300):  # one value, up to rounding
        span = abs(high) if abs(high) > 1e-300 else 1.0
    unit = 10.0 ** math.floor(math.log10(span / 3))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 5)
    # Rounding aside, a bound that is a multiple of the step stays one.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]
