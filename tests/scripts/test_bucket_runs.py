"""Every script on a run in a bucket, which ends like a local run: to the bit, whatever happens on the way."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.bucket import BUCKET, Rule, download
from support.run_results import equal, items

import fmjax
from fmjax.errors import UserError
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import run_path
from fmjax.runs.checkpoint import CheckpointReader
from scripts import convert, evaluate, predict, train

ROOT = Path(__file__).resolve().parents[2]
OFTEN = ("checkpoint.every=4", "train.eval_every=4", "optim.ema=0.9")
SCRIPT = "import sys; from scripts import train; sys.exit(train.main(sys.argv[1:]))"


@pytest.fixture
def workdir(bucket_service, request) -> BucketPath:
    return run_path(f"gs://{BUCKET}/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}/run")


@pytest.fixture(scope="module")
def local(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on a local disk, continued to ten."""
    folder = tmp_path_factory.mktemp("local") / "run"
    for steps in (6, 10):
        settings = [f"--config.{override}" for override in (*OFTEN, f"train.steps={steps}")]
        assert train.main(["--config", f"{data / 'config.py'}", "--workdir", str(folder), *settings]) == 0
    return folder


@pytest.mark.full
def test_every_script_on_a_run_in_a_bucket(workdir, local, run, data, refused, tmp_path, capsys):
    for steps in (6, 10):
        assert run(workdir, *OFTEN, f"train.steps={steps}") == 0
    assert f"report: {workdir}/report.html" in capsys.readouterr().err
    equal(download(workdir, tmp_path / "copy"), local)
    names = {name.partition("/")[0] for name in workdir.files()}
    assert names == {path.name for path in local.iterdir()}
    manifest = json.loads((workdir / "checkpoints" / "10" / "manifest.json").read_bytes())
    assert all(len(digest) == 16 for item in manifest["arrays"].values() for digest in item.values())

    assert evaluate.main(["--workdir", str(workdir)]) == evaluate.main(["--workdir", str(local)]) == 0
    ours, theirs = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert ours.pop("workdir") == str(workdir) and theirs.pop("workdir") and ours == theirs

    (tmp_path / "in.txt").write_text("the [MASK] sees the cat\n")
    words = ["--input", str(tmp_path / "in.txt"), "--output"]
    for name, folder in {"ours": workdir, "theirs": local}.items():
        assert predict.main(["--workdir", str(folder), *words, str(tmp_path / f"{name}.jsonl")]) == 0
    assert (tmp_path / "ours.jsonl").read_text() == (tmp_path / "theirs.jsonl").read_text()

    assert convert.main(["--from", str(workdir), "--to", str(tmp_path / "hf")]) == 0
    assert convert.main(["--from", str(tmp_path / "hf"), "--to", f"{workdir}-converted"]) == 0
    one, two = (fmjax.load(f"{workdir}{end}").params["embed"]["word"]["embedding"] for end in ("", "-converted"))
    assert one.tobytes() == two.tobytes()
    assert "written to a local folder" in refused(convert.main, "--from", workdir, "--to", f"{workdir}-hf")


def test_what_is_refused_on_a_bucket(workdir, data, refused, bucket_service):
    for words in ((), ("--dry-run",), ("--dry_run",)):
        words = ("--config", f"{data / 'config.py'}", "--workdir", "gs://none/run", *words)
        assert "there is no bucket gs://none" in refused(train.main, *words)
    assert "runs are kept in local folders and at gs://" in refused("s3://bucket/run")
    (workdir / "notes.txt").write_bytes(b"mine")
    assert "is not empty (notes.txt) and does not contain a run" in refused(workdir)
    with bucket_service.faults(lambda method, path: 403 if method != "GET" else None):
        assert "cannot be written to (403" in refused(workdir.parent / "other")
    with bucket_service.faults(lambda method, path: 403):
        assert "cannot be read (403" in refused(workdir.parent / "other")
    for call in (fmjax.load, fmjax.evaluate):
        with pytest.raises(UserError, match=f"{workdir.parent}/none"):
            call(f"{workdir.parent}/none")


@pytest.mark.full
def test_damage_in_a_bucket_is_passed_over(workdir, local, run, tmp_path, capsys):
    """A run that was copied from a local disk is verified by its digests, and continues."""
    for path in local.rglob("*"):
        if path.is_file():
            (workdir / path.relative_to(local).as_posix()).write_bytes(path.read_bytes())
    sizes = {name: found.st_size for name, found in workdir.files().items() if name.startswith("checkpoints/10/params/")}
    victim = max(sizes, key=sizes.__getitem__)
    content = bytearray((workdir / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (workdir / victim).write_bytes(bytes(content))
    assert run(workdir, *OFTEN, "train.steps=10") == 0
    said = capsys.readouterr().err
    assert "params/" in said and "does not match its checksum; set aside as 10.damaged" in said
    equal(download(workdir, tmp_path / "copy"), local)


@pytest.mark.full
def test_faults_on_the_way(workdir, local, run, bucket_service, tmp_path, monkeypatch):
    draw = random.Random(0)

    def rule(method: str, path: str):
        if draw.random() > 0.05:
            return None
        fault = draw.choice((503, 429, "break", "lose", 0.05))
        # The emulator, unlike the service, forgets an upload in parts that has ended.
        return "break" if fault == "lose" and "upload_id" in path else fault

    monkeypatch.setattr("fmjax.filesystems.patience.LONGEST_PAUSE", 0.1)
    with bucket_service.faults(rule):
        for steps in (6, 10):
            assert run(workdir, *OFTEN, f"train.steps={steps}") == 0
    equal(download(workdir, tmp_path / "copy"), local)
    starts = json.loads((workdir / "provenance.json").read_bytes())["starts"]
    assert all(start["repeated_requests"] > 0 for start in starts)


@pytest.mark.full
def test_permission_lost_in_the_middle(workdir, local, run, refused, bucket_service, tmp_path):
    assert run(workdir, *OFTEN, "train.steps=6") == 0

    def rule(method: str, path: str):
        return 403 if method in ("POST", "DELETE") and "%2F8%2F" in path else None

    with bucket_service.faults(rule):
        said = refused(workdir, *OFTEN, "train.steps=10")
    assert "checkpoints/8: the checkpoint could not be written" in said and "permissions of the bucket" in said
    folder = Path(re.search(r"step \d+ is saved here: --workdir=(\S+) continues", said)[1])
    assert run(folder, *OFTEN, "train.steps=10") == 0
    ours, theirs = items(folder), items(local)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert run(workdir, *OFTEN, "train.steps=10") == 0  # once the bucket lets us in again
    equal(download(workdir, tmp_path / "copy"), local)


def killer(process: subprocess.Popen, after: int) -> Rule:
    """Returns the rule that kills a process at a request."""
    left = itertools.count(after, -1)

    def rule(method: str, path: str) -> None:
        if next(left) == 0:
            process.send_signal(signal.SIGKILL)

    return rule


@pytest.mark.full
def test_kills_at_random_moments(workdir, local, start, run, bucket_service, tmp_path):
    """Each start is killed at a request; the requests of a start are counted from its lock on."""
    assert run(workdir, *OFTEN, "train.steps=6") == 0
    first = {name: (workdir / name).read_bytes() for name in workdir.files()}
    draw = random.Random(1)
    for _ in range(10):
        process = start(SCRIPT, workdir, *OFTEN, "train.steps=10")
        with bucket_service.faults(killer(process, after=draw.randint(20, 260))):
            _, err = process.communicate(timeout=300)
        assert process.returncode in (0, -9), err
        if process.returncode == 0:
            equal(download(workdir, tmp_path / "copy"), local)
            shutil.rmtree(tmp_path / "copy")
            workdir.remove_tree()
            for name, content in first.items():
                (workdir / name).write_bytes(content)
    assert run(workdir, *OFTEN, "train.steps=10") == 0
    equal(download(workdir, tmp_path / "copy"), local)


@pytest.mark.full
def test_two_hosts_write_one_run(workdir, data, bucket_service, tmp_path):
    def together(folder: object, steps: int, meanwhile: Callable[[], None] = lambda: None) -> list[tuple[int, str]]:
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = found.getsockname()[1]
        begun = []
        for host in range(2):
            settings = (*OFTEN, f"train.steps={steps}", "mesh.rules=fsdp")
            words = ["--config", f"{data / 'config.py'}", "--workdir", str(folder), *(f"--config.{one}" for one in settings)]
            words += ["--coordinator", f"localhost:{port}", "--hosts", "2", "--host", str(host), "--join-timeout", "120"]
            environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
            command = [sys.executable, "-c", SCRIPT, *words]
            begun.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        meanwhile()
        ended = [process.communicate(timeout=300)[1] for process in begun]
        return [(process.returncode, err) for process, err in zip(begun, ended, strict=True)]

    for folder, steps in ((workdir, 4), (workdir, 6), (tmp_path / "local", 6)):
        for code, err in together(folder, steps):
            assert code == 0, err[-3000:]
    equal(download(workdir, tmp_path / "copy"), tmp_path / "local")
    assert CheckpointReader(workdir / "checkpoints").steps() == [4, 6]

    def take_over() -> None:
        while 8 not in CheckpointReader(workdir / "checkpoints").steps():
            time.sleep(0.2)
        (workdir / ".lock").write_bytes(b'{"host": "other", "pid": 1}')

    first, second = together(workdir, 100_000, take_over)
    assert first[0] == second[0] == 2 and "Traceback" not in first[1] + second[1]
    for _, err in (first, second):  # one line each
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "another process has taken the run over" in line
