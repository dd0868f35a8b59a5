"""Tables of results: on the terminal, in report.html, and in the pages, which are written from the
claims.

A page has a table between two comments, `<!-- claims: NAME -->` and `<!-- end of claims -->`; NAME
is an experiment, or "all".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean, stdev

from fmjax.config.json_files import write_atomically, write_json
from fmjax.errors import UserError
from fmjax.experiments.entries import Claims, Experiment, Measured
from fmjax.experiments.floors import FLOORS
from fmjax.experiments.verdicts import NOT_RUN, Rows, Verdict, number, verdicts
from fmjax.runs.outcome import table
from fmjax.runs.report import STYLE

PAGES = ("README.md", "configs/README.md")
BLOCK = re.compile(r"(<!-- claims: ([a-z0-9-]+) -->\n)(.*?)(<!-- end of claims -->)", re.S)
HEAD = ("claim", "metric", "published", "ours", "interval", "floor", "verdict")
MARK = "# --- measured"
CALLED = {
    "f1_macro": "macro-F1",
    "roc_auc": "AUC",
    "exact_match": "exact match",
    "f1": "F1",
    "bleu": "BLEU",
    "chrf": "chrF",
}


def report(one: Experiment, claimed: Rows, found: Rows, folder: Path) -> list[Verdict]:
    """Writes report.html and report.json into the folder of an experiment; returns the verdicts."""
    judged = verdicts(one, claimed, found)
    rows = [row for verdict in judged for row in [cells(verdict)]]
    command = f"python scripts/reproduce.py {one.name}"
    links = [
        f'<li><a href="{escape(path.parent.name)}/report.html">{escape(path.parent.name)}</a></li>'
        for path in sorted(folder.glob("*/report.html"))
    ]
    body = "".join(
        [
            f"<h1>{escape(one.title)}</h1><p><code>{escape(command)}</code></p>",
            table(HEAD, [[escape(cell) for cell in row] for row in rows]),
            "<h2>Measured</h2>",
            table(
                ("what", "values", "CPU minutes", "commit", "day", "machine"), details(one, found)
            ),
            f"<h2>Runs</h2><ul>{''.join(links)}</ul>",
        ]
    )
    title = f"<title>{escape(one.title)}</title>"
    head = f'<meta charset="utf-8">{title}<style>{STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    write_atomically(folder / "report.html", page)
    write_json(
        folder / "report.json",
        {
            "experiment": one.name,
            "claims": [verdict._asdict() | {"claim": vars(verdict.claim)} for verdict in judged],
            "measured": {name: vars(row) for name, row in found.items()},
        },
    )
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
            f"<code>{escape(row.commit[:12])}</code>",
            escape(row.date),
            escape(row.machine),
        )
        for name, row in found.items()
    ]


def row_label(one: Experiment, name: str) -> str:
    """Returns what tables call a run or a floor."""
    run, _, floor = name.partition("/")
    return FLOORS[floor][0] if floor else one.runs[run].label


def cells(verdict: Verdict) -> list[str]:
    """Returns a claim's row of the table: as HEAD."""
    claim = verdict.claim
    published = f"{number(claim.published)} ({claim.source})" if claim.published is not None else ""
    ours = "" if verdict.value is None else number(verdict.value)
    outcome = {None: "", True: "holds", False: "FAILS"}[verdict.holds]
    words = ": ".join(part for part in (outcome, verdict.words) if part)
    return [
        verdict.label,
        CALLED.get(claim.metric, claim.metric),
        published,
        ours,
        verdict.interval,
        verdict.floor,
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
        ours = (
            ""
            if verdict.value is None
            else f"**{number(verdict.value)}** {verdict.interval}".strip()
        )
        minutes = f"{row.cpu_minutes:.0f}" if row and row.cpu_minutes >= 1 else ""
        rows.append(
            [
                *first,
                CALLED.get(claim.metric, claim.metric),
                published,
                ours,
                verdict.floor,
                minutes,
                verdict.words,
            ]
        )
    return rows


def metrics_table(one: Experiment, known: Rows) -> str:
    """Returns a table of floors and runs, each with all metrics that claims name."""
    metrics = list(dict.fromkeys(metric for claim in one.claims for metric in claim.metrics))
    names = [f"{one.data_run(claim.run)}/{floor}" for claim in one.claims for floor in claim.floors]
    rows, seen = [], set[str]()
    for name in [*names, *(claim.run for claim in one.claims)]:
        label = row_label(one, name)
        if label in seen:
            continue
        seen.add(label)
        row = known.get(name)
        rows.append([label, *(spread(row, metric) for metric in metrics)])
    return markdown(("model", *(CALLED.get(metric, metric) for metric in metrics)), rows)


def spread(row: Measured | None, metric: str) -> str:
    """Returns a value, or the mean and the standard deviation of several."""
    values = row.values.get(metric, ()) if row else ()
    if row is None or not values:
        return NOT_RUN
    known = stdev(values) if len(values) > 1 else row.deviation.get(metric)
    return number(mean(values)) + (f" ± {number(known)}" if known is not None else "")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_pages(claims: Claims, root: Path) -> list[str]:
    """Writes the tables of all pages; returns the names of those that have changed."""
    changed = []
    for name in PAGES:
        path = root / name
        if not path.is_file():
            raise UserError(f"{path}: no such page; run this in a checkout of fmjax")
        before = path.read_text(encoding="utf-8")
        after = written(before, claims)
        if after != before:
            write_atomically(path, after)
            changed.append(name)
    return changed


def record(path: Path, measured: Mapping[str, Rows]) -> None:
    """Writes what was measured into the file of claims; the text before it stays as it is."""
    text = path.read_text(encoding="utf-8")
    if MARK not in text:
        raise UserError(f"{path}: has no line that begins with {MARK}; add it at the end")
    head = text[: text.index("\n", text.index(MARK)) + 1]
    parts = [head]
    for name, rows in measured.items():
        for label, row in rows.items():
            parts.append(f"\n[measured.{name}.{json.dumps(label)}]\n")
            for name_of, group in (("values", row.values), ("deviation", row.deviation)):
                parts += [f"{name_of}.{key} = {json.dumps(one)}\n" for key, one in group.items()]
            plain = {
                key: one for key, one in vars(row).items() if one and not isinstance(one, dict)
            }
            parts += [
                f"{key} = {json.dumps(one, ensure_ascii=False)}\n" for key, one in plain.items()
            ]
    write_atomically(path, "".join(parts))
