"""How far a run is: lines in a log file, one line that changes in a notebook."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from fmjax.distributed import progress
from fmjax.distributed.progress import Bar, RecordProgress, drawn


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_a_log_file_has_at_most_a_line_of_progress_every_10_seconds(monkeypatch, capsys):
    clock, bar = Clock(monkeypatch), Bar("train", 100)
    with bar:
        bar.busy("compiling ...", line="compiling the training step ...")
        for step in range(1, 31):
            bar.advance(step, "loss 1.0")
            bar.progress(f"step {step}")
            clock.now += 1
        bar.note("step 30 validation: loss 1.0")
    assert capsys.readouterr().err.splitlines() == [
        "compiling the training step ...",
        "step 1",
        "step 11",
        "step 21",
        "step 30 validation: loss 1.0",
    ]


def test_a_pass_over_no_records(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with RecordProgress("tokenize", 0) as shown:
        clock.now += 5
        shown.advance(0)
    assert capsys.readouterr().err == "tokenize: 0% of 0 records, 0:00 left\n"


def test_a_notebook_has_one_line_that_changes(monkeypatch, capsys):
    shown: list[list[str]] = []

    class Handle:
        def update(self, content, raw):
            shown[-1].append(content["text/plain"])

    def display(content, raw, display_id):
        shown.append([content["text/plain"]])
        return Handle()

    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    clock = Clock(monkeypatch)
    with Bar("train", 4) as bar:
        bar.busy("compiling ...", line="compiling the training step ...")
        for step in range(1, 5):
            clock.now += 1 if step == 3 else 0.001
            bar.advance(step, f"loss {step}")
            bar.progress(f"step {step}")
        bar.busy("evaluating ...")
    assert shown == [
        [
            f"train {drawn(0, 4)} compiling ...",
            f"train {drawn(3, 4)} loss 3",
            f"train {drawn(4, 4)} loss 4",  # the last one always
        ]
    ]
    assert capsys.readouterr().err == ""


def test_a_bar_of_characters():
    assert drawn(1, 4) == f"[{'#' * 6}{'.' * 18}] 1 of 4"
    assert drawn(1200, 1000).startswith("[" + "#" * 24)
