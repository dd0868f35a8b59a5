"""The selected evaluation of a run: its step, its metrics, and the details for the report.

It is that of the best step, or the newest one if no metric chooses the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fmjax.config.json_files import read_json, write_json
from fmjax.contracts import Record
from fmjax.filesystems.paths import RunPath

FILE = "validation.json"
LOSS = "loss"


class Evaluation(NamedTuple):
    """An evaluation on the validation split."""

    step: int
    metrics: Mapping[str, float]
    leading: Sequence[str] = ()  # names of the metrics to show first
    chosen_by: str = ""  # the metric that chose this step as the best; empty: it is the newest
    details: Mapping[str, Any] = {}  # see `contracts.Task.details`

    def headline(self) -> str:
        """Returns the step and its leading metrics in one line."""
        best = "best step" if self.chosen_by else "step"
        names = (self.chosen_by, *self.leading) if self.chosen_by else self.leading
        return f"{best} {self.step:,}, validation {listed(self.metrics, names)}"


def listed(metrics: Mapping[str, float], leading: Sequence[str]) -> str:
    """Returns the loss and the leading metrics: "loss 0.412, accuracy 0.871"."""
    names = [name for name in dict.fromkeys((LOSS, *leading)) if name in metrics]
    return ", ".join(f"{name} {short(metrics[name])}" for name in names)


def short(value: float) -> str:
    """Returns a number with about four digits, without an exponent if possible."""
    size = abs(value)
    if not math.isfinite(value) or (size and not 1e-3 <= size < 1e9):
        return f"{value:.4g}"
    return f"{value:.4f}" if size < 1 else f"{value:.3f}" if size < 100 else f"{value:,.0f}"


def write(workdir: RunPath, evaluation: Evaluation) -> None:
    """Stores an evaluation in a run directory, replacing an earlier one."""
    write_json(workdir / FILE, evaluation._asdict())


def read(workdir: RunPath) -> Evaluation | None:
    """Returns the stored evaluation, None if there is none."""
    path = workdir / FILE
    stored: Record = read_json(path) if path.exists() else {}
    return Evaluation(**stored) if stored else None
