"""The lock, the logs and the digests of a run in a bucket."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.bucket import BUCKET

import fmjax
from fmjax.config import is_run, read_config
from fmjax.config.json_files import read_json
from fmjax.errors import UserError
from fmjax.filesystems import buckets, paths, scratch
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import run_path
from fmjax.filesystems.patience import OUTAGE
from fmjax.runs import array_digests, lock
from fmjax.runs.checkpoint import Checkpoints, NotSaved
from fmjax.runs.checkpoint_reader import CheckpointReader
from fmjax.runs.folder import check_workdir
from fmjax.runs.lock import LOCK, TakenOver, locked, this_process
from fmjax.runs.logs import MetricsLog, read_metrics
from fmjax.runs.manifest import (
    MANIFEST,
    DamagedError,
    check_arrays,
    list_files,
    read_manifest,
    verify_files,
)


@pytest.fixture
def workdir(bucket_service, request) -> BucketPath:
    return run_path(f"gs://{BUCKET}/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}/run")


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


@pytest.mark.parametrize("content", [b'{"host": "other", "pi', b"[]", b"null", b"\xff"])
def test_a_lock_that_cannot_be_read_is_not_free(content, workdir, quick, monkeypatch, capsys):
    (workdir / LOCK).write_bytes(content)
    monkeypatch.setattr(lock, "STALE", 0.1)
    with locked(workdir) as held:
        held.check()
    begun = capsys.readouterr().err
    assert "process ? on an unknown host has the lock; waiting up to" in begun
    (workdir / LOCK).write_bytes(b"")  # it was copied with a local run
    with locked(workdir):
        pass
    assert "waiting" not in capsys.readouterr().err


def test_one_of_two_takes_a_stale_lock(workdir, quick, capsys):
    (workdir / LOCK).write_bytes(json.dumps(this_process() | {"machine": "other"}).encode())
    won, lost, over = [], [], threading.Event()

    def take():
        try:
            with locked(workdir) as held:
                won.append(held)
                over.wait(30)
        except UserError as error:
            lost.append(str(error))
            over.set()

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == len(lost) == 1 and "another process is training in it" in lost[0]
    assert not won[0].lost


def test_the_lock_is_read_by_one_request(workdir, quick, bucket_service):
    with locked(workdir) as held:
        held._end.set()  # its heartbeat
        held._thread.join()
        before = bucket_service.count
        found, generation = held._read()
        assert bucket_service.count - before == 1
        assert found == held.owner and generation == (workdir / LOCK).stat().generation


def test_a_lock_that_cannot_be_renewed_may_be_lost(workdir, quick, bucket_service, monkeypatch):
    with locked(workdir) as held:
        held._end.set()
        held._thread.join()
        with bucket_service.faults(lambda method, path: 403):
            held.check()  # it was renewed a moment ago
            monkeypatch.setattr(lock, "STALE", 0.0)
            with pytest.raises(PermissionError):
                held.check()


def test_a_lock_that_was_freed_is_not_taken_again(workdir, quick):
    with locked(workdir) as held:
        held.check()
    for now in (False, True):
        with pytest.raises(TakenOver, match="this process has freed the run"):
            held.check(now)
    assert json.loads((workdir / LOCK).read_bytes()) == {}


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
    """Those that were uploaded in parts have none. They may be larger than the memory."""
    monkeypatch.setattr(buckets, "BLOCK", 3)
    (workdir / "a").write_bytes(b"content")
    (workdir / "empty").write_bytes(b"")
    files, plain = list_files(workdir), BucketPath.files
    monkeypatch.setattr(BucketPath, "read_bytes", None)
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
    monkeypatch.setattr("fmjax.filesystems.patience.LONGEST_PAUSE", 0.01)
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


def test_folders_of_killed_processes_are_removed(workdir, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    where = f"import tempfile; tempfile.tempdir={str(tmp_path)!r}"
    make = f"{where}; from fmjax.filesystems import scratch; print(scratch.make('logs')); "
    ended = subprocess.run([sys.executable, "-c", f"{make} import os; os.abort()"], capture_output=True, text=True)
    left = Path(ended.stdout.strip())
    other = tmp_path / left.name.replace(scratch.machine_digest(), "0" * 12)
    other.mkdir()
    with scratch.folder("copy") as ours:  # which lives
        log = MetricsLog(workdir, 0)
        assert not left.exists() and ours.is_dir() and other.is_dir()
        log.close()
    assert list(tmp_path.iterdir()) == [other]


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


ITEMS = {"params": {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}}
ABSTRACT = jax.eval_shape(lambda: ITEMS)


def saved(folder: BucketPath, *steps: int, **options) -> Checkpoints:
    writer = Checkpoints(folder, **options)
    for step in steps:
        writer.save(step, ITEMS, {"position": step})
    writer.wait()
    return writer


def test_checkpoints_of_a_run_with_a_strange_name(bucket_service):
    """Each library quotes it in its own way."""
    workdir = run_path(f"gs://{BUCKET}/names/a b%20c+d&e=f\N{GREEK SMALL LETTER ALPHA}/run/")
    saved(workdir, 1).close()
    reader = CheckpointReader(workdir)
    assert reader.latest() == 1 and reader.data(1) == {"position": 1}
    assert (reader.restore(1, ABSTRACT)["params"]["a"] == ITEMS["params"]["a"]).all()
    assert all(path.startswith(f"{workdir.key}/1/") for path in keys_below(workdir.parent.parent.parent / "names"))


def keys_below(folder: BucketPath) -> list[str]:
    return [f"{folder.key}/{name}" for name in folder.files()]


def test_a_step_of_the_new_owner_is_out_of_reach(workdir):
    """A process that was stopped goes on in the middle of a step that the new owner has written meanwhile."""
    permitted = threading.Event()
    asked = []

    def check() -> None:
        asked.append(1)
        permitted.wait(60)
        if len(asked) > 1:
            raise TakenOver("taken over")

    old = Checkpoints(workdir, before_seal=check)
    old.save(1, ITEMS, {"position": "old"})
    new = saved(workdir, 1, 2)
    permitted.set()
    with pytest.raises(TakenOver):
        old.wait()
    with pytest.raises(UserError, match="could not be written"):
        raise old._failed(1, OSError("broken"))  # removes its own objects alone
    assert new.steps() == [1, 2] and new.latest() == 2 and new.data(1) == {"position": 1}
    for step in (1, 2):
        assert (new.restore(step, ABSTRACT)["params"]["b"] == 1).all()
    for writer in (old, new):
        writer.close()


def test_a_manifest_whose_answer_was_lost_is_ours(workdir, bucket_service, monkeypatch):
    monkeypatch.setattr("fmjax.filesystems.patience.LONGEST_PAUSE", 0.01)
    lost = iter(["lose"])
    seals = lambda method, path: method in ("POST", "PUT") and "ifGenerationMatch=0" in path  # noqa: E731
    with bucket_service.faults(lambda method, path: next(lost, None) if seals(method, path) else None):
        saved(workdir, 1).close()
    assert CheckpointReader(workdir).latest() == 1 and next(lost, None) is None


def test_a_sealed_step_survives_what_fails_later(workdir, bucket_service, capsys):
    """Old steps that cannot be deleted, a save of the same step, an error after sealing."""
    writer = saved(workdir, 1, keep=1)
    with bucket_service.faults(lambda method, path: 403 if method == "DELETE" else None):
        writer.save(2, ITEMS, {"position": 2})
        writer.wait()
    assert "warning: " in (said := capsys.readouterr().err) and "old checkpoints could not be removed" in said
    with pytest.raises(NotSaved):
        writer.save(2, ITEMS, {"position": 3})
    writer._failed(2, OSError("lost"))
    reader = CheckpointReader(workdir)
    assert reader.latest() == 2 and reader.data(2) == {"position": 2}
    assert (reader.restore(2, ABSTRACT)["params"]["b"] == 1).all()
    (workdir / "2" / MANIFEST).unlink()
    writer._failed(2, OSError("lost"))
    assert not (workdir / "2").files()
    writer.close()


def test_a_step_that_is_deleted_while_it_is_read_is_gone(workdir, monkeypatch, capsys):
    writer = saved(workdir, 1, 2)
    plain, gone = BucketPath.exists, []

    def exists(path: BucketPath) -> bool:
        found = plain(path)
        if path == workdir / "2" / MANIFEST and not gone:  # the trainer is quicker
            gone.append(writer._delete(2))
        return found

    monkeypatch.setattr(BucketPath, "exists", exists)
    assert CheckpointReader(workdir).latest() == 1 and gone
    with pytest.raises(UserError, match="has no checkpoint of step 2; choose one of its steps: 1$"):
        CheckpointReader(workdir).data(2)
    assert "damaged" not in capsys.readouterr().err
    writer.close()


def test_a_restore_that_fails_is_one_line(workdir, bucket_service, monkeypatch):
    saved(workdir, 1).close()
    monkeypatch.setattr("fmjax.filesystems.patience.PATIENCE", 0.05)
    monkeypatch.setattr("fmjax.filesystems.patience.LONGEST_PAUSE", 0.01)
    reader = CheckpointReader(workdir)
    assert reader.latest() == 1
    for status in (400, 401, 403, 503):
        with (
            bucket_service.faults(lambda method, path: status if "manifest.json" not in path else None),  # noqa: B023
            pytest.raises(UserError, match=r"/1/.*: cannot be read \(.*\); fix the permissions of the bucket or the network"),
        ):
            reader.restore(1, ABSTRACT)
    with paths.explained():
        assert (reader.restore(1, ABSTRACT)["params"]["b"] == 1).all()


def test_a_save_is_given_up_when_the_bucket_does_not_answer(workdir, monkeypatch):
    held = threading.Event()
    writer = Checkpoints(workdir, before_seal=lambda: held.wait(60))
    monkeypatch.setattr("fmjax.runs.checkpoint.LOOK", 0.01)
    writer.save(1, ITEMS, {})
    monkeypatch.setattr(OUTAGE, "lasts", lambda: True)
    with pytest.raises(NotSaved, match="the bucket has not answered for 180 s"):
        writer.wait()
    writer.close()  # waits for nothing
    held.set()
    writer._thread.shutdown()  # else Orbax would wait for a service that has ended with the tests


def test_failing_requests_of_small_files_are_one_line(workdir, bucket_service, monkeypatch):
    """A bucket that does not answer is not taken for a folder without a run, or for a damaged file."""
    (workdir / "config.json").write_bytes(b'{"fmjax": {}}')
    monkeypatch.setattr("fmjax.filesystems.patience.PATIENCE", 0.0)
    advice = "fix the permissions of the bucket or the network"
    calls = [is_run, read_config, check_workdir, read_metrics, lambda path: read_json(path / "config.json"), read_manifest]
    with bucket_service.faults(lambda method, path: 503):
        for call in calls:
            with pytest.raises(UserError, match=f"^gs://.*: 503 .*; {advice}"), paths.explained():
                call(workdir)
        for public in (fmjax.load, fmjax.evaluate, lambda path: fmjax.convert(path, "out")):
            with pytest.raises(UserError, match=advice):
                public(str(workdir))
