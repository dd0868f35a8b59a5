"""A run's checkpoints: the training state as items, and everything else that a run continues
from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fmjax.contracts import PyTree
from fmjax.data.stream.batches import TrainBatches
from fmjax.distributed import hosts
from fmjax.runs import folder as run_folder
from fmjax.runs.best import best_step
from fmjax.runs.checkpoint import Checkpoints
from fmjax.train.experiment import Experiment
from fmjax.train.recorder import Nonfinite
from fmjax.train.state import TrainState


class Saver:
    """Saves and restores the state of a run, including the position in its batches."""

    def __init__(
        self,
        experiment: Experiment,
        batches: TrainBatches,
        before_seal: Callable[[], None] = lambda: None,
    ):
        """
        Args:
          experiment: the run.
          batches: the training batches, whose position is saved.
          before_seal: writes the log up to a step before the step counts as saved: else a kill
            would leave a step whose metrics are in no log.
        """
        config, folder = experiment.config, experiment.workdir / run_folder.CHECKPOINTS
        self.experiment, self.batches = experiment, batches
        keep, best = int(config["checkpoint"]["keep"]), best_step(config, experiment.built.task)
        self.checkpoints = Checkpoints(folder, keep=keep, best=best, before_seal=before_seal)

    def restore(self) -> tuple[TrainState, Nonfinite]:
        """Returns the state of the newest intact checkpoint, and moves the batches to its position.

        Without a checkpoint, returns the initial state.
        """
        step = self.checkpoints.latest() if self.experiment.resumed and hosts.first() else None
        step = hosts.of_first(-1 if step is None else step)  # it may have set damaged ones aside
        if step < 0:
            return self.experiment.initial_state(), Nonfinite()
        abstract = self.experiment.abstract.state
        restored = self.checkpoints.restore(step, to_items(abstract))
        data = self.checkpoints.data(step)
        self.batches.restore(data["batches"])
        return from_items(restored, abstract), Nonfinite(tuple(data["nonfinite"]), data["skipped"])

    def save(
        self,
        state: TrainState,
        step: int,
        nonfinite: Nonfinite,
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Starts writing a checkpoint, with the metrics of an evaluation at this step."""
        counts = {"nonfinite": list(nonfinite.in_a_row), "skipped": nonfinite.total}
        self.checkpoints.save(
            step, to_items(state), {"batches": self.batches.state(), **counts}, metrics
        )

    def wait(self) -> None:
        """Returns when the last checkpoint is written."""
        self.checkpoints.wait()

    def close(self) -> None:
        self.checkpoints.close()


def evaluated_params(state: TrainState) -> PyTree:
    """Returns the parameters that evaluation uses: their moving average, if there is one."""
    return to_items(state).get("ema", state.params)


def to_items(state: TrainState) -> dict[str, PyTree]:
    """Returns the state as checkpoint items.

    A moving average is a separate item, so that it can be read alone.
    """
    opt_state = dict(state.opt_state)
    average = opt_state.pop("ema", None)
    items = {"params": state.params, "opt_state": opt_state, "step": state.step}
    return items if average is None else items | {"ema": average.ema}


def from_items(items: Mapping[str, PyTree], abstract: TrainState) -> TrainState:
    """Returns the state from checkpoint items: the inverse of `to_items`."""
    opt_state = dict(items["opt_state"])
    if "ema" in items:
        opt_state["ema"] = abstract.opt_state["ema"]._replace(ema=items["ema"])
    in_order = {name: opt_state[name] for name in abstract.opt_state}
    return TrainState(step=items["step"], params=items["params"], opt_state=in_order)
