"""If a bucket rejects further writes, what was trained since the newest checkpoint is saved
locally."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from fmjax.config.json_files import to_line, write_atomically
from fmjax.contracts import Config
from fmjax.data.storage import cache
from fmjax.distributed import hosts
from fmjax.errors import UserError, one_line
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import explanation
from fmjax.runs.checkpoint import NotSaved
from fmjax.runs.logs import METRICS
from fmjax.train import start
from fmjax.train.experiment import Experiment
from fmjax.train.recorder import Recorder
from fmjax.train.saver import Saver
from fmjax.train.state import TrainState


class Running(Protocol):
    """What a loop has."""

    experiment: Experiment
    state: TrainState
    saver: Saver
    recorder: Recorder


@contextmanager
def rescuing(running: Running, given: Config) -> Iterator[None]:
    """Saves the state of a run in a bucket as a local run if the bucket rejects further writes.

    Leaves a local run alone. Of several hosts none has the whole state, so that the steps since the
    newest checkpoint are lost.

    Args:
      running: the loop that the block runs.
      given: the config of the run as it was given.

    Raises UserError, naming the local run or what is lost.
    """
    try:
        yield
        if isinstance(running.experiment.workdir, BucketPath):
            running.saver.wait()
    except (NotSaved, OSError) as error:
        line = explanation(error) if isinstance(error, OSError) else str(error)
        local = isinstance(running.experiment.workdir, Path)
        if local or line is None:
            raise
        if hosts.several():
            running.recorder.abandon()
            raise UserError(
                f"{line}; the steps since the newest checkpoint are lost, as no host has the whole "
                "state"
            ) from error
        raise UserError(f"{line}; {saved_here(running, given)}") from error


def saved_here(running: Running, given: Config) -> str:
    """Saves a run as a local one, with its newest state; returns where, or why not."""
    state, recorder, saver = running.state, running.recorder, running.saver
    step = int(state.step)
    with suppress(UserError):  # of a save under way, which would replace ours at the end
        saver.wait()
    recorder.abandon()
    try:
        parent = cache.folder() / "rescued"
        parent.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "-", f"{running.experiment.workdir.name}-step-{step}-")
        folder = Path(tempfile.mkdtemp(prefix=name, dir=parent))
        local = dataclasses.replace(running.experiment, workdir=folder, resumed=False)
        lines = "".join(to_line(record) + "\n" for record in recorder.records)
        write_atomically(folder / METRICS, lines)
        with closing(Saver(local, saver.batches)) as here:
            here.save(state, step, recorder.nonfinite, None)
        start.record(local, given)
    except (OSError, UserError) as error:
        return f"step {step} could not be saved here either ({one_line(error)})"
    return f"step {step} is saved here: --workdir={folder} continues from it, on this machine"
