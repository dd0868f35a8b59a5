"""The parts of the report about the selected evaluation, as HTML: headline, classes, worst
examples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeAlias

from fmjax.runs.evaluation import LOSS, Evaluation, short

Facts: TypeAlias = Mapping[str, Any]
MOST_CLASSES = 40  # maximum rows of the table of classes
MOST_CELLS = (
    16  # maximum classes of a confusion matrix; with more, the most frequent confusions are listed
)
CONFUSIONS = 15


def cards(evaluation: Evaluation | None, provenance: Facts, config: Facts) -> str:
    """Returns the headline: the step and its leading metrics, the time, labels and counts."""
    found: list[tuple[str, str]] = []
    if evaluation:
        found.append(("best step" if evaluation.chosen_by else "step", f"{evaluation.step:,}"))
        names = dict.fromkeys((*evaluation.leading, LOSS))
        found += [
            (f"validation {name}", short(evaluation.metrics[name]))
            for name in names
            if name in evaluation.metrics
        ]
    if seconds := sum(start.get("seconds", 0.0) for start in provenance.get("starts", [])):
        found.append(("training time", duration(seconds)))
    found += [
        (f"{split} examples", f"{count:,}")
        for split, count in provenance.get("examples", {}).items()
    ]
    if labels := config["task"].get("labels"):
        found.append(("labels", f"{len(labels):,}"))
    boxes = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in found)
    return f"<dl>{''.join(boxes)}</dl>" if found else ""


def duration(seconds: float) -> str:
    """Returns a time in a suitable unit."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def class_section(evaluation: Evaluation | None) -> str:
    """Returns the table of classes and their confusions; nothing for a task without classes."""
    details = evaluation.details if evaluation else {}
    classes: Sequence[Facts] = details.get("classes", [])
    if not classes:
        return ""
    chosen, note = classes, ""
    if len(classes) > MOST_CLASSES:
        chosen = sorted(classes, key=lambda row: row["f1"])[:MOST_CLASSES]
        note = f"<p>The {MOST_CLASSES} of {len(classes):,} classes with the lowest F1:</p>"
    measures = ("precision", "recall", "f1")
    rows = [
        (escape(row["label"]), f"{row['count']:,}", *(f"{row[name]:.3f}" for name in measures))
        for row in chosen
    ]
    head = ("label", "examples", "precision", "recall", "F1")
    step = f"<h2>Classes at step {evaluation.step:,}, validation</h2>" if evaluation else ""
    return step + note + table(head, rows, numbers=range(1, 5)) + confusions(details)


def confusions(details: Facts) -> str:
    """Returns the confusion matrix or, for many classes, the most frequent confusions."""
    matrix: Sequence[Sequence[int]] = details.get("confusion", [])
    names = [row["label"] for row in details["classes"]]
    if not matrix:
        return ""
    if len(matrix) <= MOST_CELLS:
        return (
            "<h2>Confusion matrix</h2><p>Rows: true labels. Columns: predicted labels.</p>"
            + grid(matrix, names)
        )
    pairs = [
        (count, names[true], names[predicted])
        for true, row in enumerate(matrix)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    rows = [
        (escape(true), escape(predicted), f"{count:,}")
        for count, true, predicted in sorted(pairs, key=lambda pair: -pair[0])[:CONFUSIONS]
    ]
    return "<h2>Most frequent confusions</h2>" + table(
        ("true label", "predicted", "examples"), rows, numbers=(2,)
    )


def grid(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Returns a confusion matrix, shaded by the fraction of the row: correct ones blue, others
    orange.
    """
    top = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = []
    for true, row in enumerate(matrix):
        total = max(sum(row), 1)
        cells = []
        for predicted, count in enumerate(row):
            color = "first" if true == predicted else "second"
            share = f"{100 * count / total * 0.6:.0f}%"
            style = f"background: color-mix(in srgb, var(--{color}) {share}, transparent)"
            cells.append(f'<td style="{style}">{count:,}</td>')
        body.append(f"<tr><th>{escape(names[true])}</th>{''.join(cells)}</tr>\n")
    inner = f"<thead><tr><th></th>{top}</tr></thead>\n<tbody>{''.join(body)}</tbody>"
    return f'<div class="wide"><table class="matrix">{inner}</table></div>'


def example_sections(evaluation: Evaluation | None) -> str:
    """Returns the worst examples, and a few others where texts are written."""
    details: Facts = evaluation.details if evaluation else {}
    return examples_table("Worst validation examples", details.get("worst", [])) + examples_table(
        "Validation samples", details.get("samples", [])
    )


def examples_table(title: str, examples: Sequence[Facts]) -> str:
    """Returns a table of examples with the same columns; nothing of none."""
    if not examples:
        return ""
    head = list(examples[0])
    numbers = [at for at, name in enumerate(head) if not isinstance(examples[0][name], str)]
    rows = [[shown(row[name]) for name in head] for row in examples]
    return f"<h2>{escape(title)}</h2>" + table(head, rows, numbers, "examples stacked")


def shown(value: str | int | float) -> str:
    """Returns what an example has in a column, as HTML."""
    if isinstance(value, str):
        return escape(value)
    return f"{value:,}" if isinstance(value, int) else short(value)


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Collection[int] = (),
    kind: str = "",
) -> str:
    """Returns an HTML table, which scrolls if it is wider than the screen.

    Args:
      head: the names of the columns.
      rows: their cells, as HTML.
      numbers: the columns of numbers.
      kind: classes of the table; "stacked" puts cells below each other on a phone.
    """
    classes = [' class="number"' if at in numbers else "" for at in range(len(head))]
    top = "".join(f"<th{own}>{escape(name)}</th>" for own, name in zip(classes, head, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{own} data-name="{escape(name)}">{cell}</td>'
            for own, name, cell in zip(classes, head, row, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    inner = f"<thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{kind}">{inner}</table></div>'
