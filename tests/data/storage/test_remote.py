"""Files of gs:// over a fake service: fetched once, anew when they change, read as local ones, refused by their address."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import sys
from http.server import ThreadingHTTPServer

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec.spec import AbstractFileSystem
from PIL import Image
from pyarrow import parquet

from fmjax.data.sources.open import open_source
from fmjax.data.storage import remote
from fmjax.errors import UserError

REGISTRY = sys.modules["fsspec.registry"]._registry


class Service(AbstractFileSystem):
    """Objects in memory, under names as "bucket/folder/file". It counts how often each is opened."""

    protocol = "gcs"
    cachable = False
    objects: dict[str, bytes]
    changed: dict[str, int]
    fetched: list[str]
    short = 0  # bytes that it keeps back
    version: str = "mtime"
    restless = False  # whether a file changes while it is read

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

    def info(self, path, **_):
        path = self._strip_protocol(path)
        if path in self.objects:
            mark = {self.version: self.changed[path]} if self.version else {}
            return {"name": path, "type": "file", "size": len(self.objects[path])} | mark
        if any(name.startswith(f"{path}/") for name in self.objects):
            return {"name": path, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if path in self.objects:
            return [self.info(path)] if detail else [path]
        rest = [name[len(path) + 1 :] for name in self.objects if name.startswith(f"{path}/")]
        names = sorted({f"{path}/{name.split('/')[0]}" for name in rest})
        return [self.info(name) for name in names] if detail else names

    def _open(self, path, mode="rb", **_):
        path = self._strip_protocol(path)
        self.fetched.append(path)
        self.changed[path] += self.restless
        content = self.objects[path]
        return io.BytesIO(content[: len(content) - self.short])


@pytest.fixture
def service(monkeypatch, tmp_path):
    """The class of a service that fsspec finds at gs://, with a cache of its own."""
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    for name in ("gs", "gcs"):
        monkeypatch.setitem(REGISTRY, name, Service)
    monkeypatch.setattr(Service, "objects", {}, raising=False)
    monkeypatch.setattr(Service, "changed", {}, raising=False)
    monkeypatch.setattr(Service, "fetched", [], raising=False)
    return Service


def put(service, name: str, content: bytes, changed: int = 1) -> None:
    service.objects[name], service.changed[name] = content, changed


def texts(files, **options) -> list[str]:
    source = open_source("auto", files, "train", record="line", **options)
    return [source[index]["text"] for index in range(len(source))]


def test_a_file_is_fetched_once_and_again_when_it_changes(service, tmp_path):
    put(service, "b/d/a.txt", b"one\ntwo\n")
    assert texts("gs://b/d/a.txt") == texts("gs://b/d/a.txt") == ["one", "two"]
    assert texts("gs://b/d/a.txt[50%:]") == ["two"]
    assert service.fetched == ["b/d/a.txt"]
    source = open_source("auto", "gs://b/d/a.txt", "train")
    assert source.files[0].path.as_posix().endswith("gs/b/d/a.txt") and source.where(0) == "a.txt line 1"
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n")
    assert source.fingerprint() == open_source("auto", str(tmp_path / "a.txt"), "train").fingerprint()
    put(service, "b/d/a.txt", b"six\nten\n", changed=2)
    assert texts("gs://b/d/a.txt") == ["six", "ten"] and service.fetched == ["b/d/a.txt"] * 2


def test_a_copy_that_is_damaged_is_fetched_again(service, tmp_path):
    put(service, "b/a.txt", b"one\n")
    assert texts("gs://b/a.txt") == ["one"]
    (copy,) = (tmp_path / "cache" / "files").rglob("a.txt")
    copy.write_bytes(b"two\n")
    assert texts("gs://b/a.txt") == ["one"] and len(service.fetched) == 2


def test_globs_folders_and_lists(service, tmp_path):
    for name in ("a.txt", "b.txt.gz", "c.txt", "notes.pdf", "README.md", "sub/d.txt"):
        content = f"{name}\n".encode()
        put(service, f"b/d/{name}", gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "here.txt").write_text("here\n")
    assert texts("gs://b/d/*.txt") == ["a.txt", "c.txt"]
    assert texts("gs://b/d/[ac].txt[:1]") == ["a.txt"]
    assert texts("gs://b/d") == texts("gs://b/d/") == ["a.txt", "b.txt.gz", "c.txt"]
    assert texts(f"gs://b/d/c.txt, {tmp_path}/here.txt") == texts(["gs://b/d/c.txt", f"{tmp_path}/here.txt"]) == ["c.txt", "here"]
    assert sorted(service.fetched) == ["b/d/a.txt", "b/d/b.txt.gz", "b/d/c.txt"]


def test_a_folder_that_is_one_data_set_is_fetched_as_a_tree(service):
    for label, level in (("cat", 10), ("dog", 200)):
        stream = io.BytesIO()
        Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(stream, "PNG")
        put(service, f"b/pets/{label}/1.png", stream.getvalue())
    source = open_source("auto", "gs://b/pets", "train")
    assert [(record["label"], int(record["image"][0, 0, 0])) for record in source] == [("cat", 10), ("dog", 200)]
    put(service, "b/news/sci/1234", b"space")
    put(service, "b/news/rec/77.txt", b"hockey")
    for name in ("sci/README", ".git/HEAD"):
        put(service, f"b/news/{name}", b"x")
    news = [{"text": "hockey", "label": "rec"}, {"text": "space", "label": "sci"}]
    assert list(open_source("auto", "gs://b/news", "train")) == news
    put(service, "b/saved/state.json", b'{"_data_files": []}')
    put(service, "b/saved/dataset_info.json", b"{}")
    with pytest.raises(UserError, match="no records for train"):
        open_source("auto", "gs://b/saved", "train")
    assert sum(name.startswith("b/pets") for name in service.fetched) == 2


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://b/tran.txt", r'gs://b/tran.txt: no such file \(did you mean "train.txt"\?\); the folder has other, train-'),
        ("gs://b/*.csv", r"gs://b/\*.csv: no file matches"),
        ("gs://c/train.txt", "gs://c/train.txt: no such file"),
        ("gs://b/other", r"the folder has no file of a supported kind; it has x.pdf"),
        ("gs://b/train-images-idx3-ubyte", "name the folder of both, gs://b"),
        ("http://b/train.txt", r"http:// is not supported; name a local file, or one of gs://, s3://, az://, hf://"),
        ("gss://b/train.txt", r'gss:// is not supported \(did you mean "gs"\?\)'),
    ],
)
def test_what_cannot_be_fetched(service, address, message):
    put(service, "b/train.txt", b"x")
    put(service, "b/train-images-idx3-ubyte", b"x")
    put(service, "b/other/x.pdf", b"x")
    with pytest.raises(UserError, match=message) as caught:
        texts(address)
    assert "\n" not in str(caught.value) and not service.fetched


def test_a_copy_that_is_cut_short_is_not_kept(service, tmp_path, monkeypatch):
    put(service, "b/a.txt", b"one\n")
    monkeypatch.setattr(service, "short", 1)
    with pytest.raises(UserError, match="gs://b/a.txt: arrived with 3 of 4 bytes"):
        texts("gs://b/a.txt")
    monkeypatch.setattr(service, "short", 0)
    monkeypatch.setattr(service, "restless", True)
    with pytest.raises(UserError, match="gs://b/a.txt: .* or changed during the download; try again"):
        texts("gs://b/a.txt")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    monkeypatch.setattr(service, "restless", False)
    assert texts("gs://b/a.txt") == ["one"]


def test_versions_are_told_apart(service, monkeypatch):
    put(service, "b/a.txt", b"one\n")
    monkeypatch.setattr(service, "version", "ETag")
    assert texts("gs://b/a.txt") == ["one"]
    put(service, "b/a.txt", b"two\n", changed=2)
    assert texts("gs://b/a.txt") == ["two"]
    monkeypatch.setattr(service, "version", "")
    with pytest.raises(UserError, match="gives no version of the file; download it yourself"):
        texts("gs://b/a.txt")


def test_failures_of_the_service_are_one_line(service, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("401\nAnonymous caller")

    put(service, "b/a.txt", b"one\n")
    monkeypatch.setattr(service, "info", fail)
    with pytest.raises(UserError, match=r"gs://b/a.txt: cannot be fetched \(401 Anonymous caller\); .*credentials"):
        texts("gs://b/a.txt")


def test_a_package_that_is_not_there_is_named(monkeypatch):
    for name in ("gs", "gcs"):
        monkeypatch.delitem(REGISTRY, name, raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(sys.modules, "fmjax.filesystems.patient_gcsfs", raising=False)
    with pytest.raises(UserError, match="pip install gcsfs, or fetch the file"):
        texts("gs://b/a.txt")


def test_names_that_are_local_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert remote.local("a.txt,b.txt", {".txt": "text"}) == ("a.txt,b.txt", []) and not os.listdir(tmp_path)


def write_formats(folder) -> list[str]:
    """Writes the same records in files of several formats, and returns their names."""
    from array_record.python.array_record_module import ArrayRecordWriter

    records = [{"text": f"text {number}", "label": number % 2} for number in range(50)]
    lines = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.csv").write_text("text,label\n" + "".join(f"{record['text']},{record['label']}\n" for record in records))
    parquet.write_table(pa.Table.from_pylist(records), folder / "d.parquet")
    writer = ArrayRecordWriter(str(folder / "e.array_record"), "group_size:1")
    for line in lines.splitlines():
        writer.write(line)
    writer.close()
    return sorted(path.name for path in folder.iterdir())


def check_service(system, root: str, folder) -> None:
    """Puts files at an address and compares what is read there with what is read here, in the first start and the second."""
    for name in write_formats(folder):
        system.pipe_file(f"{root.partition('://')[2]}/{name}", (folder / name).read_bytes())
        local = open_source("auto", str(folder / name), "train")
        for _ in range(2):
            source = open_source("auto", f"{root}/{name}", "train")
            assert [source[index] for index in range(len(source))] == [local[index] for index in range(50)]
            assert source.fingerprint() == local.fingerprint() and source.where(49) == local.where(49)
    assert len(open_source("auto", f"{root}/*.jsonl*", "train")) == 100
    assert len(open_source("csv", root, "train")) == 50
    with pytest.raises(UserError, match=r'no such file \(did you mean "c.csv"\?\); the folder has a.jsonl, b.jsonl.gz'):
        open_source("auto", f"{root}/d.csv", "train")


def test_the_memory_file_system(monkeypatch, tmp_path):
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(remote.SCHEMES, "memory", "fsspec")
    (tmp_path / "here").mkdir()
    check_service(fsspec.filesystem("memory"), "memory://bucket/data", tmp_path / "here")


@pytest.mark.full
def test_google_cloud_storage(monkeypatch, tmp_path):
    """The emulator of the service, and gcsfs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {
        "FMJAX_CACHE": str(tmp_path / "cache"), "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "GOOGLE_CLOUD_PROJECT": "test",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    pytest.importorskip("gcsfs")  # reads the variables
    server = pytest.importorskip("gcp_storage_emulator.server")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon", "endpoint_url": f"http://127.0.0.1:{port}"})
    monkeypatch.setattr("http.server.HTTPServer", ThreadingHTTPServer)  # it would wait for the end of each connection
    emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    emulator.start()
    try:
        (tmp_path / "here").mkdir()
        check_service(fsspec.filesystem("gs"), "gs://bucket/data", tmp_path / "here")
    finally:
        emulator.stop()
