"""Tables of results: on the terminal, in report.html, and in the pages, which are written from the
claims.

A page has a table between two comments, `<!-- claims: NAME -->` and `<!-- end of claims -->`; NAME
is an experiment, or "all".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fmjax.config.json_files import without_nan, write_atomically, write_json
from fmjax.errors import UserError
from fmjax.experiments.entries import Claims, Experiment, Measured
from fmjax.experiments.floors import FLOORS
from fmjax.experiments.verdicts import (
    NOT_RUN,
    Rows,
    Verdict,
    deviation,
    mean_of,
    number,
    verdicts,
)
from fmjax.runs.outcome import table
from fmjax.runs.report import STYLE

PAGES = ("README.md", "configs/README.md")
BLOCK = re.compile(r"(<!-- claims: ([a-z0-9-]+) -->\n)(.*?)(<!-- end of claims -->)", re.S)
HEAD = (
    "claim",
    "metric",
    "published",
    "claimed",
    "tolerance",
    "ours",
    "interval",
    "floor",
    "CPU minutes",
    "verdict",
)
SHRUNKEN = "shrunken: two steps of tiny models"
CALLED = {
    "f1_macro": "macro-F1",
    "roc_auc": "AUC",
    "exact_match": "exact match",
    "f1": "F1",
    "bleu": "BLEU",
    "chrf": "chrF",
}


def report(
    one: Experiment, claimed: Rows, found: Rows, folder: Path, quick: bool = False
) -> list[Verdict]:
    """Writes report.html and report.json into the folder of an experiment; returns the verdicts.

    Shrunken runs say nothing about claims.
    """
    judged = verdicts(one, {} if quick else claimed, found)
    if quick:
        judged = [verdict._replace(holds=None, words="ran") for verdict in judged]
    rows = [cells(verdict, found) for verdict in judged]
    command = f"python scripts/reproduce.py {one.name}{' --quick' if quick else ''}"
    title = f"{one.title} ({SHRUNKEN})" if quick else one.title
    links = [
        f'<li><a href="{escape(path.parent.name)}/report.html">{escape(path.parent.name)}</a></li>'
        for path in sorted(folder.glob("*/report.html"))
    ]
    body = "".join(
        [
            f"<h1>{escape(title)}</h1><p><code>{escape(command)}</code></p>",
            table(HEAD, [[escape(cell) for cell in row] for row in rows]),
            "<h2>Measured</h2>",
            table(
                ("what", "values", "CPU minutes", "commit", "day", "machine"), details(one, found)
            ),
            f"<h2>Runs</h2><ul>{''.join(links)}</ul>",
        ]
    )
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    write_atomically(folder / "report.html", page)
    content = {
        "experiment": one.name,
        "quick": quick,
        "claims": [verdict._asdict() | {"claim": vars(verdict.claim)} for verdict in judged],
        "measured": {name: vars(row) for name, row in found.items()},
    }
    write_json(folder / "report.json", without_nan(content))
    return judged


def details(one: Experiment, found: Rows) -> list[Sequence[str]]:
    """Returns a row of HTML per run and floor: everything that was measured."""
    return [
        (
            escape(row_label(one, name)),
            escape(
                "; ".join(
                    f"{metric} {', '.join(map(number, values))}"
                    for metric, values in row.values.items()
                )
            ),
            f"{row.cpu_minutes:.1f}",
            ", ".join(f"<code>{escape(one[:12])}</code>" for one in row.commit.split(", ")),
            escape(row.date),
            escape(row.machine),
        )
        for name, row in found.items()
    ]


def row_label(one: Experiment, name: str) -> str:
    """Returns what tables call a run or a floor."""
    run, _, floor = name.partition("/")
    return FLOORS[floor][0] if floor else one.runs[run].label or run


def cells(verdict: Verdict, found: Rows) -> list[str]:
    """Returns a claim's row of the table: as HEAD."""
    claim = verdict.claim
    published = f"{number(claim.published)} ({claim.source})" if claim.published is not None else ""
    claimed, ours = (
        "" if value is None else number(value) for value in (verdict.claimed, verdict.value)
    )
    row = found.get(claim.run)
    outcome = {None: "", True: "holds", False: "FAILS"}[verdict.holds]
    words = ": ".join(part for part in (outcome, verdict.words) if part)
    return [
        verdict.label,
        CALLED.get(claim.metric, claim.metric),
        published,
        claimed,
        f"{claim.tolerance:g}",
        ours,
        verdict.interval,
        verdict.floor,
        f"{row.cpu_minutes:.1f}" if row else "",
        words,
    ]


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table with aligned columns."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def written(text: str, claims: Claims) -> str:
    """Returns a page with its tables written from the claims. Raises UserError for an unknown
    experiment."""
    return BLOCK.sub(lambda found: f"{found[1]}{page_table(found[2], claims)}\n{found[4]}", text)


def page_table(name: str, claims: Claims) -> str:
    """Returns a table in Markdown: of the claims of all experiments, or of one experiment's
    metrics."""
    if name != "all":
        return metrics_table(claims.named(name), claims.measured.get(name, {}))
    rows = [row for one in claims.experiments.values() for row in claim_rows(one, claims)]
    return markdown(
        ("experiment", "what", "metric", "published", "ours", "floor", "CPU minutes", "in words"),
        rows,
    )


def claim_rows(one: Experiment, claims: Claims) -> list[list[str]]:
    """Returns the rows of an experiment, a claim each."""
    known = claims.measured.get(one.name, {})
    rows = []
    for at, verdict in enumerate(verdicts(one, known, known)):
        claim, row = verdict.claim, known.get(verdict.claim.run)
        published = (
            f"{number(claim.published)}: {claim.source}" if claim.published is not None else ""
        )
        first = (
            [f"`{one.name}`", f"{one.title}: {verdict.label}"] if at == 0 else ["", verdict.label]
        )
        ours = ""
        if row and verdict.value is not None:
            more = [
                f"{CALLED.get(name, name)} {number(value)}"
                for name in claim.also
                if (value := mean_of(row, name)) is not None
            ]
            leading = f"**{number(verdict.value)}** {verdict.interval}".strip()
            ours = "; ".join(filter(None, [leading, ", ".join(more)]))
        rows.append(
            [
                *first,
                CALLED.get(claim.metric, claim.metric),
                published,
                ours,
                verdict.floor,
                minutes(one, claim.run, known),
                verdict.words,
            ]
        )
    return rows


def minutes(one: Experiment, run: str, known: Rows) -> str:
    """Returns the CPU minutes of a run, after those of the runs that it starts from: 14 + 10."""
    parts = [known.get(name) for name in (*one.places(run), run) if name in one.runs]
    return " + ".join(f"{row.cpu_minutes:.0f}" for row in parts if row and row.cpu_minutes >= 1)


def metrics_table(one: Experiment, known: Rows) -> str:
    """Returns a table of floors and runs, each with all metrics that claims name, and where the
    values come from if that is unusual."""
    metrics = list(dict.fromkeys(metric for claim in one.claims for metric in claim.metrics))
    names = [f"{one.data_run(claim.run)}/{floor}" for claim in one.claims for floor in claim.floors]
    shown = dict.fromkeys([*names, *(claim.run for claim in one.claims)])
    rows = [
        [row_label(one, name), *(spread(known.get(name), metric) for metric in metrics)]
        for name in shown
    ]
    head = ("model", *(CALLED.get(metric, metric) for metric in metrics))
    notes = dict.fromkeys(known[name].note for name in shown if name in known)
    return "\n\n".join([markdown(head, rows), *(f"{note.capitalize()}." for note in notes if note)])


def spread(row: Measured | None, metric: str) -> str:
    """Returns a value, or the mean and the standard deviation of several."""
    value = mean_of(row, metric)
    if row is None or value is None:
        return NOT_RUN
    known = deviation(row, metric)
    return number(value) + (f" ± {number(known)}" if known is not None else "")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page_files(root: Path) -> list[Path]:
    """Returns the paths of all pages. Raises UserError if one is not there."""
    for path in (paths := [root / name for name in PAGES]):
        if not path.is_file():
            raise UserError(f"{path}: no such page; run this in a checkout of fmjax")
    return paths


def write_pages(claims: Claims, root: Path) -> list[str]:
    """Writes the tables of all pages; returns the names of those that have changed."""
    changed = []
    for name, path in zip(PAGES, page_files(root), strict=True):
        before = path.read_text(encoding="utf-8")
        after = written(before, claims)
        if after != before:
            write_atomically(path, after)
            changed.append(name)
    return changed
