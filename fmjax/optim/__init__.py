"""Optimizers and learning-rate schedules, built of optax stages that know the parameters by name."""

from fmjax.optim.chain import Optimizer, Settings, build, map_params, schedule, trainable

__all__ = ["Optimizer", "Settings", "build", "map_params", "schedule", "trainable"]
