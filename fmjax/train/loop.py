"""The training loop: steps, evaluations, checkpoints, and an orderly end whatever ends it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import ExitStack, nullcontext
from pathlib import Path

import jax

from fmjax.contracts import Config
from fmjax.data.stream.batches import TrainBatches
from fmjax.distributed import hosts
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.hardware import explained
from fmjax.randomness import dropout_key
from fmjax.runs import folder as run_folder
from fmjax.runs.best import best_step
from fmjax.runs.logs import Bar
from fmjax.train import ending, start
from fmjax.train.experiment import Experiment, prepare
from fmjax.train.judge import Judge
from fmjax.train.length import schedule_change
from fmjax.train.profile import Profile
from fmjax.train.recorder import Recorder
from fmjax.train.saver import Saver, evaluated_params
from fmjax.train.signals import Signals, interruption
from fmjax.train.stages import training_step
from fmjax.train.state import TrainState
from fmjax.train.throughput import Costs


def train(
    given: Config,
    workdir: Path,
    title: str = "train",
    profile: Path | None = None,
    overridden: Collection[str] = (),
) -> dict[str, float]:
    """Runs a config in a run directory, or continues it; returns the last evaluation's metrics.

    Traces a few steps into the folder `profile`, if there is one. `overridden` are the keys of the
    config that do not come from its file. Raises UserError if the config or the data do not fit,
    Interrupted if a signal ended the run after its state was saved.
    """
    run_folder.check_workdir(workdir)
    with explained(), run_folder.locked(workdir) if hosts.first() else nullcontext():
        experiment = prepare(given, workdir, overridden)
        start.record(experiment, given)
        with experiment.abstract.layout.active():
            return run(experiment, title, profile)


def run(experiment: Experiment, title: str, profile: Path | None) -> dict[str, float]:
    """Trains from the newest checkpoint, or from the start, to the last step.

    Returns the last evaluation's metrics.
    """
    with ExitStack() as stack:
        batches = start.training_batches(experiment)
        stack.callback(batches.close)
        best = best_step(experiment.config, experiment.built.task)
        saver = Saver(experiment, batches, best)
        stack.callback(saver.close)
        state, nonfinite = saver.restore()
        begun = int(state.step)
        start.announce(experiment, begun)
        if begun:
            announce_length(experiment, begun)
        bar = Bar(title, experiment.built.steps, begun)
        recorder = Recorder(experiment, begun, bar, nonfinite)
        stack.callback(recorder.close)
        judge = Judge(experiment, recorder)
        loop = Loop(experiment, batches, saver, recorder, judge)
        with loop.signals.noted(), bar:
            loop.run(state, Profile(profile, begun))
    if hosts.first():
        say(ending.done(experiment, sys.argv[0]))
    return judge.metrics


def announce_length(experiment: Experiment, begun: int) -> None:
    """Says what another length than before changes in the learning rate of a run that goes on."""
    params, steps = experiment.abstract.state.params, experiment.built.steps
    before, workdir = experiment.steps_before, experiment.workdir
    if changed := schedule_change(experiment.config, params, before, steps, begun, workdir):
        say(changed)


class Loop:
    """One process's part in a run: takes steps, and evaluates and saves where that is due."""

    def __init__(
        self,
        experiment: Experiment,
        batches: TrainBatches,
        saver: Saver,
        recorder: Recorder,
        judge: Judge,
    ):
        config, built = experiment.config, experiment.built
        self.experiment, self.batches, self.last = experiment, batches, built.steps
        self.saver, self.recorder, self.judge, self.signals = saver, recorder, judge, Signals()
        self.eval_every = int(config["train"].get("eval_every", 0))
        self.save_every = int(config["checkpoint"]["every"])
        self.costs = Costs(built.model, built.task, experiment.batch_size)
        self.key = dropout_key(experiment.seed, config["train"].get("dropout_rng", "threefry2x32"))
        step = training_step(config, built.model, built.task, experiment.abstract)
        self.take_step = jax.jit(step, donate_argnums=0)

    def run(self, state: TrainState, profile: Profile) -> None:
        """Takes the steps that are left.

        Raises Interrupted if a signal ended them, once the state is saved.
        """
        saved = step = int(state.step)
        while step < self.last and not self.judge.out_of_patience(step):
            step += 1
            state = self.step(state, step, profile)
            # Read once: a signal that comes later ends the next step.
            waiting = self.due("eval", step) or self.due("save", step)
            caught = self.signals.agreed(step, waiting)
            if self.finish(state, step, caught):
                saved = step
            if caught and step < self.last:
                self.saver.wait()
                profile.close(step)
                raise interruption(caught, step)
        profile.close(step)
        if saved < step:
            self.save(state, step)

    def step(self, state: TrainState, step: int, profile: Profile) -> TrainState:
        """Returns the state after a step; its metrics are read when the next one is under way."""
        profile.before(step)
        recorder = self.recorder
        with recorder.waiting():
            batch = next(self.batches)
        cost, new = self.costs.of(batch)
        if new:  # the step is compiled, which takes long: before that
            recorder.compiling()
        with recorder.clock.paused() if new else nullcontext():
            state, metrics = self.take_step(state, self.experiment.place(batch), self.key)
        recorder.ended(step, cost, metrics)
        if profile.due(step):
            with recorder.clock.paused():
                profile.end(step, metrics)
        return state

    def finish(self, state: TrainState, step: int, caught: int) -> bool:
        """Evaluates and saves where that is due; returns whether the step was saved."""
        final, improved = step == self.last, False
        if not (caught or final or self.due("eval", step) or self.due("save", step)):
            return False
        self.recorder.read()
        with self.recorder.clock.paused():
            # After a signal as well: once this step is saved, nothing would make up for it.
            if final or self.due("eval", step):
                improved = self.evaluate(state, step)
            saves = bool(caught) or final or improved or self.due("save", step)
            if saves:
                self.save(state, step)
        return saves

    def evaluate(self, state: TrainState, step: int) -> bool:
        """Returns whether the step is the best so far; saves it first where it cannot be told."""
        try:
            return self.judge.evaluate(evaluated_params(state), step)
        except UserError:
            self.save(state, step)
            raise

    def save(self, state: TrainState, step: int) -> None:
        self.saver.save(state, step, self.recorder.nonfinite, self.judge.metrics_at(step))

    def due(self, what: str, step: int) -> bool:
        every = self.eval_every if what == "eval" else self.save_every
        return every > 0 and step % every == 0
