"""The training loop: steps, evaluations, checkpoints, and an orderly end whatever ends it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import jax

from fmjax.contracts import Config
from fmjax.distributed import hosts
from fmjax.distributed.compiler import compiler_options
from fmjax.distributed.progress import Bar
from fmjax.errors import UserError
from fmjax.filesystems.paths import RunPath
from fmjax.hardware import explained
from fmjax.randomness import dropout_key
from fmjax.runs import folder as run_folder
from fmjax.runs.lock import Lock
from fmjax.train import ending, start
from fmjax.train.experiment import Experiment, prepare
from fmjax.train.judge import Judge
from fmjax.train.profile import Profile
from fmjax.train.recorder import Recorder
from fmjax.train.rescue import rescuing
from fmjax.train.saver import Saver, evaluated_params
from fmjax.train.signals import Signals, interruption
from fmjax.train.stages import training_step
from fmjax.train.throughput import Costs


def train(
    given: Config,
    workdir: RunPath,
    title: str = "train",
    profile: Path | None = None,
    overridden: Collection[str] = (),
) -> dict[str, float]:
    """Runs a config in a run directory, or continues it; returns the last evaluation's metrics.

    Traces a few steps into the folder `profile`, if there is one. `overridden` are the keys of the
    config that do not come from its file. Raises UserError if the config or the data do not fit,
    Interrupted if a signal ended the run after its state was saved.
    """
    with explained(), run_folder.entered(workdir) as lock:
        experiment = prepare(given, workdir, overridden)
        start.record(experiment, given)
        with experiment.abstract.layout.active(), ExitStack() as stack:
            loop = Loop(experiment, title, stack, lock)
            with rescuing(loop, given):
                loop.run(Profile(profile, loop.begun))
        if hosts.first():
            hosts.say(ending.done(experiment, sys.argv[0]))
        return loop.judge.metrics


class Loop:
    """One process's part in a run: takes steps, and evaluates and saves where that is due."""

    def __init__(self, experiment: Experiment, title: str, stack: ExitStack, lock: Lock):
        """Restores the newest checkpoint's state, or makes the first; opens what `stack` closes."""
        config, built = experiment.config, experiment.built
        self.experiment, self.last, self.lock = experiment, built.steps, lock
        self.batches = start.training_batches(experiment)
        stack.callback(self.batches.close)
        self.saver = Saver(experiment, self.batches, lambda: self.recorder.upload())
        stack.callback(self.saver.close)
        self.state, nonfinite = self.saver.restore()
        self.begun = int(self.state.step)
        start.announce(experiment, self.begun)
        bar = Bar(title, self.last, self.begun)
        self.recorder = Recorder(experiment, self.begun, bar, nonfinite, lock)
        stack.callback(self.recorder.close)
        self.judge, self.signals = Judge(experiment, self.recorder), Signals()
        self.every = int(config["train"].get("eval_every", 0)), int(config["checkpoint"]["every"])
        self.costs = Costs(built.model, built.task, experiment.batch_size)
        self.key = dropout_key(experiment.seed, config["train"].get("dropout_rng", "threefry2x32"))
        step = training_step(config, built.model, built.task, experiment.abstract)
        options = compiler_options(experiment.abstract.layout.mesh)
        self.take_step = jax.jit(step, donate_argnums=0, compiler_options=options)

    def run(self, profile: Profile) -> None:
        """Takes the steps left. Raises Interrupted after a signal, once the state is saved."""
        with self.signals.noted(), self.recorder.bar:
            saved = step = self.begun
            while step < self.last and not self.judge.out_of_patience(step):
                step += 1
                self.step(step, profile)
                # Read once: a signal that comes later ends the next step.
                caught = self.signals.agreed(step, waiting=any(self.due(step)))
                if self.finish(step, caught):
                    saved = step
                if caught and step < self.last:
                    self.saver.wait()
                    profile.close(step)
                    raise interruption(caught, step)
            profile.close(step)
            if saved < step:
                self.save(step)

    def step(self, step: int, profile: Profile) -> None:
        """Takes a step; its metrics are read when the next one is under way."""
        if self.lock.lost:  # as a heartbeat has noticed
            self.lock.check()
        profile.before(step)
        recorder = self.recorder
        with recorder.waiting():
            batch = next(self.batches)
        cost, new = self.costs.of(batch)
        with recorder.computing(compiled=new):
            placed = self.experiment.place(batch)
            self.state, metrics = self.take_step(self.state, placed, self.key)
        recorder.ended(step, cost, metrics)
        if profile.due(step):
            with recorder.clock.paused():
                profile.end(step, metrics)

    def finish(self, step: int, caught: int) -> bool:
        """Evaluates and saves where that is due; returns whether the step was saved."""
        final = step == self.last
        evaluates, saves = (due or final for due in self.due(step))
        if not (caught or evaluates or saves):
            return False
        self.recorder.read()
        with self.recorder.clock.paused():
            # After a signal as well: once this step is saved, nothing would make up for it.
            improved = evaluates and self.evaluate(step)
            if kept := bool(caught) or saves or improved:
                self.save(step)
        return kept

    def evaluate(self, step: int) -> bool:
        """Returns whether the step is the best so far; saves it first where it cannot be told."""
        try:
            return self.judge.evaluate(evaluated_params(self.state), step)
        except UserError:
            self.save(step)
            raise

    def save(self, step: int) -> None:
        self.lock.check()
        nonfinite, metrics = self.recorder.nonfinite, self.judge.metrics_at(step)
        self.saver.save(self.state, step, nonfinite, metrics)

    def due(self, step: int) -> tuple[bool, bool]:
        """Returns whether a step is to be evaluated, and whether it is to be saved."""
        evaluates, saves = (every > 0 and step % every == 0 for every in self.every)
        return evaluates, saves
