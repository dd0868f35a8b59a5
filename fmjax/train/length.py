"""The number of steps of a run, and the change of the learning rate when a run is extended."""

from __future__ import annotations

import math

from fmjax import optim
from fmjax.config import read_config
from fmjax.contracts import Config, Examples, PyTree
from fmjax.errors import UserError
from fmjax.filesystems.paths import RunPath


def total_steps(config: Config, examples: int) -> int:
    """Returns the number of steps: as set, or for the number of epochs, rounded up.

    Raises UserError unless exactly one of train.steps and train.epochs is set, to a positive
    number.
    """
    steps, epochs = config["train"].get("steps"), config["train"].get("epochs")
    if (steps is None) == (epochs is None):
        how = "--config.train.steps=none unsets the first"
        raise UserError(f"set either train.steps or train.epochs, not both; {how}")
    size = config["data"]["batch_size"]
    count = int(steps) if epochs is None else math.ceil(epochs * examples / size)
    if count < 1:
        given = f"steps={steps}" if epochs is None else f"epochs={epochs}"
        raise UserError(f"train.{given}: must be positive; raise it")
    return count


def checked_steps(config: Config, train: Examples) -> int:
    """Returns the number of steps. Raises UserError if the training data has too few examples."""
    size = config["data"]["batch_size"]
    if len(train) < size:
        few = f"the training data has {len(train)} examples, fewer than data.batch_size={size}"
        raise UserError(f"{few}; lower the batch size or add data")
    steps = total_steps(config, len(train))
    train.check_steps(steps, size)
    return steps


def steps_before(workdir: RunPath, train: Examples) -> int:
    """Returns the number of steps in the stored config of a run."""
    return total_steps(read_config(workdir), len(train))


def schedule_change(
    config: Config, params: PyTree, before: int, now: int, begun: int, workdir: RunPath
) -> str | None:
    """Returns a line about the change of a run's learning rate for another length, or None.

    Args:
      config: the run's config.
      params: its parameters, or their shapes.
      before: its former number of steps.
      now: its new number of steps.
      begun: the step that it continues from.
      workdir: its folder.
    """
    section = config["optim"]
    old, new = (optim.build(section, params, steps).learning_rate for steps in (before, now))
    rates = [(float(old(step)), float(new(step))) for step in (begun - 1, begun)]  # last, next
    warmups = warm_up(section, before), warm_up(section, now)
    if warmups[0] == warmups[1] and all(math.isclose(*pair, rel_tol=1e-6) for pair in rates):
        return None
    longer = f", and warm-up takes {warmups[1]:,} steps, not {warmups[0]:,}"
    return (
        f"the run now has {now:,} steps, not {before:,}, and so has its schedule: the learning "
        f"rate is {rates[1][1]:.3g} after step {begun:,}, and was {rates[0][0]:.3g} before "
        f"it{longer if warmups[0] != warmups[1] else ''}; to choose the new schedule yourself, "
        f"start a new run with --config.init.weights={workdir}"
    )


def warm_up(section: Config, steps: int) -> int:
    """Returns the number of warm-up steps of a run."""
    given = optim.Settings(
        warmup_steps=section.get("warmup_steps"), warmup_ratio=section.get("warmup_ratio")
    )
    return optim.warmup_count(given, steps)
