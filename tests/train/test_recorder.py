"""What is recorded of steps: metrics are read one step late, and a run that diverges ends."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from fmjax.distributed.progress import Bar
from fmjax.errors import UserError
from fmjax.runs.lock import Lock, TakenOver
from fmjax.train.recorder import Nonfinite, Recorder
from fmjax.train.throughput import Cost


def recorder(
    folder: Path, start: int = 0, nonfinite: Nonfinite | None = None, **train: int
) -> Recorder:
    experiment: Any = SimpleNamespace(
        workdir=folder,
        config={"train": {"log_every": 2, "max_nonfinite": 3} | train},
        built=SimpleNamespace(steps=5),
        data=SimpleNamespace(
            processors=SimpleNamespace(unit="tokens"), tolerance=SimpleNamespace(found=[])
        ),
        abstract=SimpleNamespace(
            optimizer=SimpleNamespace(learning_rate=lambda update: 0.1 * update)
        ),
    )
    return Recorder(experiment, start, Bar("test", 5, start), nonfinite or Nonfinite(), Lock())


def step(made: Recorder, number: int, loss: float = 1.0, nonfinite: bool = False) -> None:
    metrics = {
        "loss": loss,
        "grad_norm": jnp.nan if nonfinite else 1.0,
        "nonfinite": float(nonfinite),
    }
    made.ended(
        number, Cost(8, 100.0), {name: jnp.float32(value) for name, value in metrics.items()}
    )


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_read_when_the_next_step_is_under_way(tmp_path):
    made = recorder(tmp_path)
    step(made, 1)  # read at once: it starts the clock
    assert made.last is None and logged(tmp_path) == []  # not due
    step(made, 2)
    assert made.last.step == 2 and logged(tmp_path) == []
    step(made, 3, loss=2.0)
    (second,) = logged(tmp_path)
    assert (
        second["step"] == 2
        and second["loss"] == 1.0
        and second["learning_rate"] == pytest.approx(0.1)
    )
    assert second["nonfinite_steps"] == 0 and second["tokens_per_second"] > 0
    made.read()
    made.read()
    step(made, 4, loss=4.0)
    step(made, 5, loss=5.0)
    made.read()
    assert [record["step"] for record in logged(tmp_path)] == [2, 4, 5]  # and the last one
    assert made.records == logged(tmp_path)


def test_steps_that_are_not_finite_end_a_run_when_too_many_in_a_row(tmp_path):
    made = recorder(tmp_path)
    for number, nonfinite in enumerate((False, True, True, False), start=1):
        step(made, number, nonfinite=nonfinite)
    made.read()
    assert made.nonfinite == Nonfinite((), 2)
    assert "grad_norm" not in logged(tmp_path)[0] and logged(tmp_path)[-1]["nonfinite_steps"] == 2


def test_a_restart_goes_on_counting(tmp_path):
    made = recorder(tmp_path, start=5, nonfinite=Nonfinite((4, 5), 7))
    with pytest.raises(
        UserError, match="in 3 consecutive steps, from step 4 on; lower optim.learning_rate"
    ):
        step(made, 6, nonfinite=True)
    assert made.nonfinite == Nonfinite((4, 5, 6), 8)


def test_a_restart_forgets_what_was_logged_after_its_step(tmp_path):
    lines = [{"step": number, "loss": 1.0} for number in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recorder(tmp_path, start=2).records == logged(tmp_path) == lines[:2]


def test_nothing_is_written_once_the_run_was_taken_over(tmp_path):
    class Lost(Lock):
        def check(self, now: bool = False) -> None:
            raise TakenOver("taken over")

    made = recorder(tmp_path)
    made.lock = Lost()
    before = sorted(tmp_path.rglob("*"))
    for end in (made.upload, lambda: made.keep(None), made.close):
        with pytest.raises(TakenOver):
            end()
    assert sorted(tmp_path.rglob("*")) == before and made.log is None
