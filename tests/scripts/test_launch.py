"""The launchers say what they would run, word for word, and what is missing in one line."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from scripts import train

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
COMMAND = ["python", "scripts/train.py", "--config", "a b.py", "--workdir", "/mnt/it's/run", "--distributed"]


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a launcher in this environment but for PYTHON, which may be set for the tests."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *words],
        capture_output=True,
        text=True,
        env=inherited | environment,
        timeout=60,
    )


@pytest.mark.parametrize("script", ["launch_tpu.sh", "slurm.sh", "quickstart.sh", "test.sh", "venv.sh"])
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)


@pytest.mark.parametrize(("there", "taken"), [(["3", "3.12", "3.13"], "python3.13"), (["3", "3.11"], "python3")])
def test_the_newest_python_makes_the_environment(tmp_path, there, taken):
    """One that fails, as one without venv does or the shim of a version that is not installed, is passed over."""
    for version in ("3", "3.11", "3.12", "3.13"):
        file = tmp_path / f"python{version}"
        file.write_text(f"#!/bin/sh\nexit {0 if version in there else 1}\n", encoding="utf-8")
        file.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    command = ["bash", "-c", f"source {shlex.quote(str(SCRIPTS / 'venv.sh'))}; find_python"]
    done = subprocess.run(command, capture_output=True, text=True, env=inherited | {"PATH": path}, timeout=60)
    assert done.stdout.split() == [taken]


def test_a_command_reaches_every_worker_as_it_was_written():
    done = run("launch_tpu.sh", "--tpu", "pod", "--zone", "eu-west4-b", "--project", "p", "--dry-run", "--", *COMMAND)
    (line,) = done.stdout.splitlines()
    words = shlex.split(line)
    assert done.returncode == 0 and words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert words[6:11] == ["--zone", "eu-west4-b", "--worker=all", "--project", "p"]
    assert shlex.split(words[-1])[-len(COMMAND) :] == COMMAND and words[-1].startswith("cd fmjax && ")


def test_installing_copies_the_checkout_first():
    done = run("launch_tpu.sh", "--tpu", "pod", "--zone", "z", "--checkout", "my dir", "--install", "--dry-run", "--", "true")
    copy, install, command = map(shlex.split, done.stdout.splitlines())
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"] and copy[6] == "pod:fmjax.tar.gz"
    assert "pip install -q -e '.[tpu,gcs]'" in install[-1] and shlex.split(command[-1])[:2] == ["cd", "my dir"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--zone", "z", "--", "true"], "--tpu is missing"),
        (["--tpu", "t", "--", "true"], "--zone is missing"),
        (["--tpu", "t", "--zone", "z", "--"], "there is no command"),
        (["--tpu", "t", "--zone", "z", "--dry", "--", "true"], "--dry: no such flag"),
        (["--tpu"], "--tpu has no value"),
    ],
)
def test_what_is_missing_is_said(words, message):
    done = run("launch_tpu.sh", *words)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("environment", "python"),
    [({}, ".venv/bin/python"), ({"PYTHON": "/else where/bin/python"}, "/else where/bin/python")],
)
def test_slurm_runs_the_training_script(environment, python):
    done = run("slurm.sh", "--dry-run", *COMMAND[2:-1], FMJAX=str(SCRIPTS.parent), **environment)
    words = shlex.split(done.stdout)
    started = [python, "scripts/train.py", "--distributed", *COMMAND[2:-1]]
    assert words == ["srun", "--kill-on-bad-exit=1", *started]


def test_buckets_of_other_services_are_no_folders(capsys):
    assert train.main(["--config", f"{SCRIPTS.parent / 'configs/bert_mlm.py'}:tiny", "--workdir", "s3://bucket/run"]) == 2
    assert "mount it on every host, and name the folder" in capsys.readouterr().err
