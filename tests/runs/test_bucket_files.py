"""The lock, the logs and the digests of a run in a bucket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.bucket import BUCKET

from fmjax.buckets import BucketPath
from fmjax.errors import UserError
from fmjax.paths import run_path
from fmjax.runs import array_digests, lock
from fmjax.runs.lock import LOCK, TakenOver, locked, this_process
from fmjax.runs.logs import MetricsLog, read_metrics
from fmjax.runs.manifest import DamagedError, check_arrays, list_files, verify_files


@pytest.fixture
def workdir(bucket_service, request) -> BucketPath:
    return run_path(f"gs://{BUCKET}/{request.node.name}/run")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEARTBEAT": 0.02, "STALE": 0.5, "FRESH": 0.0, "LOOK": 0.05}.items():
        monkeypatch.setattr(lock, name, value)


def test_one_process_trains_in_a_bucket(workdir, quick, capsys):
    with locked(workdir) as held:
        held.check()
        said = rf"another process is training in it \(process {os.getpid()} on .*\); wait"
        with pytest.raises(UserError, match=said), locked(workdir):
            pass
    assert json.loads((workdir / LOCK).read_bytes()) == {}
    with locked(workdir):
        pass


def test_a_dead_lock_is_taken_over(workdir, quick, capsys):
    (workdir / LOCK).write_bytes(json.dumps(this_process() | {"host": "other", "machine": "other"}).encode())
    with locked(workdir):
        assert json.loads((workdir / LOCK).read_bytes())["machine"] == this_process()["machine"]
    said = capsys.readouterr().err
    assert "on other has the lock; waiting up to" in said and "took the run over from process" in said

    ended = subprocess.Popen([sys.executable, "-c", ""])
    holder = this_process() | {"pid": ended.pid, "started": lock.started(ended.pid)}
    ended.wait()
    (workdir / LOCK).write_bytes(json.dumps(holder).encode())
    with locked(workdir):
        pass
    said = capsys.readouterr().err
    assert f"took the run over from process {ended.pid}" in said and "waiting" not in said


def test_a_lock_that_was_taken_away(workdir, quick, capsys):
    with locked(workdir) as held:
        (workdir / LOCK).write_bytes(b'{"host": "other", "pid": 1}')
        with pytest.raises(UserError, match="another process has taken the run over"):
            held.check()
        assert held.lost
    assert json.loads((workdir / LOCK).read_bytes())["host"] == "other"  # it is theirs


def test_logs_of_a_run_that_was_taken_over_stay_here(workdir, quick):
    with locked(workdir) as held:
        log = MetricsLog(workdir, 0, held.check)
        log.write(1, {"loss": 2.0})
        (workdir / LOCK).write_bytes(b'{"host": "other", "pid": 1}')
        for end in (log.upload, log.close):
            with pytest.raises(TakenOver):
                end()
    assert list(workdir.files()) == [LOCK]


def test_objects_without_a_digest_are_read(workdir, monkeypatch):
    """Those that were uploaded in parts have none."""
    (workdir / "a").write_bytes(b"content")
    files, plain = list_files(workdir), BucketPath.files
    monkeypatch.setattr(
        BucketPath, "files", lambda path: {name: found._replace(md5="") for name, found in plain(path).items()}
    )
    verify_files(workdir, files)
    (workdir / "a").write_bytes(b"c0ntent")
    with pytest.raises(DamagedError, match="a does not match its checksum"):
        verify_files(workdir, files)


def test_a_bucket_that_retains_objects(workdir, monkeypatch):
    plain = BucketPath.stat
    monkeypatch.setattr(BucketPath, "stat", lambda path: plain(path)._replace(retained=True))
    with pytest.raises(UserError, match="the bucket has a retention policy, but .*; name a bucket without one"), locked(workdir):
        pass


def test_a_lock_whose_answer_was_lost_is_held(workdir, bucket_service, quick, monkeypatch):
    monkeypatch.setattr("fmjax.buckets.LONGEST_PAUSE", 0.01)
    lost = iter(["lose"])
    with (
        bucket_service.faults(lambda method, path: next(lost, None) if method == "POST" else None),
        locked(workdir) as held,
    ):
        held.check()


def test_logs_are_uploaded_and_cut(workdir, monkeypatch):
    monkeypatch.setattr("fmjax.runs.spool.EVERY", 0.05)
    log = MetricsLog(workdir, 0)
    log.write(1, {"loss": 2.0})
    log.upload()
    assert read_metrics(workdir) == [{"step": 1, "loss": 2.0}]
    log.write(2, {"loss": 1.0})
    arrived = threading.Event()
    while len(read_metrics(workdir)) < 2:  # the thread uploads it
        arrived.wait(0.02)
    log.close()
    assert len(list((workdir / "tensorboard").iterdir())) == 1

    log = MetricsLog(workdir, 1)
    log.write(2, {"loss": 0.5})
    log.close()
    assert read_metrics(workdir) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}]


def test_arrays_are_compared_in_the_order_of_the_items(workdir, monkeypatch):
    """All hosts compute a digest together, so each must come to the same one next."""
    asked = []
    monkeypatch.setattr(array_digests, "start", lambda leaves: asked.extend(leaves))
    monkeypatch.setattr(array_digests, "read", lambda names, found: {})
    check_arrays({name: {} for name in "abcdefgh"}, {name: {name: 0} for name in "hcfadbeg"}, workdir)
    assert asked == list("hcfadbeg")


def test_digests_do_not_depend_on_the_sharding():
    values = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    kinds = {"a": jnp.asarray(values), "b": jnp.asarray(values, jnp.bfloat16), "c": jnp.arange(7)}
    kinds |= {"d": jnp.asarray([True, False]), "e": jnp.int32(3)}
    found = array_digests.read(kinds, array_digests.start(kinds))
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    for spec in (PartitionSpec("x", "y"), PartitionSpec("y"), PartitionSpec(None, "x")):
        sharded = {"a": jax.device_put(values, NamedSharding(mesh, spec))}
        assert array_digests.read(sharded, array_digests.start(sharded))["a"] == found["a"]
    others = {found[name] for name in kinds}
    assert len(others) == 5
    flipped = values.copy()
    flipped.view(np.uint32)[3, 5] ^= 1
    swapped = values.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    for changed in (flipped, swapped, values.reshape(24, 16).T.copy().reshape(16, 24)):
        one = {"a": jnp.asarray(changed)}
        assert array_digests.read(one, array_digests.start(one))["a"] != found["a"]
