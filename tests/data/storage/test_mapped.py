"""Packed files, the cache, and memory: what is unpacked once, checked when used again, and how little stays in memory."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
import resource
import subprocess
import sys
import time
from functools import partial

import pyarrow as pa
import pytest

from fmjax.bench.corpus import mapped_bytes
from fmjax.data.sources.open import open_source
from fmjax.data.storage import cache, mapped
from fmjax.errors import UserError

TEXT = b"one\ntwo\n" * 1000
PACK = {
    "a.txt.gz": gzip.compress,
    "a.txt.xz": lzma.compress,
    "a.txt.bz2": bz2.compress,
    "a.txt.zst": partial(pa.Codec("zstd").compress, asbytes=True),
}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A cache of its own."""
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(path):
    return open_source("auto", str(path), "train", record="line")


@pytest.mark.parametrize("name", PACK)
def test_packed_files_are_unpacked_once(folder, tmp_path, name):
    (tmp_path / name).write_bytes(PACK[name](TEXT))
    source = opened(tmp_path / name)
    assert [record["text"] for record in source] == ["one", "two"] * 1000
    assert source.where(1999) == f"{name} line 2000"
    assert source.fingerprint()["files"][0]["size"] == (tmp_path / name).stat().st_size
    (copy,) = (folder / "files").rglob("a.txt")
    assert source.files[0].local == copy and copy.read_bytes() == TEXT
    made = copy.stat().st_mtime_ns
    assert len(opened(tmp_path / name)) == 2000 and copy.stat().st_mtime_ns == made
    assert pickle.loads(pickle.dumps(source))[3] == {"text": "two"}
    (tmp_path / "moved").mkdir()
    (tmp_path / name).rename(tmp_path / "moved" / name)
    assert len(opened(tmp_path / "moved" / name)) == 2000 and copy.stat().st_mtime_ns == made
    (tmp_path / name).write_bytes(PACK[name](b"three"))
    assert opened(tmp_path / name)[0] == {"text": "three"}


@pytest.mark.parametrize("name", PACK)
def test_packed_files_that_are_cut_off_or_of_another_kind(folder, tmp_path, name):
    whole = PACK[name](TEXT)
    for content in (whole[:-1], whole[: len(whole) // 2], b"plain text, not packed"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: (is not a complete|cannot be read as) \w+ .*fetch it again") as caught:
            opened(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_a_copy_that_was_changed_is_made_again(folder, tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT))
    copy = opened(tmp_path / "a.txt.gz").files[0].local
    copy.write_bytes(TEXT.upper())
    assert opened(tmp_path / "a.txt.gz")[0] == {"text": "one"} and copy.read_bytes() == TEXT
    (mark,) = (folder / "hashes").rglob("*.json")
    assert json.loads(mark.read_text()) == cache.digest(copy)
    mark.write_text("{")
    assert opened(tmp_path / "a.txt.gz")[1] == {"text": "two"} and json.loads(mark.read_text()) == cache.digest(copy)


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot hold a.txt .*FMJAX_CACHE to another folder"):
        opened(tmp_path / "a.txt.gz")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    places = []
    for given, xdg in (("~/mine", None), ("", "/xdg"), ("", "")):
        monkeypatch.setenv("FMJAX_CACHE", given)
        monkeypatch.setenv("XDG_CACHE_HOME", xdg or "")
        places.append(str(cache.folder()))
    assert places == ["/home/me/mine", "/xdg/fmjax", "/home/me/.cache/fmjax"]


def test_hashes_follow_what_is_written(monkeypatch, tmp_path):
    """Though it comes quicker than the clock of files ticks, and leaves the size as it was: what is new is not remembered."""
    seen = set()
    for number in range(50):
        (tmp_path / "a").write_bytes(b"%02d" % number)
        seen.add(cache.digest(tmp_path / "a")["sha256"])
    assert len(seen) == 50 and tmp_path / "a" not in cache.HASHES
    monkeypatch.setattr(cache, "SETTLED", 0)
    assert cache.digest(tmp_path / "a")["sha256"] == cache.HASHES[tmp_path / "a"][1]


MEMORY = """
import json, sys, threading, time
from fmjax.data.sources.open import open_source

def anonymous():  # bytes that are not a file's pages, which the system takes back when it needs them
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    global most
    while True:
        most = max(most, anonymous())
        time.sleep(0.01)

most = 0
threading.Thread(target=watch, daemon=True).start()
path, warm = sys.argv[1:]
for name in (warm, path):  # the first imports what is needed
    before = most = anonymous()
    source = open_source("auto", name, "train")
    step = max(len(source) // 2000, 1)
    characters = sum(len(str(source[index])) for index in range(0, len(source), step))
print(json.dumps({"grown": most - before, "records": len(source), "characters": characters}))
"""

RECORD = {"text": "word " * 400, "n": 1}


def write_big(path, count: int) -> None:
    """Writes a file of so many records of 2 kB."""
    if path.name.endswith((".arrow", ".parquet")):
        from pyarrow import parquet

        part = pa.Table.from_pylist([RECORD] * 500)
        if path.name.endswith(".parquet"):
            with parquet.ParquetWriter(path, part.schema, use_dictionary=False, compression="none") as rows:
                rows.write_table(pa.concat_tables([part] * (count // 500)), row_group_size=count)
        else:
            with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_stream(stream, part.schema) as writer:
                for _ in range(count // 500):
                    writer.write_table(part)
    elif path.name.endswith(".array_record"):
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for _ in range(count):
            writer.write(json.dumps(RECORD).encode())
        writer.close()
    elif path.name.endswith(".tar"):
        import io
        import tarfile

        with tarfile.open(path, "w") as archive:
            for number in range(count):
                member = tarfile.TarInfo(f"{number:06d}.txt")
                member.size = len(RECORD["text"])
                archive.addfile(member, io.BytesIO(RECORD["text"].encode()))
    else:
        line = {"jsonl": json.dumps(RECORD), "csv": ",".join(map(str, RECORD.values())), "txt": f"{RECORD['text']}\n"}
        kind = path.name.split(".")[1]
        with gzip.open(path, "wt", compresslevel=1) if path.name.endswith(".gz") else path.open("w") as stream:
            stream.write("text,n\n" * (kind == "csv"))
            for _ in range(count):
                stream.write(f"{line[kind]}\n")


SLOW = [pytest.param(name, marks=pytest.mark.full) for name in ("a.txt", "a.csv", "a.arrow", "a.array_record", "a.tar")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", *SLOW])
def test_opening_and_reading_take_no_memory_to_speak_of(folder, tmp_path, name):
    """A file of 64 MB never takes 16 MB, its table of offsets included; Parquet takes most, 10 MB, and 22 MB where it has 400."""
    (tmp_path / "warm").mkdir()
    write_big(tmp_path / "warm" / name, 500)
    write_big(tmp_path / name, 32_000)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / name), str(tmp_path / "warm" / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["records"] == 32_000 and report["characters"] > 2000 * 2000
    assert report["grown"] < 16 * 2**20, f"{report['grown']:,} bytes"


def test_lines_are_numbered_without_counting_from_the_beginning(tmp_path):
    """Tasks ask where every record stands."""
    count = 60_000
    (tmp_path / "a.jsonl").write_text("".join(f'{{"n": {number}}}\n\n' for number in range(count)))
    source = open_source("auto", str(tmp_path / "a.jsonl"), "train")
    begin = time.process_time()
    places = [source.where(index) for index in range(count)]
    assert places == [f"a.jsonl line {2 * number + 1}" for number in range(count)]
    assert time.process_time() - begin < 5


def test_pages_that_were_read_are_given_back(monkeypatch, folder, tmp_path):
    """All records are read, but at most a part of the file counts as memory of this process."""
    monkeypatch.setattr(mapped, "HELD", 2**20)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 999 + b"\n" + (b"y" * 999 + b"\n") * 2**14)
    source = opened(path)
    assert [source[index]["text"][0] for index in range(len(source))] == ["x"] + ["y"] * 2**14
    assert mapped_bytes(path) < path.stat().st_size / 4


def test_more_files_than_the_limit_of_open_files(monkeypatch, tmp_path):
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(f"{number} the dog sleeps\n" * 5000)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, before[1]))
    try:
        source = open_source("text", f"{tmp_path}/*.txt", "train", record="line")
        assert [source.where(5000 * number) for number in range(30)] == [f"{number:02}.txt line 1" for number in range(30)]
        assert len(os.listdir("/proc/self/fd")) > used + 20  # their indexes are mapped, too
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
