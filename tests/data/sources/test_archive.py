"""Tar archives of texts, read in place: records of several files, JSON lines, and what does not belong there."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile

import pytest

from fmjax.data.sources import archive
from fmjax.data.sources.open import open_source
from fmjax.data.storage import tar
from fmjax.data.storage.tar import members
from fmjax.errors import UserError

LONG = "a_long_name/" * 12


def write(path, members, mode: str = "w", form=tarfile.GNU_FORMAT) -> str:
    with tarfile.open(path, mode, format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            data = content.encode() if isinstance(content, str) else content
            if data is None:
                member.type = tarfile.SYMTYPE
            member.size = len(data or b"")
            archive.addfile(member, io.BytesIO(data or b""))
    return str(path)


def opened(path):
    return open_source("auto", str(path), "train")


def records(source) -> list:
    return [source[index] for index in range(len(source))]


def samples(count: int, start: int = 0) -> list[tuple[str, str]]:
    numbers = range(start, start + count)
    parts = [{"txt": f"é\r\n{n}", "json": json.dumps({"n": n}), "cls": f"{n}\n"} for n in numbers]
    return [(f"d/{n:04d}.{ending}", text) for n, sample in zip(numbers, parts, strict=True) for ending, text in sample.items()]


def wanted(count: int, start: int = 0) -> list[dict]:
    return [{"label": str(n), "n": n, "text": f"é\n{n}"} for n in range(start, start + count)]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.xz", "a.tar.bz2"])
def test_files_of_one_name_are_a_record(tmp_path, name):
    packed = {"gz": "w:gz", "tgz": "w:gz", "xz": "w:xz", "bz2": "w:bz2"}
    source = opened(write(tmp_path / name, samples(30), packed.get(name.rpartition(".")[2], "w")))
    assert records(source) == wanted(30) and set(source.columns) == {"text", "n", "label"}
    assert source.where(7) == f"{name}: d/0007"
    assert records(pickle.loads(pickle.dumps(source))) == wanted(30)
    assert source[-1] == wanted(30)[-1]
    with pytest.raises(IndexError):
        source[30]
    assert [file.path.name for file in source.files] == [name]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar(tmp_path, form):
    folder = LONG[:90] if form == tarfile.USTAR_FORMAT else LONG
    members = [(f"{folder}x.y/1.txt", "one"), (f"{folder}x.y/2.txt", ""), ("v1.0.txt", "three")]
    source = opened(write(tmp_path / "a.tar", members, form=form))
    assert records(source) == [{"text": "one"}, {"text": ""}, {"text": "three"}]
    assert [source.where(index) for index in range(3)] == [f"a.tar: {folder}x.y/1", f"a.tar: {folder}x.y/2", "a.tar: v1.0"]


def test_shards(tmp_path):
    for number in range(3):
        write(tmp_path / f"shard-{number}.tar", samples(10, number * 10))
    source = opened(tmp_path / "shard-*.tar")
    assert records(source) == wanted(30) and source.where(20) == "shard-2.tar: d/0020"
    assert records(opened(tmp_path)) == wanted(30)
    assert records(opened(f"{tmp_path}/shard-0.tar, {tmp_path}/shard-2.tar")) == wanted(10) + wanted(10, 20)
    assert records(opened(f"{tmp_path}/*.tar[:5]")) == wanted(5)
    mark = source.fingerprint()
    assert mark == json.loads(json.dumps(mark))
    assert [file["name"] for file in mark["files"]] == ["shard-0.tar", "shard-1.tar", "shard-2.tar"]
    write(tmp_path / "shard-1.tar", [])
    with pytest.raises(UserError, match="shard-1.tar: no records for train"):
        opened(tmp_path / "shard-*.tar")


def test_json_lines(tmp_path):
    members = [("x/a.jsonl", '{"n": 0}\n\n{"n": 1}\n'), ("b.jsonl", '{"n": 2}'), ("._c.txt", "x")]
    source = opened(write(tmp_path / "a.tar", members))
    assert records(source) == [{"n": 0}, {"n": 1}, {"n": 2}]
    places = ["x/a.jsonl line 1", "x/a.jsonl line 3", "b.jsonl line 1"]
    assert [source.where(index) for index in range(3)] == [f"a.tar: {place}" for place in places]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.txt", "x"), ("2.jpg", "x")], "a.tar: 2 has .jpg, but the first record has .txt; every record needs the same files"),
        ([("1.txt", "x"), ("2.npy", "x")], "a.tar: 2.npy: ends in .npy.* put files of .txt"),
        ([("1.txt", "x"), ("2.txt", None)], "a.tar: 2.txt: is a link"),
        ([("1.txt", "x"), ("1.json", "{}"), ("2.txt", "x")], "a.tar: 2 has .txt, but the first record has .json, .txt"),
        ([("1.txt", "x"), ("2.txt", "x"), ("2.txt", "x")], 'a.tar: has two files named "2.txt"; remove one'),
        ([("1.txt", "x"), ("2.jsonl", "{}")], "a.tar: 2 has .jsonl, but the first"),
        ([("1.txt", "x"), ("1.json", '{"text": "y"}')], 'a.tar: 1: has "text" both in its .json and in a file of its own'),
    ],
)
def test_what_does_not_belong_there(tmp_path, members, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source("tar", write(tmp_path / "a.tar", members), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.txt", "x"), ("2.txt", b"\xe9")], r"a.tar: 2: its .txt is not UTF-8 \(byte 0xe9\)"),
        ([("1.json", "{}"), ("2.json", "{")], "a.tar: 2: its .json is not JSON"),
        ([("1.jsonl", '{"n": 1}\n\n[]')], "a.tar: 1.jsonl line 3: its .jsonl is not a JSON object"),
    ],
)
def test_a_bad_record_is_named(tmp_path, members, message):
    source = opened(write(tmp_path / "a.tar", members))
    with pytest.raises(UserError, match=message):
        source[1]


def test_the_objects_of_an_archive_need_not_have_the_same_keys(tmp_path):
    source = opened(write(tmp_path / "a.tar", [("1.json", '{"n": 1}'), ("2.JSON", '\ufeff{"m": 2}'), ("3.json", "{")]))
    assert source.columns == ("n", "m") and source[0] == {"n": 1, "m": None} and source[1] == {"n": None, "m": 2}
    labels = opened(write(tmp_path / "b.tar", [("1.cls", "\u00a0x \n"), ("1.txt", "\ufeffone\r\n")]))
    assert labels[0] == {"label": "\u00a0x", "text": "one\n"}
    lines = opened(write(tmp_path / "c.tar", [("1.jsonl", '\ufeff{"n": 1}\r{"n": 2}\r')]))
    assert [lines[0], lines[1]] == [{"n": 1}, {"n": 2}]


def test_no_archive_that_is_cut_off_is_read(tmp_path):
    write(tmp_path / "whole.tar", samples(4))
    whole = (tmp_path / "whole.tar").read_bytes()
    # In a head, in a file, between two files, and where the blocks that end an archive begin.
    for size in (100, 512 + 1, 512 * 2, 512 * 2 * 7 + 20, 512 * 2 * 12):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match="a.tar: is not a complete tar archive") as caught:
            open_source("tar", str(tmp_path / "a.tar"), "train")
        assert "\n" not in str(caught.value)
    (tmp_path / "a.tar").write_bytes(whole + whole)
    with pytest.raises(UserError, match="a.tar: has data after its end; if archives were concatenated"):
        opened(tmp_path / "a.tar")
    damaged = bytearray(whole)
    damaged[512 * 4 + 10] ^= 1  # a head
    (tmp_path / "a.tar").write_bytes(damaged)
    with pytest.raises(UserError, match="a.tar: is not a complete tar archive"):
        opened(tmp_path / "a.tar")


def test_archives_of_images_with_a_readme_are_not_taken_for_texts(tmp_path):
    path = write(tmp_path / "a.tar", [("readme.txt", "x"), ("cat/1.png", "x")])
    with pytest.raises(UserError, match="a.tar: cat/1.png: .*image"):
        opened(path)[0]


def test_images_and_recordings_are_bytes(tmp_path):
    members = [(f"{n}.{ending}", f"{ending}{n}") for n in range(3) for ending in ("cls", "jpg", "wav")]
    source = opened(write(tmp_path / "a.tar", members))
    assert source[2] == {"label": "cls2", "image": b"jpg2", "audio": b"wav2"} and source.where(1) == "a.tar: 1"
    # Class folders with a readme, and images alone, are not records.
    for name in ("b", "c"):
        with pytest.raises(UserError, match=r"(not in a class folder|not a complete image)"):
            records(opened(write(tmp_path / f"{name}.tar", [("readme.txt", "x")] * (name == "b") + [("x.jpg", "x")])))


def test_an_archive_is_scanned_once(tmp_path, monkeypatch):
    """The second open reads an index; it is not taken for that of a changed archive."""
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "a.tar", samples(100))
    os.utime(path, (1e9, 1e9))
    first, again = opened(path), opened(path)
    assert records(again) == records(first) == wanted(100) and again.places[0].path is not None
    scanned = []
    monkeypatch.setattr(archive, "members", lambda file: scanned.append(file.path.name) or members(file))
    assert records(opened(path)) == wanted(100) and len(scanned) == 1, "the first record alone is looked for"
    assert records(pickle.loads(pickle.dumps(again))) == wanted(100)
    write(tmp_path / "a.tar", samples(101))
    assert records(opened(path)) == wanted(101)


def test_two_files_with_equal_hashes_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "hash", lambda name: 1, raising=False)
    assert len(opened(write(tmp_path / "a.tar", samples(3)))) == 3
    with pytest.raises(UserError, match='b.tar: has two files named "d/0001.txt"; remove one'):
        open_source("tar", write(tmp_path / "b.tar", [("d/0001.txt", "x"), ("d/0002.txt", "x"), ("d/0001.txt", "x")]), "train")
