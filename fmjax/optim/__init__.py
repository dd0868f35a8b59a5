"""Optimizers and learning-rate schedules, built from optax stages that select parameters by
name.
"""

from fmjax.optim.chain import Optimizer, build, check_section, map_params, trainable
from fmjax.optim.schedules import schedule, warmup_count
from fmjax.optim.settings import Settings

__all__ = [
    "Optimizer",
    "Settings",
    "build",
    "check_section",
    "map_params",
    "schedule",
    "trainable",
    "warmup_count",
]
