"""Two real processes of four devices each train, evaluate and continue as one process of eight, or of one, does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from support.sources import Numbers

from fmjax.data.stream.batches import TrainBatches, eval_batches
from fmjax.distributed import hosts, sharding
from fmjax.errors import UserError
from scripts import train as train_script

ROOT = Path(__file__).resolve().parents[2]
# 21 of the texts are held out: their last batch of 8 has rows that only fill it up.
CHANGES = (
    "data.batch_size=8", "train.log_every=1", "train.eval_every=2", "checkpoint.every=2", "checkpoint.keep=9",
    "model.layers=1", "model.dropout=0.1", "model.vocab_size=512", "data.vocab_size=300", "data.hold_out=0.3", "mesh.rules=fsdp",
    "optim.schedule=constant",
)  # fmt: skip


def start(script: str, words: Sequence[str], devices: int, *more: str) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "scripts" / script), *words, *more]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(script: str, words: Sequence[str], processes: int, devices: int) -> list[str]:
    """Runs a script on so many hosts; returns what each wrote to stdout."""
    flags = []
    if processes > 1:
        flags = ["--coordinator", f"localhost:{free_port()}", "--hosts", str(processes), "--join-timeout", "120"]
    begun = [start(script, words, devices, *flags, *(["--host", str(index)] if flags else [])) for index in range(processes)]
    ended = [process.communicate(timeout=400) for process in begun]
    for process, (_, errors) in zip(begun, ended, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return [output for output, _ in ended]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def train(workdir: Path, texts: Path, steps: int, processes: int, devices: int) -> list[dict]:
    """Trains a run to a step; returns its metrics. One process of eight devices is this one."""
    mesh = 'mesh.axes={"data": 2, "fsdp": -1}' if devices > 1 else 'mesh.axes={"fsdp": -1}'
    changes = [f"--config.{change}" for change in (*CHANGES, mesh, f"train.steps={steps}", f"data.files.train={texts}")]
    words = ["--config", str(ROOT / "configs" / "bert_mlm.py:tiny"), "--workdir", str(workdir), *changes]
    if (processes, devices) == (1, jax.device_count()):
        assert train_script.main(words) == 0
    else:
        together("train.py", words, processes, devices)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(records: list[dict]) -> dict[str, float]:
    """Returns losses and metrics by name and step."""
    kept = ("loss", "grad_norm", "eval/validation/loss", "eval/validation/accuracy")
    return {f"{record['step']} {name}": value for record in records for name, value in record.items() if name.startswith(kept)}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    words = ["lamp", "river", "stone", "apple", "window", "garden", "yellow", "quiet", "seven", "under"]
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n\n".join(" ".join(rng.choice(words, 25)) for _ in range(70)))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory, texts) -> tuple[Path, dict[str, float]]:
    """A run on two hosts, and its numbers."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    return workdir, numbers(train(workdir, texts, 4, 2, 4))


@pytest.mark.full
def test_two_hosts_train_and_evaluate_as_one(pair, texts, tmp_path):
    workdir, found = pair
    expected = numbers(train(tmp_path / "run", texts, 4, 1, 8))
    assert found.keys() == expected.keys() and "4 eval/validation/loss" in found
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-5), name
    assert (workdir / "report.html").exists() and len(list((workdir / "checkpoints").iterdir())) == 2


@pytest.mark.full
@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (1, 8), (2, 4)])
def test_a_run_of_two_hosts_goes_on_anywhere(pair, texts, processes, devices, tmp_path):
    workdir, _ = pair
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(workdir), str(copy)], check=True)
    found = numbers(train(copy, texts, 6, processes, devices))
    expected = numbers(train(tmp_path / "whole", texts, 6, 1, 8))
    for name in ("5 loss", "6 loss", "6 eval/validation/loss", "6 eval/validation/accuracy"):
        assert found[name] == pytest.approx(expected[name], abs=2e-5)


@pytest.mark.full
def test_two_hosts_evaluate_a_run_as_one(pair):
    workdir, _ = pair
    first, second = together("evaluate.py", ["--workdir", str(workdir)], 2, 1)
    (whole,) = together("evaluate.py", ["--workdir", str(workdir)], 1, 1)
    assert "{" not in second  # Gloo writes a line of its own there
    found, expected = json.loads(first.splitlines()[-1]), json.loads(whole.splitlines()[-1])
    assert found["examples"] == expected["examples"] and found["loss"] == pytest.approx(expected["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", None, 0), "--hosts: missing; give --coordinator, --hosts and --host together"),
        ((None, 2, None), "--coordinator, --host: missing"),
        (("localhost:1", 2, 2), "--host=2: hosts are numbered from 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        hosts.join(*given)


def test_hosts_share_batches_without_loss_or_repeat():
    whole = TrainBatches(Numbers(21), batch_size=8, seed=3)
    parts = [TrainBatches(Numbers(21), batch_size=8, seed=3, rows=np.array(rows)) for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    for _ in range(5):
        batch, shares = next(whole), [next(part) for part in parts]
        for name, rows in batch.items():
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), rows)
    assert whole.state() == parts[0].state() == parts[1].state()
    # A run of two hosts goes on with one, and the other way round.
    alone, third = (TrainBatches(Numbers(21), batch_size=8, seed=3, rows=rows) for rows in (None, np.array([6])))
    alone.restore(parts[0].state())
    third.restore(whole.state())
    batch = next(whole)
    np.testing.assert_array_equal(next(alone)["noise"], batch["noise"])
    assert np.array_equal(next(third)["noise"][0], batch["noise"][6])


def test_evaluation_counts_every_example_once_on_any_number_of_hosts():
    whole = list(eval_batches(Numbers(21), batch_size=8, seed=0))
    for count in (2, 4):
        parts = np.split(np.arange(8), count)
        shares = [list(eval_batches(Numbers(21), batch_size=8, seed=0, rows=rows)) for rows in parts]
        for batch, *shared in zip(whole, *shares, strict=True):
            for name, rows in batch.items():
                np.testing.assert_array_equal(np.concatenate([share[name] for share in shared]), rows)
    assert sum(batch["valid"].sum() for batch in whole) == 21


def test_rows_that_a_host_holds_are_all_of_them_here():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = sharding.spec_sharding("rows", (8,), ("act_batch",), sharding.RULES["dp"], mesh)
    assert hosts.rows_of(rows, 8) is None and hosts.first() and not hosts.several() and hosts.any_of(3) == 3
