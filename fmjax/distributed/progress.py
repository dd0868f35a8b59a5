"""The progress of long work: a bar on a terminal, one changing line in a notebook, plain lines
elsewhere."""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fmjax.distributed import hosts
from fmjax.distributed.hosts import console, say

AT_ONCE = 1.0  # seconds of a pass over records before its progress is shown
QUIET_SECONDS = 10.0  # seconds between two progress lines in a log file
T = TypeVar("T")


class Bar:
    """The progress of a run or an evaluation: a progress bar on a terminal, one changing line in a
    notebook.

    Elsewhere, as in a log file, `progress` prints plain lines, at most one every 10 seconds.
    """

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.total, self.done = title, total, done
        self._note = ""  # that of the last `advance`
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # otherwise it keeps showing what was going on
            self._show(self._note)
        self._progress.stop()
        if self.notebook:
            self.notebook.close()

    def advance(self, done: int, note: str = "") -> None:
        """Moves the bar to `done`, with a note beside it."""
        self.done, self._note = done, note
        self._show(note)

    def _show(self, note: str) -> None:
        self._progress.update(self._task, completed=self.done, note=note)
        if self.notebook:
            self.notebook.show(f"{self.title} {drawn(self.done, self.total)} {note}".rstrip())

    def busy(self, note: str, line: str = "") -> None:
        """Shows beside the bar what takes longer than a step, such as "compiling ..."; without a
        bar, prints a line.
        """
        self._show(note)
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


class RecordProgress:
    """The progress of a pass over records, shown once it has taken a second: a bar, or a line every
    10 seconds.

    Args:
      title: what is done with them, such as "tokenize".
      total: the number of records.
    """

    def __init__(self, title: str, total: int):
        self.title, self.total, self.begun = title, total, time.monotonic()
        self.bar: Bar | None = None

    def __enter__(self) -> RecordProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.__exit__(kind)

    def advance(self, done: int, count: int = 0, unit: str = "") -> None:
        """Shows how many records are done, and the `count` of something per second."""
        took = time.monotonic() - self.begun
        if took < AT_ONCE:
            return
        if self.bar is None:
            self.bar = Bar(self.title, self.total).__enter__()
        rate = f"{count / took:,.0f} {unit}/s" if unit else ""
        left = round(took / max(done, 1) * (self.total - done))
        self.bar.advance(done, rate)
        self.bar.progress(
            f"{self.title}: {done / max(self.total, 1):.0%} of {self.total:,} records, "
            f"{rate + ', ' if rate else ''}{left // 60}:{left % 60:02} left"
        )


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
