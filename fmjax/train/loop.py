"""The training loop: steps, evaluations, checkpoints, and an orderly end whatever ends it."""

from __future__ import annotations

import hashlib
import json
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fmjax.config import write_config
from fmjax.data.kinds import lifecycle
from fmjax.data.stream import packing
from fmjax.data.stream.batches import TrainBatches
from fmjax.data.stream.examples import PARTS
from fmjax.distributed import hosts
from fmjax.distributed.hosts import say
from fmjax.distributed.sharding import batch_shardings, in_force
from fmjax.errors import Interrupted, UserError
from fmjax.inference.evaluate import evaluate, make_predict
from fmjax.optim import trainable
from fmjax.randomness import dropout_key
from fmjax.runs import folder as run_folder
from fmjax.runs.checkpoint import Best, Checkpoints
from fmjax.runs.logs import EVALUATION, Bar, MetricsLog, read_metrics
from fmjax.runs.report import write_report
from fmjax.train.experiment import Config, Experiment, prepare
from fmjax.train.profile import Profile
from fmjax.train.state import TrainState
from fmjax.train.step import make_step
from fmjax.train.throughput import Clock, Cost, count_read
from fmjax.train.wrappers import judged


def train(given: Config, workdir: Path, title: str = "train", profile: Path | None = None) -> dict[str, float]:
    """Runs a config in a run directory, or continues it; returns the last evaluation's metrics. A few steps are traced into
    the folder `profile`, if there is one.

    Raises UserError if the config or the data do not fit, Interrupted if a signal ended the run after its state was
    saved.
    """
    run_folder.check_workdir(workdir)
    with run_folder.locked(workdir) if hosts.first() else nullcontext():
        experiment = prepare(given, workdir)
        hosts.check_same({name: digest(fact) for name, fact in ({"config": given} | experiment.data).items()})
        if hosts.first():  # once all have read what was there before
            if not experiment.resumed:
                lifecycle.store(workdir, experiment.processors)
            run_folder.record(workdir, experiment.data, experiment.notes)
            run_folder.record_left_out(workdir, experiment.tolerance.found)
            # Last, as the config makes the folder a run; at a restart it takes up what may change.
            write_config(workdir, experiment.config, given)
        with jax.set_mesh(experiment.mesh), nn.logical_axis_rules(in_force(experiment.rules, experiment.mesh)):
            return Run(experiment, title, profile).run()


def digest(fact: Any) -> str:
    """Returns the SHA-256 of a fact that is JSON-able."""
    return hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).hexdigest()


WINDOW = 10  # steps that a rate is taken over, at least


class Signals:
    """Notes SIGTERM and SIGINT; a second one ends the process at once."""

    def __init__(self) -> None:
        self.caught = 0

    @contextmanager
    def noted(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number


class Run:
    """One process's part in a run: what stands still around the state that moves."""

    def __init__(self, experiment: Experiment, title: str, profile: Path | None = None):
        self.experiment, self.title, self.profile = experiment, title, profile
        config = experiment.config
        self.every = {name: int(config["train"].get(f"{name}_every", 0)) for name in ("log", "eval")}
        self.every["checkpoint"] = int(config["checkpoint"]["every"])
        stopping, best = config["train"]["early_stopping"], config["checkpoint"].get("best")
        self.patience = int(stopping["patience"])
        self.stopping = Best(stopping["metric"], stopping["mode"])
        self.best = Best(best, config["checkpoint"]["mode"]) if best else None
        self.checkpoints = Checkpoints(
            experiment.workdir / run_folder.CHECKPOINTS, keep=int(config["checkpoint"]["keep"]), best=self.best
        )
        model, self.task, spec = judged(experiment.model, experiment.task, experiment.spec)
        valid = {"valid": jax.ShapeDtypeStruct((experiment.batch_size,), np.float32)}
        self.shardings = batch_shardings({**spec, **experiment.spec, **valid}, experiment.rules, experiment.mesh)
        self.key = dropout_key(experiment.seed, config["train"].get("dropout_rng", "threefry2x32"))
        parts = int(config["train"].get("accumulate", 1))
        trained = trainable(experiment.abstract.params, config["optim"].get("freeze", ()))
        step = make_step(experiment.model, experiment.task, experiment.optimizer.transform, trained, parts)
        self.step = jax.jit(step, donate_argnums=0)
        self.predict = make_predict(model, self.task, experiment.processors)
        self.most_nonfinite = int(config["train"].get("max_nonfinite", 10))
        self.nonfinite: list[int] = []
        self.skipped = 0  # steps in all that were left out
        self.evaluation: dict[str, float] = {}
        self.evaluated = -1  # at which step
        self.flops: dict[tuple[tuple[int, ...], ...], float] = {}  # of a step, by the shapes of its batch

    def run(self) -> dict[str, float]:
        """Trains from the newest checkpoint, or from the start, to the last step."""
        experiment, signals = self.experiment, Signals()
        batches = self.batches()
        state = self.restore(batches)
        start = int(state.step)
        say(describe(experiment, start))
        if fill := packing.fill_of(experiment.examples["train"]):
            say(f"batches: {packing.describe(fill)}")
        self.records = [record for record in read_metrics(experiment.workdir) if record["step"] <= start]
        self.log = MetricsLog(experiment.workdir, start) if hosts.first() else None
        self.clock = Clock(experiment.processors.unit, max(self.every["log"], WINDOW))
        try:
            with signals.noted(), Bar(self.title, experiment.steps, start) as self.bar:
                self.steps(state, start, batches, signals)
        finally:
            batches.close()
            self.checkpoints.close()
            if self.log:
                self.log.close()
                run_folder.record_left_out(experiment.workdir, experiment.tolerance.found)
                write_report(experiment.workdir)
        return self.evaluation

    def batches(self) -> TrainBatches:
        """Returns the training batches, read ahead as the config says."""
        experiment, data = self.experiment, self.experiment.config["data"]
        return TrainBatches(
            experiment.examples["train"],
            batch_size=experiment.batch_size,
            seed=experiment.seed,
            workers=int(data.get("workers", 0)),
            prefetch=int(data.get("prefetch", 4)),
            rows=experiment.rows,
            tolerance=experiment.tolerance,
            stall_seconds=float(data.get("stall_seconds", 0.0)),
            tell=say,
        )

    def steps(self, state: TrainState, start: int, batches: TrainBatches, signals: Signals) -> None:
        """Takes the steps. Metrics are read one step late, so that the device never waits for the host."""
        last: tuple[int, Cost, Any] | None = None  # a step's number, its cost, and its metrics
        saved, profile = start, Profile(self.profile, start)
        for number in range(start + 1, self.experiment.steps + 1):
            if self.out_of_patience():
                self.bar.note(f"early stopping at step {number - 1}: no better {self.stopping.metric} in {self.patience}")
                break
            profile.before(number)
            with self.clock.waiting(last[2] if last else {}):
                batch = next(batches)
            cost, compiled = self.cost(batch)
            if last and not compiled:
                self.observe(*last)
                last = None
            with nullcontext() if compiled else self.clock.paused():
                state, metrics = self.step(state, self.place(batch), self.key)
            if last:
                self.observe(*last)
            last = (number, cost, metrics)
            if number == start + 1:  # which starts the clock
                self.observe(*last)
                last = None
            if profile.due(number):
                with self.clock.paused():
                    profile.end(number, metrics)

            final = number == self.experiment.steps
            improved = False
            caught = self.agreed(signals, number)  # read once: a signal that comes now ends the next step
            if caught or final or self.due("eval", number) or self.due("checkpoint", number):
                if last:
                    self.observe(*last)
                    last = None
                # After a signal as well: once this step is saved, nothing would make up for it.
                if final or self.due("eval", number):
                    with self.clock.paused():
                        improved = self.evaluate(state, number)
            if caught or final or improved or self.due("checkpoint", number):
                with self.clock.paused():
                    self.save(state, number, batches)
                saved = number
            if caught and not final:
                self.checkpoints.wait()
                profile.close(number)
                name = signal.Signals(caught).name
                raise Interrupted(f"{name}: saved step {number}; the same command continues from there")
        profile.close(int(state.step))
        if saved < int(state.step):
            self.save(state, int(state.step), batches)

    def cost(self, batch: Mapping[str, np.ndarray]) -> tuple[Cost, bool]:
        """Returns what a step with a batch costs, and whether one of its shapes has been taken before."""
        key = tuple(array.shape for array in batch.values())
        known = key in self.flops
        if not known:
            size = self.experiment.batch_size
            spec = {name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype) for name, array in batch.items()}
            self.flops[key] = 3 * self.experiment.model.forward_flops(spec)
        return Cost(count_read(batch, self.experiment.task), self.flops[key]), known

    def agreed(self, signals: Signals, number: int) -> int:
        """Returns the signal that ends the run here, 0 if none: several hosts compare theirs where they wait for each
        other anyway, and every ten steps."""
        if hosts.several() and number % WINDOW and not any(self.due(what, number) for what in ("eval", "checkpoint")):
            return 0
        return hosts.any_of(signals.caught)

    def due(self, what: str, number: int) -> bool:
        return self.every[what] > 0 and number % self.every[what] == 0

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this host's rows of a batch where they belong on the devices."""
        return hosts.place(batch, self.shardings, self.experiment.batch_size)

    def restore(self, batches: TrainBatches) -> TrainState:
        """Returns the state of the newest whole checkpoint, the batches set to follow it; or the initial state."""
        step = self.checkpoints.latest() if self.experiment.resumed and hosts.first() else None
        step = hosts.of_first(-1 if step is None else step)  # it may have set others aside
        if step < 0:
            return self.experiment.initial_state()
        restored = self.checkpoints.restore(step, to_items(self.experiment.abstract))
        data = self.checkpoints.data(step)
        batches.restore(data["batches"])
        self.nonfinite, self.skipped = data["nonfinite"], data["skipped"]
        return from_items(restored, self.experiment.abstract)

    def save(self, state: TrainState, number: int, batches: TrainBatches) -> None:
        """Starts writing a checkpoint, its metrics those of an evaluation at this very step."""
        metrics = self.evaluation if self.evaluated == number else None
        data = {"batches": batches.state(), "nonfinite": self.nonfinite, "skipped": self.skipped}
        self.checkpoints.save(number, to_items(state), data, metrics)

    def evaluate(self, state: TrainState, number: int) -> bool:
        """Evaluates on the validation split; returns whether that was the best so far by the chosen metric."""
        experiment = self.experiment
        if "validation" not in experiment.examples:
            return False
        params = to_items(state).get("ema", state.params)

        def metrics_of(split: str) -> dict[str, float]:
            batches, examples = experiment.eval_batches(split), experiment.examples[split]
            return evaluate(self.predict, self.task, params, batches, examples, self.place, hosts.gather)

        metrics = metrics_of("validation")
        self.evaluation, self.evaluated = metrics, number
        parts = [split.removeprefix(PARTS) for split in experiment.examples if split.startswith(PARTS)]
        own = {f"{part}/{name}": value for part in parts for name, value in metrics_of(PARTS + part).items()}
        self.write(number, {EVALUATION + name: value for name, value in (metrics | own).items()})
        self.bar.note(f"step {number}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        *before, value = self.history(self.best) if self.best else [0.0]
        return self.best is not None and value > max(before, default=-math.inf)

    def history(self, chosen: Best) -> list[float]:
        """Returns a metric at each evaluation so far, those before a restart included; its sign such that more is better.

        Raises UserError if the newest evaluation could not tell.
        """
        if self.evaluation and chosen.metric not in self.evaluation:
            raise UserError(
                f'"{chosen.metric}" is not defined on the validation data, as where one class alone occurs; '
                f"choose one of {', '.join(self.evaluation)}"
            )
        name, sign = EVALUATION + chosen.metric, 1 if chosen.mode == "max" else -1
        return [sign * record[name] for record in self.records if name in record]

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations were all no better than the best before them."""
        values = self.history(self.stopping) if self.patience else []
        return len(values) > self.patience and max(values[-self.patience :]) <= max(values[: -self.patience])

    def write(self, number: int, values: dict[str, float]) -> None:
        self.records.append({"step": number} | values)
        if self.log:
            self.log.write(number, values)

    def observe(self, number: int, cost: Cost, device_metrics: Mapping[str, jax.Array]) -> None:
        """Reads the metrics of a step: shows them, logs them when due, and stops a run whose loss is not finite.

        Raises UserError, naming the first step, after `max_nonfinite` steps in a row that had to be left out.
        """
        metrics = {name: float(value) for name, value in jax.device_get(dict(device_metrics)).items()}
        self.clock.count(cost)
        skipped = metrics.pop("nonfinite")
        self.nonfinite = [*self.nonfinite, number] if skipped else []
        self.skipped += int(skipped)
        rates = self.clock.rates()
        if len(self.nonfinite) >= self.most_nonfinite:
            raise UserError(
                f"loss or gradient not finite in {len(self.nonfinite)} steps in a row, from step {self.nonfinite[0]} on; "
                "lower optim.learning_rate, or clip with optim.clip_norm"
            )
        speed = "".join(f"  {rates[name]:,.0f} {self.clock.unit}/s" for name in rates if name.endswith("_per_second"))
        if rates.get("data_wait", 0.0) >= 0.01:
            speed += f"  {rates['data_wait']:.0%} waiting for data"
        self.bar.advance(number, f"loss {metrics['loss']:.3f}{speed}")
        if self.due("log", number) or number == self.experiment.steps:
            rate = float(self.experiment.optimizer.learning_rate(number - 1))
            values = {name: value for name, value in metrics.items() if math.isfinite(value)}
            counts = {"nonfinite_steps": self.skipped}
            if self.experiment.tolerance.found:
                counts["left_out"] = len(self.experiment.tolerance.found)
            self.write(number, values | {"learning_rate": rate} | rates | counts)
            if not self.bar.terminal:
                self.bar.note(f"step {number}: loss {metrics['loss']:.4f}{speed}")


def describe(experiment: Experiment, start: int) -> str:
    """Returns one line about the run that is about to go on."""
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(experiment.abstract.params))
    sizes = ", ".join(f"{len(examples):,} {split}" for split, examples in experiment.examples.items())
    pieces = experiment.processors.sizes().get("vocab_size")
    vocabulary = f"vocabulary {pieces:,}, " if pieces else ""
    return (
        f"{experiment.config['model']['name']} {count:,} parameters, {sizes} examples, "
        f"{vocabulary}{jax.device_count()} x {jax.devices()[0].device_kind}, "
        f"steps {start} to {experiment.steps}"
    )


def to_items(state: TrainState) -> dict[str, Any]:
    """Returns the state as checkpoint items. A moving average is an item of its own, so that it can be read alone."""
    opt_state = dict(state.opt_state)
    average = opt_state.pop("ema", None)
    items = {"params": state.params, "opt_state": opt_state, "step": state.step}
    return items if average is None else items | {"ema": average.ema}


def from_items(items: Mapping[str, Any], abstract: TrainState) -> TrainState:
    """Returns the state of checkpoint items: the inverse of `to_items`."""
    opt_state = dict(items["opt_state"])
    if "ema" in items:
        opt_state["ema"] = abstract.opt_state["ema"]._replace(ema=items["ema"])
    return TrainState(items["step"], items["params"], {name: opt_state[name] for name in abstract.opt_state})
