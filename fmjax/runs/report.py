"""`report.html`: the settings, results and provenance of a run.

A single page that needs neither network nor scripts, readable on a phone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, TypeAlias

from fmjax.config import read_config
from fmjax.config.json_files import write_atomically
from fmjax.contracts import Record, Value
from fmjax.data.stream import packing
from fmjax.filesystems.paths import RunPath
from fmjax.runs import evaluation as evaluations
from fmjax.runs import folder as run_folder
from fmjax.runs.evaluation import LOSS, Evaluation, short
from fmjax.runs.figures import figures
from fmjax.runs.logs import EVALUATION, read_metrics
from fmjax.runs.outcome import cards, class_section, example_sections, table

REPORT = "report.html"
SHOWN_EVALUATIONS, SHOWN_RECORDS = 12, 20
Facts: TypeAlias = Mapping[str, Any]  # a config, provenance, or a record of metrics

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --faint: #6b7280; --line: #d6d9de;
  --card: #f4f6f8; --first: #0b62c4; --second: #b4530a }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --ink: #e6e8eb; --faint: #9aa3af; --line: #3a4049; --card: #20252b;
    --first: #6cb2ff; --second: #f2a65a } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1180px; margin: 1.5em auto; padding: 0 1em }
h1 { font-size: 1.5em; line-height: 1.25; margin-bottom: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1em; margin-top: 2em }
.faint { color: var(--faint) }
dl { display: flex; flex-wrap: wrap; gap: 8px; margin: 1em 0 }
dl div { background: var(--card); border-radius: 8px; padding: 8px 14px }
dt { color: var(--faint); font-size: 0.85em } dd { margin: 0; font-size: 1.25em; font-weight: 600 }
.figures { display: flex; flex-wrap: wrap; gap: 6px } figure { margin: 0; max-width: 100% }
figcaption { padding-left: 58px; font-weight: 600 } svg { max-width: 100%; height: auto;
  overflow: visible }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: 3px 14px 3px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line) }
td.number, th.number { text-align: right; white-space: nowrap }
.matrix th, .matrix td { padding: 3px 8px; text-align: right }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left;
  vertical-align: bottom; border: 0; padding: 8px 3px }
.matrix tbody th { font-weight: normal }
.settings td, .examples td { overflow-wrap: anywhere }
.facts td { overflow-wrap: anywhere } .facts td:first-child { white-space: nowrap }
details { margin-top: 2em } summary { cursor: pointer; font-size: 1.1em; font-weight: 600 }
svg text { font: 11px system-ui, sans-serif; fill: var(--faint) } .grid { stroke: var(--line) }
.first, .second { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.first { stroke: var(--first) } .second { stroke: var(--second) }
figcaption span { font-weight: normal; font-size: 0.85em; margin-left: 8px }
span.first { color: var(--first) } span.second { color: var(--second) }
circle.first { fill: var(--first) } circle.second { fill: var(--second) }
code { font-size: 0.92em; overflow-wrap: anywhere }
@media (max-width: 640px) {
  .stacked thead { display: none }
  .stacked tr { display: block; border-bottom: 1px solid var(--line); padding: 6px 0 }
  .stacked td, .stacked td.number { display: block; border: 0; padding: 0; text-align: left;
    white-space: normal }
  .examples td, .examples td.number { display: inline-block; margin-right: 14px }
  .examples td:nth-child(2) { display: block; margin: 0 }
  .stacked td::before { content: attr(data-name) " "; color: var(--faint); font-size: 0.85em }
}
"""


def write_report(workdir: RunPath) -> None:
    """Writes the report of a run directory from its config, provenance, metrics and evaluation."""
    config, records = read_config(workdir), read_metrics(workdir)
    provenance, evaluation = run_folder.read_provenance(workdir), evaluations.read(workdir)
    page = render(config, provenance, records, workdir.resolve().name, evaluation)
    write_atomically(workdir / REPORT, page)


def render(
    config: Facts,
    provenance: Facts,
    records: Sequence[Record],
    name: str,
    evaluation: Evaluation | None = None,
) -> str:
    """Returns the page: headline, classes, worst examples, curves, config, provenance."""
    heading = f"{config['model']['name']}, {config['task']['name']}: {name}"
    own = [(key, value) for key, value in leaves(config) if not key.startswith("fmjax.")]
    hashes = list(leaves(provenance.get("data", {})))
    parts = [
        f"<h1>{escape(heading)}</h1>",
        f'<p class="faint">{escape(progress(records))}</p>',
        cards(evaluation, provenance, config),
        data_section(provenance),
        class_section(evaluation),
        example_sections(evaluation),
        *curves(records, evaluation),
        history(records),
        folded("Config", settings(("key", "value"), own)),
        folded("Provenance", starts(provenance) + settings(("data", "fingerprint"), hashes)),
    ]
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{STYLE}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def leaves(node: Facts, path: str = "") -> Iterator[tuple[str, Value]]:
    """Yields the dotted path and the value of every leaf."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def progress(records: Sequence[Record]) -> str:
    """Returns the number of steps, and of steps without a finite loss."""
    steps = [record["step"] for record in records]
    skipped = max((record.get("nonfinite_steps", 0) for record in records), default=0)
    left_out = (
        f", {skipped} of them skipped because loss or gradient was not finite" if skipped else ""
    )
    return f"{max(steps, default=0):,} steps{left_out}"


def data_section(provenance: Facts) -> str:
    """Returns the facts at the start, and further facts about the data; nothing if there are
    none.
    """
    facts: Facts = provenance.get("facts", {})
    lines = [fact["warning"] for fact in facts.values() if "warning" in fact]
    if provenance.get("fill") and not facts:
        lines.append(f"Training batches: {packing.describe(provenance['fill'])}.")
    shared = provenance.get("overlap", {})
    if shared.get("records"):
        common = f"{shared['records']:,} of {shared['validation']:,} validation records"
        lines.append(f"{common} also occur in training; metrics will be too good.")
    if bad := provenance.get("left_out", []):
        listed = "; ".join(bad[:SHOWN_RECORDS]) + ("; ..." if len(bad) > SHOWN_RECORDS else "")
        lines.append(f"{len(bad):,} bad records were left out: {listed}")
    known = [(escape(name), escape(fact["text"])) for name, fact in facts.items()]
    parts = [table(("fact", "facts at the start of the run"), known, kind="facts")] if known else []
    parts += [f"<p>{escape(line)}</p>" for line in lines]
    return "<h2>Data and model</h2>" + "".join(parts) if parts else ""


def curves(records: Sequence[Record], evaluation: Evaluation | None) -> list[str]:
    """Returns the curves of the loss, the leading metrics and the learning rate; the others are
    collapsed.
    """
    leading = evaluation.leading if evaluation else ()
    first, others = figures(records, (LOSS, *leading, "learning_rate"))
    parts = [f"<h2>Curves</h2>{gallery(first)}"] if first else []
    return parts + ([folded("More curves", gallery(others))] if others else [])


def gallery(drawings: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(drawings)}</div>'


def history(records: Sequence[Record]) -> str:
    """Returns a table of the evaluations on the validation split; if there are many, the first, the
    last and some between.
    """
    found = [record for record in records if any(name.startswith(EVALUATION) for name in record)]
    if not found:
        return ""
    names = [name for name in found[-1] if name.startswith(EVALUATION)]
    rows = [
        (f"{record['step']:,}", *(shown(record.get(name, "")) for name in names))
        for record in (found[index] for index in spread(len(found), SHOWN_EVALUATIONS))
    ]
    head = ("step", *(name.removeprefix(EVALUATION) for name in names))
    return "<h2>Validation by step</h2>" + table(head, rows, numbers=range(len(head)))


def spread(count: int, most: int) -> list[int]:
    """Returns at most `most` indices below `count`, evenly spread, the first and last among
    them.
    """
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def folded(title: str, content: str) -> str:
    """Returns a collapsible part of the page."""
    return f"<details><summary>{escape(title)}</summary>\n{content}</details>"


def settings(head: Sequence[str], pairs: Sequence[tuple[str, Value]]) -> str:
    rows = [(f"<code>{escape(key)}</code>", shown(value)) for key, value in pairs]
    return table(head, rows, kind="settings stacked")


def starts(provenance: Facts) -> str:
    """Returns a table with a row for each start or continuation of the run."""
    rows: list[Sequence[str]] = []
    for start in provenance.get("starts", []):
        used = [f"{name} {version}" for name, version in start["versions"].items() if version]
        commit = start["commit"] or "unknown"
        origin = f"Python {start['python']}, {', '.join(used)}; commit {commit}; {start['devices']}"
        command = f"<code>{escape(' '.join(start['command']))}</code>"
        rows.append((escape(start["time"]), command, escape(origin)))
    return table(("start", "command", "software and devices"), rows, kind="settings stacked")


def shown(value: Value) -> str:
    """Returns a value as HTML, numbers with four digits."""
    if isinstance(value, float):
        return short(value)
    return escape(str(value)) if value is not None else '<span class="faint">unset</span>'
