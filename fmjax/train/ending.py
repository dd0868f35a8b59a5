"""The last line of a run: its result, and the next command."""

from __future__ import annotations

import shlex
from pathlib import Path

from fmjax.filesystems.paths import RunPath
from fmjax.runs import evaluation
from fmjax.runs.report import REPORT
from fmjax.train.experiment import Experiment

# Tasks for pretraining.
PRETRAINING = ("mlm", "span_corruption", "denoise", "mae")


def done(experiment: Experiment, command: str) -> str:
    """Returns the line.

    Args:
      experiment: a finished run.
      command: the program that ran it, `sys.argv[0]`.
    """
    workdir, config = experiment.workdir, experiment.config
    found = evaluation.read(workdir)
    if found:
        result = found.headline()
    else:  # also for a run of an older version with an earlier best step
        validated = "validation" in experiment.built.examples
        result = f"step {experiment.built.steps:,}{'' if validated else ', no validation data'}"
    if config["task"]["name"] in PRETRAINING:
        following = f"fine-tune with --config.init.weights={quoted(workdir)}"
    else:
        following = predicting(workdir, command)
    return f"done: {result}; report: {workdir / REPORT}; next: {following}"


def predicting(workdir: RunPath, command: str) -> str:
    """Returns how to predict with a run, in the form in which it was started: a script, an
    installed command, or Python.
    """
    flags = f"--workdir {quoted(workdir)} --input in.jsonl --output out.jsonl"
    if Path(command).name == "fmjax-train":
        return f"fmjax-predict {flags}"
    if Path(command).name == "train.py":
        return f"python {quoted(Path(command).with_name('predict.py'))} {flags}"
    return f'fmjax.load("{workdir}").predict([...])'


def quoted(path: RunPath) -> str:
    return shlex.quote(str(path))
