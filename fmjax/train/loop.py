"""The training loop: steps, evaluations, checkpoints, and an orderly end whatever ends it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fmjax.config import write_config
from fmjax.data.pipeline import TrainBatches
from fmjax.errors import Interrupted, UserError
from fmjax.evaluate import evaluate, make_predict
from fmjax.optim import trainable
from fmjax.sharding import batch_shardings
from fmjax.train import rundir
from fmjax.train.checkpoint import Best, Checkpoints
from fmjax.train.experiment import Config, Experiment, prepare
from fmjax.train.logs import EVALUATION, Bar, MetricsLog, read_metrics, say
from fmjax.train.report import write_report
from fmjax.train.state import TrainState
from fmjax.train.step import make_step
from fmjax.train.throughput import peak_flops


def train(given: Config, workdir: Path, title: str = "train") -> dict[str, float]:
    """Runs a config in a run directory, or continues it; returns the last evaluation's metrics.

    Raises UserError if the config or the data do not fit, Interrupted if a signal ended the run after its state was
    saved.
    """
    rundir.check_workdir(workdir)
    with rundir.locked(workdir):
        experiment = prepare(given, workdir)
        if not experiment.resumed:
            experiment.tokenizer.save(workdir / rundir.TOKENIZER)
        rundir.record(workdir, experiment.data)
        # Last, as the config makes the folder a run; at a restart it takes up what may change.
        write_config(workdir, experiment.config, given)
        with jax.set_mesh(experiment.mesh), nn.logical_axis_rules(tuple(experiment.rules.items())):
            return Run(experiment, title).run()


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


class Clock:
    """Counts steps and tokens since the last `reset`, for rates of training alone: evaluating and saving is `paused` time."""

    def __init__(self, flops_per_step: float):
        self.flops, (self.peak, self.origin) = flops_per_step, peak_flops()
        self.reset()

    def reset(self) -> None:
        self.start, self.steps, self.tokens = time.perf_counter(), 0, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.start += time.perf_counter() - begun

    def count(self, tokens: int) -> None:
        self.steps += 1
        self.tokens += tokens

    def rates(self) -> dict[str, float]:
        """Returns tokens (padding not counted) a second and model FLOP/s over peak FLOP/s."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {"tokens_per_second": self.tokens / seconds, "mfu": self.flops * self.steps / seconds / self.peak}


class Run:
    """One process's part in a run: what stands still around the state that moves."""

    def __init__(self, experiment: Experiment, title: str):
        self.experiment, self.title = experiment, title
        config = experiment.config
        self.every = {name: int(config["train"].get(f"{name}_every", 0)) for name in ("log", "eval")}
        self.every["checkpoint"] = int(config["checkpoint"]["every"])
        stopping, best = config["train"]["early_stopping"], config["checkpoint"].get("best")
        self.patience = int(stopping["patience"])
        self.stopping = Best(stopping["metric"], stopping["mode"])
        self.best = Best(best, config["checkpoint"]["mode"]) if best else None
        self.checkpoints = Checkpoints(
            experiment.workdir / rundir.CHECKPOINTS, keep=int(config["checkpoint"]["keep"]), best=self.best
        )
        self.shardings = batch_shardings(experiment.spec, experiment.rules, experiment.mesh)
        self.key = jax.random.key(experiment.seed, impl=config["train"].get("dropout_rng", "threefry2x32"))
        parts = int(config["train"].get("accumulate", 1))
        trained = trainable(experiment.abstract.params, config["optim"].get("freeze", ()))
        step = make_step(experiment.model, experiment.task, experiment.optimizer.transform, trained, parts)
        self.step = jax.jit(step, donate_argnums=0)
        self.predict = make_predict(experiment.model, experiment.task)
        self.most_nonfinite = int(config["train"].get("max_nonfinite", 10))
        self.nonfinite: list[int] = []
        self.skipped = 0  # steps in all that were left out
        self.evaluation: dict[str, float] = {}
        self.evaluated = -1  # at which step

    def run(self) -> dict[str, float]:
        """Trains from the newest checkpoint, or from the start, to the last step."""
        experiment, signals = self.experiment, Signals()
        batches = TrainBatches(experiment.examples["train"], batch_size=experiment.batch_size, seed=experiment.seed)
        state = self.restore(batches)
        start = int(state.step)
        say(describe(experiment, start))
        self.records = [record for record in read_metrics(experiment.workdir) if record["step"] <= start]
        self.log = MetricsLog(experiment.workdir, start)
        self.clock = Clock(3 * experiment.model.forward_flops(experiment.spec))
        try:
            with signals.noted(), Bar(self.title, experiment.steps, start) as self.bar:
                self.steps(state, start, batches, signals)
        finally:
            self.checkpoints.close()
            self.log.close()
            write_report(experiment.workdir)
        return self.evaluation

    def steps(self, state: TrainState, start: int, batches: TrainBatches, signals: Signals) -> None:
        """Takes the steps. Metrics are read one step late, so that the device never waits for the host."""
        last: tuple[int, int, Any] | None = None
        saved = start
        for number in range(start + 1, self.experiment.steps + 1):
            if self.out_of_patience():
                self.bar.note(f"early stopping at step {number - 1}: no better {self.stopping.metric} in {self.patience}")
                break
            batch = next(batches)
            tokens = count_tokens(batch)
            state, metrics = self.step(state, self.place(batch), self.key)
            if last:
                self.observe(*last)
            last = (number, tokens, metrics)
            if number == start + 1:  # the time to compile is no part of any rate
                jax.block_until_ready(metrics)
                self.clock.reset()

            final = number == self.experiment.steps
            improved = False
            caught = signals.caught  # read once: a signal that comes now ends the next step
            if caught or final or self.due("eval", number) or self.due("checkpoint", number):
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
                name = signal.Signals(caught).name
                raise Interrupted(f"{name}: saved step {number}; the same command continues from there")
        if saved < int(state.step):
            self.save(state, int(state.step), batches)

    def due(self, what: str, number: int) -> bool:
        return self.every[what] > 0 and number % self.every[what] == 0

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this host's rows of a batch where they belong on the devices."""
        return {
            name: jax.make_array_from_process_local_data(self.shardings[name], np.asarray(array)) for name, array in batch.items()
        }

    def restore(self, batches: TrainBatches) -> TrainState:
        """Returns the state of the newest whole checkpoint, the batches set to follow it; or the initial state."""
        step = self.checkpoints.latest() if self.experiment.resumed else None
        if step is None:
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
        metrics = evaluate(self.predict, experiment.task, params, experiment.eval_batches("validation"), self.place)
        self.evaluation, self.evaluated = metrics, number
        self.write(number, {EVALUATION + name: value for name, value in metrics.items()})
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
        self.log.write(number, values)

    def observe(self, number: int, tokens: int, device_metrics: Mapping[str, jax.Array]) -> None:
        """Reads the metrics of a step: shows them, logs them when due, and stops a run whose loss is not finite.

        Raises UserError, naming the first step, after `max_nonfinite` steps in a row that had to be left out.
        """
        metrics = {name: float(value) for name, value in jax.device_get(dict(device_metrics)).items()}
        self.clock.count(tokens)
        skipped = metrics.pop("nonfinite")
        self.nonfinite = [*self.nonfinite, number] if skipped else []
        self.skipped += int(skipped)
        rates = self.clock.rates()
        if len(self.nonfinite) >= self.most_nonfinite:
            raise UserError(
                f"loss or gradient not finite in {len(self.nonfinite)} steps in a row, from step {self.nonfinite[0]} on; "
                "lower optim.learning_rate, or clip with optim.clip_norm"
            )
        self.bar.advance(number, f"loss {metrics['loss']:.3f}  {rates['tokens_per_second']:,.0f} tokens/s")
        if self.due("log", number) or number == self.experiment.steps:
            rate = float(self.experiment.optimizer.learning_rate(number - 1))
            values = {name: value for name, value in metrics.items() if math.isfinite(value)}
            self.write(number, values | {"learning_rate": rate} | rates | {"nonfinite_steps": self.skipped})
            if not self.bar.terminal:
                self.bar.note(f"step {number}: loss {metrics['loss']:.4f}, {rates['tokens_per_second']:,.0f} tokens/s")
            self.clock.reset()


def describe(experiment: Experiment, start: int) -> str:
    """Returns one line about the run that is about to go on."""
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(experiment.abstract.params))
    sizes = ", ".join(f"{len(examples):,} {split}" for split, examples in experiment.examples.items())
    return (
        f"{experiment.config['model']['name']} {count:,} parameters, {sizes} examples, "
        f"vocabulary {experiment.tokenizer.vocab_size:,}, {jax.device_count()} x {jax.devices()[0].device_kind}, "
        f"steps {start} to {experiment.steps}"
    )


def count_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Returns the number of tokens of a batch that are not padding."""
    real = batch.get("segment_ids", batch.get("attention_mask"))
    return int((real > 0).sum()) if real is not None else batch["input_ids"].size


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
