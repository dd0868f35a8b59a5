"""Paths in a bucket, and paths of runs: what they read and write, repeat, and refuse."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
from support.bucket import BUCKET

from fmjax import buckets, paths
from fmjax.buckets import REQUESTS, BucketPath
from fmjax.errors import UserError
from fmjax.paths import run_path


@pytest.fixture
def folder(bucket_service, request) -> BucketPath:
    return run_path(f"gs://{BUCKET}/{request.node.name}/run")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries are too short to notice."""
    monkeypatch.setattr(buckets, "LONGEST_PAUSE", 0.01)


def test_files_and_folders(folder):
    assert not folder.exists() and list(folder.iterdir()) == [] and folder.files() == {}
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "f/c.txt"):
        (folder / name).write_bytes(name.encode())
    assert folder.is_dir() and not folder.is_file() and (folder / "a.txt").is_file() and not (folder / "a").exists()
    assert [path.name for path in folder.iterdir()] == ["a.txt", "b", "f"]
    assert [str(path) for path in folder.glob("*/c.txt")] == [f"{folder}/b/c.txt", f"{folder}/f/c.txt"]
    assert (folder / "b" / "c.txt").read_text() == "b/c.txt" and (folder / "b/d").parent == folder / "b"
    about = folder.files()["b/d/e.txt"]
    assert about.st_size == 9 and about.md5 == hashlib.md5(b"b/d/e.txt").hexdigest()
    (folder / "b").rename(folder / "g")
    assert sorted(folder.files()) == ["a.txt", "f/c.txt", "g/c.txt", "g/d/e.txt"]
    (folder / "a.txt").unlink()
    (folder / "a.txt").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "a.txt").unlink()
    with pytest.raises(FileNotFoundError):
        (folder / "a.txt").read_bytes()
    (folder / "h" / "c.txt").write_bytes(b"")
    for mark in ("h/", "h/i/"):  # as gcsfuse leaves them
        BucketPath(folder.bucket, f"{folder.key}/{mark}").write_bytes(b"")
    assert [path.name for path in (folder / "h").iterdir()] == ["c.txt", "i"] and list((folder / "h").files()) == ["c.txt"]
    (folder / "h").rename(folder / "k")
    with paths.as_local(folder / "k") as local:
        assert (local / "c.txt").is_file()
    assert not (folder / "h").exists()
    folder.remove_tree()
    assert not folder.exists()


def test_an_object_is_created_once(folder):
    first = (folder / "lock").write_bytes(b"1", generation=0)
    with pytest.raises(FileExistsError):
        (folder / "lock").write_bytes(b"2", generation=0)
    second = (folder / "lock").write_bytes(b"2", generation=first)
    assert second != first and (folder / "lock").stat().generation == second
    with pytest.raises(FileExistsError):
        (folder / "lock").write_bytes(b"3", generation=first)
    assert (folder / "lock").read_bytes() == b"2"


@pytest.mark.parametrize("fault", [429, 500, 503, "break", "lose"])
def test_passing_faults_are_repeated_and_counted(fault, folder, bucket_service, impatient):
    before, turns = REQUESTS.repeated, itertools.cycle([fault, fault, None])
    with bucket_service.faults(lambda method, path: next(turns)):
        (folder / "a").write_bytes(b"content")
        assert (folder / "a").read_bytes() == b"content" and list(folder.files()) == ["a"]
    assert REQUESTS.repeated - before >= 6
    turns = itertools.chain([fault], itertools.repeat(None))
    with bucket_service.faults(lambda method, path: next(turns)):
        (folder / "a").unlink()  # also where the answer of the first try was lost
    assert not (folder / "a").exists()


def test_lasting_faults(folder, bucket_service, impatient, monkeypatch):
    with bucket_service.faults(lambda method, path: 403), pytest.raises(PermissionError, match="injected"):
        (folder / "a").read_bytes()
    monkeypatch.setattr(buckets, "PATIENCE", 0.05)
    with bucket_service.faults(lambda method, path: 503), pytest.raises(OSError, match="for 0 s"):
        (folder / "a").write_bytes(b"")


def test_errors_of_the_libraries(folder):
    from google.auth.exceptions import RefreshError
    from google.cloud.storage.exceptions import DataCorruption

    assert buckets.is_temporary(DataCorruption(None, "checksum"))
    with pytest.raises(PermissionError, match="the credentials are not valid, Reauthentication"), buckets.translated(folder):
        raise RefreshError("Reauthentication is needed")


def test_slow_answers(folder, bucket_service):
    with bucket_service.faults(lambda method, path: 0.2):
        (folder / "a").write_bytes(b"1")
    assert (folder / "a").read_bytes() == b"1"


def test_local_copies(folder, tmp_path):
    with paths.written_from_local(folder) as local:
        (local / "b").mkdir(parents=True)
        (local / "b" / "c.txt").write_text("1")
    assert list(folder.files()) == ["b/c.txt"]
    with paths.as_local(folder) as local:
        assert (local / "b" / "c.txt").read_text() == "1" and local.name == folder.name
    with pytest.raises(UserError, match=f"^{folder}/b: is bad$"), paths.as_local(folder) as local:
        raise UserError(f"{local}/b: is bad")


def test_what_a_run_may_be_named(bucket_service, tmp_path, monkeypatch):
    assert run_path(str(tmp_path)) == tmp_path and run_path("~/a") == Path.home() / "a"
    assert str(run_path("gs://b/c//d/")) == str(run_path(Path("gs://b/c/d"))) == "gs://b/c/d"
    for address in ("s3://b/run", "hdfs://b/run", "az://b/run", "https://b/run"):
        with pytest.raises(UserError, match=f"^{address}: runs are kept in local folders and at gs://; mount it on every host"):
            run_path(address)
    for address in ("gs://b", "gs://b/", "gs://b//"):
        with pytest.raises(UserError, match="write gs://BUCKET/RUN"):
            run_path(address)
    with pytest.raises(UserError, match="must be a local file or folder"):
        paths.local_path("gs://b/c")
    monkeypatch.setattr(paths, "PACKAGES", ("gcsfs", "no_such.package"))
    with pytest.raises(UserError, match=r"^gs://b/c: .* not installed \(no_such.package\); pip install gcsfs$"):
        run_path("gs://b/c")


def test_no_bucket_and_no_credentials(bucket_service, monkeypatch):
    with pytest.raises(UserError, match="there is no bucket gs://none; correct its name, or make it"):
        run_path("gs://none/run").check()
    with bucket_service.faults(lambda method, path: 401), pytest.raises(UserError, match="gcloud auth application-default login"):
        run_path(f"gs://{BUCKET}/run").check()
    from google.auth import exceptions
    from google.cloud import storage

    def refuse(project: str | None) -> None:
        raise exceptions.DefaultCredentialsError("none")

    monkeypatch.setattr(storage, "Client", refuse)
    with pytest.raises(UserError, match="there are no credentials; run gcloud auth application-default login"):
        buckets.client.__wrapped__()
