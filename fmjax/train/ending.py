"""The last line of a run: what came of it, and what to do with it."""

from __future__ import annotations

import shlex
from pathlib import Path

from fmjax.runs import evaluation
from fmjax.runs.report import REPORT
from fmjax.train.experiment import Experiment

# What is learned by these serves to start from.
PRETRAINING = ("mlm", "span_corruption", "denoise", "mae")


def done(experiment: Experiment, command: str) -> str:
    """Returns the line.

    Args:
      experiment: a run that has ended.
      command: the program that ran it, `sys.argv[0]`.
    """
    workdir, config = experiment.workdir, experiment.config
    found = evaluation.read(workdir)
    if found:
        result = found.headline()
    else:  # also of a run that an older version began, with a better step before
        validated = "validation" in experiment.built.examples
        result = f"step {experiment.built.steps:,}{'' if validated else ', no validation data'}"
    if config["task"]["name"] in PRETRAINING:
        following = f"fine-tune with --config.init.weights={quoted(workdir)}"
    else:
        following = predicting(workdir, command)
    return f"done: {result}; report: {workdir / REPORT}; next: {following}"


def predicting(workdir: Path, command: str) -> str:
    """Returns how to predict with a run, in the way that it was started: a script, an installed
    command, or Python.
    """
    flags = f"--workdir {quoted(workdir)} --input in.jsonl --output out.jsonl"
    if Path(command).name == "fmjax-train":
        return f"fmjax-predict {flags}"
    if Path(command).name == "train.py":
        return f"python {quoted(Path(command).with_name('predict.py'))} {flags}"
    return f'fmjax.load("{workdir}").predict([...])'


def quoted(path: Path) -> str:
    return shlex.quote(str(path))
