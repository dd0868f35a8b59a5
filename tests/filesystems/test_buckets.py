"""Paths in a bucket, and paths of runs: what they read and write, repeat, and refuse."""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from etils import epath
from support.bucket import BUCKET

from fmjax.errors import UserError
from fmjax.filesystems import buckets, paths, patience
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import run_path
from fmjax.filesystems.patience import OUTAGE


@pytest.fixture
def folder(bucket_service, request) -> BucketPath:
    return run_path(f"gs://{BUCKET}/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}/run")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries are too short to notice."""
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 0.01)


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
    before, turns = OUTAGE.repeated, itertools.cycle([fault, fault, None])
    with bucket_service.faults(lambda method, path: next(turns)):
        (folder / "a").write_bytes(b"content")
        assert (folder / "a").read_bytes() == b"content" and list(folder.files()) == ["a"]
    assert OUTAGE.repeated - before >= 6
    turns = itertools.chain([fault], itertools.repeat(None))
    with bucket_service.faults(lambda method, path: next(turns)):
        (folder / "a").unlink()  # also where the answer of the first try was lost
    assert not (folder / "a").exists()


def test_lasting_faults(folder, bucket_service, impatient, monkeypatch):
    with bucket_service.faults(lambda method, path: 403), pytest.raises(PermissionError, match="injected"):
        (folder / "a").read_bytes()
    monkeypatch.setattr(patience, "PATIENCE", 0.05)
    with bucket_service.faults(lambda method, path: 503), pytest.raises(OSError, match="for 0 s"):
        (folder / "a").write_bytes(b"")
    assert not folder.exists()  # which was answered


def test_an_outage_is_one_deadline_for_all_requests(folder, bucket_service, impatient, monkeypatch, capsys):
    """Requests that follow a request that was given up are tried once, until one is answered."""
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    monkeypatch.setattr(patience, "SPEAK", 0.0)
    small = epath.Path(folder / "b")
    assert not small.exists()  # gcsfs asks for credentials at first
    sent: list[str] = []
    with bucket_service.faults(lambda method, path: sent.append(path) or 503):
        with pytest.raises(OSError, match="503 .*, for 0 s"):
            folder.files()
        while not patience.OUTAGE.lasts():  # a request is given up if the next pause would be too long
            with pytest.raises(OSError, match="for 0 s"):
                folder.files()
        sent.clear()
        for send in (folder.files, (folder / "a").read_bytes, (folder / "a").stat):
            with pytest.raises(OSError, match="for 0 s"):
                send()
        with pytest.raises(Exception, match="503|injected"):  # gcsfs has the same patience
            small.write_text("1")
        # google.cloud.storage asks for the bucket itself at times.
        assert len([path for path in sent if f"/b/{BUCKET}/o" in path]) == 4 and patience.OUTAGE.lasts()
    (folder / "a").write_bytes(b"1")
    small.write_text("1")
    assert not patience.OUTAGE.lasts() and sorted(folder.files()) == ["a", "b"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the bucket")]
    assert [re.split(r"[,(]", line)[0] for line in said] == ["the bucket does not answer ", "the bucket answers again"]


def test_gcsfs_repeats_as_long_as_we_do(folder, bucket_service, impatient):
    turns = itertools.chain([503, 429, "break", 500, 502, 408, "lose", 503, 503], itertools.repeat(None))
    before = patience.OUTAGE.repeated
    with bucket_service.faults(lambda method, path: next(turns)):
        epath.Path(folder / "b").write_text("1")
    assert patience.OUTAGE.repeated - before == 9 and (folder / "b").read_bytes() == b"1"


def test_an_outage_of_long_ago_is_forgotten(monkeypatch):
    now, said = [1000.0], []
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now[0]))
    outage = patience.Outage(said.append)
    for now[0] in (1000.0, 1100.0, 1190.0):
        outage.failed(OSError())
    assert outage.lasts() and len(said) == 1
    now[0] = 5000.0
    assert not outage.lasts()
    outage.failed(OSError())
    assert outage.left() == patience.PATIENCE
    now[0] = 5100.0
    outage.failed(OSError())
    assert outage.left() == patience.PATIENCE - 100 and len(said) == 2


def test_gcsfs_that_was_used_before_is_patient_too(bucket_service, monkeypatch):
    import fsspec
    import gcsfs

    from fmjax.filesystems.patient_gcsfs import PatientFileSystem

    fsspec.register_implementation("gs", gcsfs.core.GCSFileSystem, clobber=True)
    run_path("gs://b/c")
    assert fsspec.get_filesystem_class("gs") is PatientFileSystem


def test_errors_of_tokens_in_gcsfs():
    retry = pytest.importorskip("gcsfs.retry", reason="gcsfs is not installed")
    HttpError = retry.HttpError
    from google.auth.exceptions import RefreshError, TransportError

    from fmjax.filesystems.patient_gcsfs import is_temporary, temporary

    def raised(error, cause=None):
        error.__cause__ = cause
        return error

    invalid = {"code": 401, "message": "Invalid Credentials"}
    for cause, expected in [
        (raised(RefreshError("no metadata"), TransportError("no metadata")), True),
        (RefreshError("internal_failure", retryable=True), True),
        (RefreshError("invalid_grant"), False),
    ]:
        assert patience.is_temporary(cause) == is_temporary(raised(HttpError(invalid), cause)) == expected
    refused = temporary()
    assert [refused(HttpError(invalid)) for _ in range(3)] == [True, True, False]
    assert not temporary()(HttpError({"code": 401, "message": "injected"}))


def test_tensorstore_gives_up_after_about_the_same_time():
    from orbax.checkpoint import type_handlers
    from orbax.checkpoint._src.serialization import tensorstore_utils

    from fmjax.runs import orbax_items

    pauses = [min(2**turn, 32) for turn in range(orbax_items.TRIES["max_retries"])]
    assert 0.8 * patience.PATIENCE < sum(pauses) < 1.2 * patience.PATIENCE
    for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):  # which are private to Orbax
        assert vars(tensorstore_utils)[name]["gcs_request_retries"] == orbax_items.TRIES
    for use_ocdbt in (False, True):
        context = type_handlers.get_ts_context(use_ocdbt=use_ocdbt)
        assert context["gcs_request_retries"].to_json() == {"max_retries": 10}


def test_errors_of_the_libraries(folder):
    from google.auth.exceptions import RefreshError
    from google.cloud.storage.exceptions import DataCorruption

    assert patience.is_temporary(DataCorruption(None, "checksum"))
    with pytest.raises(PermissionError, match="the credentials are not valid, Reauthentication"), buckets.translated(folder):
        raise RefreshError("Reauthentication is needed")
    with pytest.raises(OSError, match="metadata, for 180 s"), buckets.translated(folder):
        raise RefreshError("no metadata", retryable=True)


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
    for address in (Path("s3://b/run"), "s3:/b/run"):
        with pytest.raises(UserError, match="^s3://b/run: runs are kept in local folders"):
            run_path(address)
    for name in ("glue:/x", "C:/x", "data:1/x", "name:/x"):  # local folders
        assert run_path(name) == paths.local_path(name) == Path(name)
    with pytest.raises(UserError, match="^gcs://b/run: write gs://b/run$"):
        run_path("gcs://b/run")
    for part in ("..", "."):
        with pytest.raises(UserError, match='has "." or ".." as a folder'):
            run_path(f"gs://b/{part}/run")
    for letter in "#?*[];\n":  # some libraries take them for the end of a name, or for patterns
        with pytest.raises(UserError, match="cannot have .* in its name; choose another name"):
            run_path(f"gs://b/a{letter}c/run")
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
