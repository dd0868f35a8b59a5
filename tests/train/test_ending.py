"""The last line of a run names its best step, its report, and what to do next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fmjax.runs import evaluation
from fmjax.runs.evaluation import Evaluation
from fmjax.train import ending


def experiment(folder: Path, task: str = "classify", *splits: str) -> Any:
    built = SimpleNamespace(steps=20, examples=dict.fromkeys(splits))
    return SimpleNamespace(workdir=folder, config={"task": {"name": task}}, built=built)


@pytest.mark.parametrize(
    ("command", "following"),
    [
        ("scripts/train.py", "python scripts/predict.py --workdir 'my run' --input in.jsonl --output out.jsonl"),
        ("/usr/bin/fmjax-train", "fmjax-predict --workdir 'my run' --input in.jsonl --output out.jsonl"),
        ("ipykernel_launcher.py", 'fmjax.load("my run").predict([...])'),
    ],
)
def test_what_next_is_how_the_run_was_started(command, following, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("my run")
    folder.mkdir()
    evaluation.write(folder, Evaluation(10, {"loss": 0.5, "accuracy": 0.75}, ("accuracy",), "accuracy"))
    line = ending.done(experiment(folder), command)
    assert line == (
        "done: best step 10, validation loss 0.5000, accuracy 0.7500; "
        f"report: my run/report.html; next: {following}"
    )


def test_pretraining_is_to_be_fine_tuned(tmp_path):
    line = ending.done(experiment(tmp_path, "mlm"), "train.py")
    assert line.startswith("done: step 20, no validation data; report: ")
    assert line.endswith(f"next: fine-tune with --config.init.weights={tmp_path}")


def test_a_run_of_an_older_version_has_no_evaluation_to_show(tmp_path):
    assert ending.done(experiment(tmp_path, "mlm", "validation"), "train.py").startswith("done: step 20; report: ")
