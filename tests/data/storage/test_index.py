"""What is remembered of files: a second start reads none of their bytes, and whatever changed or was damaged is read again."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fmjax.data.sources.open import open_source
from fmjax.data.splits import open_split
from fmjax.data.storage import cache, index, mapped
from fmjax.data.stream.tolerance import Tolerance
from fmjax.errors import UserError

FILES = {
    "a.txt": b"one\ntwo\n\nthree\n",
    "a.jsonl": b'{"a": 1}\n\n{"b": 2, "a": 3}\n',
    "a.csv": b'text,label\n"one\ntwo",1\nthree,2\n',
    "a.tsv": b"text\tlabel\none\t1\n\ntwo\t2\n",
    "a.conll": b"one A\ntwo B\n\nthree C\n",
    "a.jsonl.gz": gzip.compress(b'{"a": 1}\n{"a": 2}\n'),
}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A cache of its own, which remembers the smallest and newest files."""
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL", 0)
    monkeypatch.setattr(cache, "SETTLED", -(10**18))
    monkeypatch.setattr(cache, "HASHES", {})
    return tmp_path / "cache"


def opened(path, **options):
    return open_source("auto", str(path), "train", **options)


def seen(source) -> tuple:
    """Returns all that a source tells about its records."""
    indices = range(len(source))
    records = [source[number] for number in indices]
    return source.columns, records, [source.where(number) for number in indices], source.fingerprint()


@pytest.fixture
def started_again(monkeypatch):
    """Returns a function after which this process knows nothing, as a new one, and may not read or scan any file."""

    def start():
        cache.HASHES.clear()
        monkeypatch.setattr(hashlib, "file_digest", lambda stream, name: pytest.fail(f"{stream.name} is read"))
        monkeypatch.setattr(index, "write", lambda *_: pytest.fail("a file is scanned"))

    return start


@pytest.mark.parametrize("name", FILES)
def test_a_second_start_reads_no_bytes(folder, tmp_path, started_again, name):
    (tmp_path / name).write_bytes(FILES[name])
    first = seen(opened(tmp_path / name))
    assert first[3]["files"] == [{"name": name, "size": len(FILES[name]), "sha256": hashlib.sha256(FILES[name]).hexdigest()}]
    started_again()
    assert seen(opened(tmp_path / name)) == first


def test_a_second_start_with_several_files(folder, tmp_path, started_again):
    (tmp_path / "a.en").write_text("one\n\ntwo\n")
    (tmp_path / "a.de").write_text("eins\n\nzwei\n")
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("x,y\n3,4\n")
    names = {"parallel": f"{tmp_path}/a.en,{tmp_path}/a.de", "csv": f"{tmp_path}/*.csv"}
    first = {kind: seen(open_source(kind, files, "train")) for kind, files in names.items()}
    (tmp_path / "c.csv").write_text("y,x\n3,4\n")
    opened(tmp_path / "c.csv")
    started_again()
    assert seen(open_source("parallel", names["parallel"], "train")) == first["parallel"]
    assert seen(open_source("csv", f"{tmp_path}/a.csv,{tmp_path}/b.csv", "train")) == first["csv"]
    with pytest.raises(UserError, match=r"c.csv line 1: the columns are y, x, but those of a.csv are x, y"):
        open_source("csv", names["csv"], "train")


def test_offsets_are_mapped_and_as_small_as_they_can_be(folder, tmp_path):
    (tmp_path / "a.txt").write_text("word\n" * 20_000)
    source = opened(tmp_path / "a.txt", record="line")
    (found,) = source.places
    assert found.path.is_relative_to(folder) and found.rows.shape == (20_000, 2) and found.rows.dtype == np.uint32
    assert not found.rows.flags.owndata and len(pickle.dumps(source)) < 1000
    assert seen(pickle.loads(pickle.dumps(source))) == seen(source) and source[-1] == {"text": "word"}
    with pytest.raises(IndexError):
        source[20_000]


def test_other_options_other_records(folder, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    counts = {record: len(opened(tmp_path / "a.txt", record=record)) for record in ("line", "paragraph", "file", "line")}
    assert counts == {"line": 3, "paragraph": 2, "file": 1}
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    assert [len(opened(tmp_path / "a.csv", columns=columns)) for columns in ((), ("a", "b"), ())] == [1, 2, 1]


def test_a_changed_file_is_read_again(folder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    opened(path)
    stat = path.stat()
    path.write_text('{"b": 2}\n')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the time of change and the rest are not the same
    for known in ({}, dict(cache.HASHES)):
        cache.HASHES.clear()
        cache.HASHES.update(known)
        assert opened(path)[0] == {"b": 2}
    (tmp_path / "new").write_text('{"c": 3}\n')
    (tmp_path / "new").replace(path)
    assert opened(path)[0] == {"c": 3}


def test_a_file_that_was_just_written_is_not_trusted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", 2 * 10**9)
    for number in range(20):
        (tmp_path / "a.jsonl").write_text(f'{{"a": {number:02}}}\n'.replace(": 0", ":  "))
        assert opened(tmp_path / "a.jsonl")[0] == {"a": number}
    assert not cache.note_of(tmp_path / "a.jsonl").exists()


def damaged(content: bytes) -> list[bytes]:
    return [b"", content[: len(content) // 2], content[:-1], content + b"\0", bytes(byte ^ 1 for byte in content), b"[]", b"{}"]


@pytest.mark.parametrize("kind", ["files", "hashes", "digests"])
def test_what_is_damaged_is_made_again(folder, tmp_path, kind):
    (tmp_path / "a.jsonl").write_bytes(FILES["a.jsonl"])
    first = seen(opened(tmp_path / "a.jsonl"))
    files = [path for path in (folder / kind).rglob("*") if path.is_file()]
    assert len(files) >= 2
    for file in files:
        for content in damaged(file.read_bytes()):
            file.write_bytes(content)
            cache.HASHES.clear()
            assert seen(opened(tmp_path / "a.jsonl")) == first
        file.unlink()
        assert seen(opened(tmp_path / "a.jsonl")) == first


def test_a_changed_digest_that_is_remembered_has_no_effect(folder, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(FILES["a.jsonl"])
    right = cache.digest(tmp_path / "a.jsonl")
    note = cache.note_of(tmp_path / "a.jsonl")
    note.write_text(note.read_text().replace(right["sha256"], "0" * 64))
    cache.HASHES.clear()
    assert cache.digest(tmp_path / "a.jsonl") == right


def test_verifying_reads_again_what_is_remembered(folder, tmp_path, capsys):
    """A bit that the disk flips changes neither size nor times."""
    path = (tmp_path / "a.jsonl").resolve()
    path.write_text('{"a": 1}\n')
    right = cache.digest(path)
    state = cache.HASHES[path].state
    cache.HASHES.clear()
    cache.remember(path, cache.Known(state, "0" * 64, True))
    assert cache.digest(path)["sha256"] == "0" * 64
    with cache.verifying(True):
        cache.read_digests([path, tmp_path / "absent"])
        assert cache.digest(path) == right
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: its content has changed, but neither its size nor its times")
    cache.HASHES.clear()
    assert cache.digest(path) == right


def test_data_verify_reads_again(folder, tmp_path):
    path = (tmp_path / "a.jsonl").resolve()
    path.write_text('{"a": 1}\n')
    right = cache.digest(path)["sha256"]
    cache.remember(path, cache.Known(cache.state_of(path), "0" * 64, True))
    for verify, sha256 in ((None, "0" * 64), (False, "0" * 64), (True, right), (False, right)):
        cache.HASHES.clear()
        data = {"source": "auto", "files": {"train": str(path)}, "verify": verify}
        assert open_split(data, "train").fingerprint()["files"][0]["sha256"] == sha256


def test_verifying_makes_a_damaged_index_again(folder, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(FILES["a.jsonl"])
    first = seen(source := opened(tmp_path / "a.jsonl"))
    place = source.places[0].path
    content, sha256 = place.read_bytes(), cache.digest(place)["sha256"]
    place.write_bytes(b"\x03" + content[1:])
    cache.HASHES.clear()
    cache.remember(place, cache.Known(cache.state_of(place), sha256, True))
    assert opened(tmp_path / "a.jsonl").places[0].rows[0, 0] == 3
    with cache.verifying(True):
        assert seen(opened(tmp_path / "a.jsonl")) == first and place.read_bytes() == content


def test_without_a_cache_all_is_in_memory(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.csv").write_bytes(FILES["a.csv"])
    first = seen(opened(tmp_path / "a.csv"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cache, "SLOW", 20)
    for _ in range(2):
        cache.HASHES.clear()
        source = opened(tmp_path / "a.csv")
        assert seen(source) == seen(pickle.loads(pickle.dumps(source))) == first and source.places[0].path is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "so each start reads all data again; free disk space, or set the environment variable FMJAX_CACHE" in line


def test_several_at_once(folder, tmp_path):
    (tmp_path / "a.txt").write_text("word\n" * 5000)

    def start(number: int) -> int:
        return len(opened(tmp_path / "a.txt", record="line"))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(start, range(16))) == [5000] * 16
    assert not [*folder.rglob("*.part"), *folder.rglob("*.lock")]


def test_one_makes_a_file_and_the_others_wait(folder):
    """Threads stand for processes: each opens the lock itself."""
    made = []

    def make(stream):
        made.append(len(list((folder / "hashes").glob("*.lock"))))
        time.sleep(0.05)
        stream.write(b"content")

    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda _: cache.get_or_make(Path("a"), make), range(12)))
    assert made == [1] and set(paths) == {folder / "files" / "a"} and paths[0].read_bytes() == b"content"
    assert not list(folder.rglob("*.lock"))


def test_a_lock_is_released_when_making_fails(folder):
    def fail(stream):
        raise ValueError("no")

    with pytest.raises(ValueError):
        cache.get_or_make(Path("a"), fail)
    assert not [path for path in folder.rglob("*") if path.is_file()]
    assert cache.get_or_make(Path("a"), lambda stream: None).read_bytes() == b""


def test_bad_records_that_were_tolerated_are_an_error_again(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nbad\n')
    with Tolerance("skip:1").active():
        assert len(opened(tmp_path / "a.jsonl")) == 2
    for _ in range(2):
        with pytest.raises(UserError, match="a.jsonl line 2: is not JSON"):
            opened(tmp_path / "a.jsonl")


def test_a_file_that_changes_while_it_is_read_gets_no_index(folder, tmp_path, monkeypatch):
    path, real = tmp_path / "a.jsonl", index.write

    def write(*args):
        path.write_text('{"b": 1}\n{"b": 2}\n')
        real(*args)

    path.write_text('{"a": 1}\n')
    with monkeypatch.context() as patch, pytest.raises(UserError, match="a.jsonl: changed while it was read"):
        patch.setattr(index, "write", write)
        opened(path)
    assert not [file for file in (folder / "files").rglob("*") if file.is_file()]
    path.write_text('{"a": 1}\n')
    assert opened(path)[0] == {"a": 1}


def test_small_files_leave_nothing_behind(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SMALL", 2**16)
    (tmp_path / "a.jsonl").write_bytes(FILES["a.jsonl"])
    assert len(opened(tmp_path / "a.jsonl")) == 2 and not folder.exists()


def test_a_note_is_readable(folder, tmp_path):
    (tmp_path / "ä\udce4.txt").write_bytes(b"one\n")
    cache.digest(tmp_path / "ä\udce4.txt")
    note = json.loads(cache.note_of(tmp_path / "ä\udce4.txt").read_text())
    assert note["path"].endswith("ä\ufffd.txt") and note["state"][0] == 4


def test_a_file_that_takes_the_name_of_an_open_one_is_not_taken_for_it(folder, tmp_path):
    path, new = tmp_path / "a.txt", tmp_path / "new"
    path.write_bytes(b"one\n\ntwo\n")
    new.write_bytes(b"one\ntwo\n\nthree\n")
    file = mapped.File(path)
    new.replace(path)
    for read in (lambda: file.fingerprint, lambda: file.line_at(3)):
        with pytest.raises(UserError, match=f"{path}: changed while it was read"):
            read()
    assert len(opened(path)) == 2 and opened(path)[1] == {"text": "three"}


def test_data_that_cannot_be_read_are_not_the_fault_of_the_cache(folder, monkeypatch):
    def make(stream):
        raise OSError(5, "Input/output error", "/data/a.gz")

    with pytest.raises(UserError, match=r"^/data/a.gz: the data cannot be read \(Input/output error\); check the disk"):
        cache.get_or_make(Path("x", "a"), make)
    assert not list(folder.rglob("*.part"))
    full = cache.opened_to_write(Path("/dev/full"))
    monkeypatch.setattr(cache, "opened_to_write", lambda path: full)
    with pytest.raises(UserError, match="the cache cannot hold b .No space left"), contextlib.suppress(cache.CannotWrite):
        cache.get_or_make(Path("x", "b"), lambda stream: stream.write(b"x" * 100_000))
