"""What a run of another length than before changes in its learning rate is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.sources import Numbers

from fmjax.config import write_config
from fmjax.train.length import schedule_change, steps_before


def change(before: int, now: int, begun: int, **section: Any) -> str | None:
    config = {"optim": {"name": "adamw", "learning_rate": 1.0, "no_decay": ()} | section}
    params = {"kernel": jax.ShapeDtypeStruct((2, 2), np.float32)}
    return schedule_change(config, params, before, now, begun, Path("runs/x"))


def test_a_longer_run_warms_up_again_and_says_so():
    assert change(100, 1000, 100, warmup_ratio=0.1) == (
        "the run now has 1,000 steps, not 100, and so has its schedule: the learning rate is 1 after step 100, and was 0.0111 "
        "before it, and warm-up takes 100 steps, not 10; to choose the new schedule yourself, start a new run with "
        "--config.init.weights=runs/x"
    )
    falls = change(100, 200, 50)
    assert falls is not None and "the learning rate is 0.75 after step 50, and was 0.51 before it; to" in falls


@pytest.mark.parametrize(
    "section",
    [
        {"schedule": "constant"},
        {"schedule": "constant", "warmup_steps": 5},
        {"schedule": "inverse_sqrt", "warmup_steps": 5},
    ],
)
def test_a_schedule_that_does_not_depend_on_the_length_is_none(section):
    assert change(100, 200, 50, **section) is None


def test_a_run_of_the_same_length_changes_nothing():
    assert change(100, 100, 50, warmup_ratio=0.1) is None


def test_the_steps_before(tmp_path):
    write_config(tmp_path, {"train": {"epochs": 1.5}, "data": {"batch_size": 8}})
    assert steps_before(tmp_path, Numbers(40)) == 8  # 60 examples in batches of 8
