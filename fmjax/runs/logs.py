"""What a run logs: `metrics.jsonl`, TensorBoard events, and a progress bar or plain lines on the
screen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from fmjax.config.json_files import to_line, write_atomically
from fmjax.contracts import Record
from fmjax.distributed import hosts
from fmjax.distributed.hosts import console, say

METRICS = "metrics.jsonl"
EVALUATION = "eval/validation/"  # before the names of the metrics that training sees
T = TypeVar("T")


def read_metrics(workdir: Path) -> list[Record]:
    """Returns the records of `metrics.jsonl`, none if there is no such file.

    A line cut short by a kill is left out.
    """
    path = workdir / METRICS
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsLog:
    """Writes metrics to `metrics.jsonl` and TensorBoard.

    Opening it cuts both back to the step a run resumes from.
    """

    def __init__(self, workdir: Path, step: int):
        kept = [record for record in read_metrics(workdir) if record["step"] <= step]
        write_atomically(workdir / METRICS, "".join(to_line(record) + "\n" for record in kept))
        # Closed by close().
        self._file = open(workdir / METRICS, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        # TensorBoard itself drops what an earlier events file says past purge_step.
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends {"step": step, **values} as one line, NaN and infinity as null."""
        self._file.write(to_line({"step": step} | dict(values)) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


class Bar:
    """A progress bar with loss, tokens/s and time left.

    On anything but a terminal, `note` prints plain lines instead.
    """

    def __init__(self, title: str, total: int, done: int = 0):
        self.terminal = sys.stderr.isatty() and hosts.first()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        self._progress = Progress(*columns, console=console(), disable=not self.terminal)
        self._task = self._progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, done: int, note: str = "") -> None:
        """Moves the bar to `done`, with a note beside it."""
        self._progress.update(self._task, completed=done, note=note)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items, moving on by one at each."""
        for done, item in enumerate(items):
            yield item
            self.advance(done + 1)

    def note(self, text: str) -> None:
        """Prints a line: above the bar on a terminal."""
        if self.terminal:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)
