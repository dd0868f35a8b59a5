"""The logs of a run: `metrics.jsonl`, TensorBoard events, and a progress bar or plain lines on the
screen.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from fmjax.buckets import BucketPath
from fmjax.config.json_files import to_line, write_atomically
from fmjax.contracts import Record
from fmjax.distributed import hosts
from fmjax.distributed.hosts import console, say
from fmjax.paths import RunPath
from fmjax.runs.spool import Spool

METRICS = "metrics.jsonl"
EVALUATION = "eval/validation/"  # prefix of the names of validation metrics
QUIET_SECONDS = 10.0  # seconds between two progress lines in a log file
T = TypeVar("T")


def read_metrics(workdir: RunPath) -> list[Record]:
    """Returns the records of `metrics.jsonl`, none if there is no such file.

    A line that was truncated by a kill is left out.
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

    Opening it truncates both to the step that a run resumes from.
    """

    def __init__(self, workdir: RunPath, step: int):
        kept = [record for record in read_metrics(workdir) if record["step"] <= step]
        self._spool: Spool | None = None
        if isinstance(workdir, BucketPath):
            self._spool = Spool(workdir)
            workdir = self._spool.folder
        write_atomically(workdir / METRICS, "".join(to_line(record) + "\n" for record in kept))
        # Closed by close().
        self._file = open(workdir / METRICS, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        # TensorBoard itself drops events of earlier files past purge_step.
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends {"step": step, **values} as one line, NaN and infinity as null."""
        self._file.write(to_line({"step": step} | dict(values)) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def upload(self) -> None:
        """Uploads what was written so far, if the run is in a bucket.

        Raises OSError if that fails.
        """
        if self._spool:
            self._board.flush()
            self._spool.upload()

    def close(self, upload: bool = True) -> None:
        """Ends the log, in a bucket with all that was written unless told otherwise."""
        self._file.close()
        self._board.close()
        if self._spool:
            self._spool.close(upload)


class Bar:
    """The progress of a run or an evaluation: a progress bar on a terminal, one changing line in a
    notebook.

    Elsewhere, as in a log file, `progress` prints plain lines, at most one every 10 seconds.
    """

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.total, self.done = title, total, done
        self.terminal = sys.stderr.isatty() and hosts.first()
        self.notebook = NotebookLine() if in_notebook() and hosts.first() else None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        # rich would need ipywidgets in a notebook.
        disable = not self.terminal or self.notebook is not None
        self._progress = Progress(*columns, console=console(), disable=disable)
        self._task = self._progress.add_task(title, total=total, completed=done, note="")
        self._printed = -math.inf  # time of the last plain progress line

    @property
    def visible(self) -> bool:
        """Whether there is a visible bar."""
        return self.terminal or self.notebook is not None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self.notebook:
            self.notebook.close()

    def advance(self, done: int, note: str = "") -> None:
        """Moves the bar to `done`, with a note beside it."""
        self.done = done
        self._progress.update(self._task, completed=done, note=note)
        if self.notebook:
            self.notebook.show(f"{self.title} {drawn(done, self.total)} {note}".rstrip())

    def busy(self, note: str, line: str = "") -> None:
        """Shows beside the bar what takes longer than a step, such as "compiling ..."; without a
        bar, prints a line.
        """
        self.advance(self.done, note)
        if line and not self.visible:
            say(line)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items, advancing the bar by one for each."""
        for done, item in enumerate(items):
            yield item
            self.advance(done + 1)

    def progress(self, text: str) -> None:
        """Prints a progress line if there is no bar, unless the last one is less than 10 seconds
        old.
        """
        now = time.monotonic()
        if not self.visible and now - self._printed >= QUIET_SECONDS:
            self._printed = now
            say(text)

    def note(self, text: str) -> None:
        """Prints a line: above the bar on a terminal."""
        if self.terminal and not self.notebook:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)


class NotebookLine:
    """One line of a notebook's output that changes in place, at most four times a second."""

    def __init__(self) -> None:
        # Imported only where IPython already runs.
        self._display = importlib.import_module("IPython.display")
        self._handle: Any = None
        self._shown = -math.inf
        self._text = ""

    def show(self, text: str) -> None:
        self._text = text
        now = time.monotonic()
        if now - self._shown >= 0.25:
            self._shown = now
            self._write()

    def close(self) -> None:
        """Shows the last text."""
        self._write()

    def _write(self) -> None:
        content = {"text/plain": self._text}
        if self._handle is None:
            self._handle = self._display.display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a Jupyter or Colab notebook."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell else None
    return running is not None and "IPKernelApp" in running.config


def drawn(done: int, total: int, width: int = 24) -> str:
    """Returns a text bar and the numbers."""
    full = round(width * min(done / max(total, 1), 1.0))
    return f"[{'#' * full}{'.' * (width - full)}] {done:,} of {total:,}"
