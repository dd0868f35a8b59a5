"""Token stores: what is written is read back, and a part of a store is never taken for the whole."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import select
import subprocess
import sys
import threading

import numpy as np
import pytest

from fmjax.data.identity import without_names
from fmjax.data.storage import cache, token_store
from fmjax.data.storage.token_store import ENDS, HEADER, SIZES, TOKENS, Part, TokenStore, Writer
from fmjax.errors import UserError

DOCUMENTS = [[5, 70_000, 3], [], [1], [9, 8]]
NARROW, WIDE = np.dtype("<u2"), np.dtype("<u4")


def part(rows: list[list[int]]) -> Part:
    ids = np.array([number for row in rows for number in row], np.int32)
    return Part(ids, np.array(list(map(len, rows))), np.array([[len(row), 2 * len(row)] for row in rows]))


def fill(writer: Writer) -> dict:
    writer.add(part(DOCUMENTS[:3]), 0.75)
    writer.add(part(DOCUMENTS[3:]), 1.0)
    return {"column": "text"}


def built(folder) -> TokenStore:
    return token_store.get_or_build(folder, "tokens-1", WIDE, fill)


def test_documents_are_read_back(tmp_path):
    store = pickle.loads(pickle.dumps(built(tmp_path)))
    assert store.ends.tolist() == [3, 3, 4, 6]
    assert store.sizes.tolist() == [[3, 6], [0, 0], [1, 2], [2, 4]]
    assert store.read(0, 6).tolist() == [5, 70_000, 3, 1, 9, 8] and store.read(1, 4).dtype == np.int32
    assert store.read(2, 2).size == 0
    header = store.header
    assert (header["tokens"], header["documents"], header["characters"], header["bytes"]) == (6, 4, 6, 12)
    assert header["column"] == "text"
    # As datatrove writes them.
    assert np.fromfile(store.folder / TOKENS, "<u4").tolist() == [5, 70_000, 3, 1, 9, 8]
    assert np.fromfile(store.folder / ENDS, "<u8").tolist() == [3, 3, 4, 6]


def test_small_vocabularies_take_two_bytes_a_token(tmp_path):
    def small(writer: Writer) -> dict:
        writer.add(part([[65_535, 1]]))
        return {}

    store = token_store.get_or_build(tmp_path, "tokens-1", NARROW, small)
    assert (store.folder / TOKENS).stat().st_size == 4 and store.read(0, 2).tolist() == [65_535, 1]


@pytest.mark.parametrize("name", [TOKENS, ENDS, SIZES, HEADER])
def test_a_damaged_store_is_built_again(tmp_path, name):
    path = built(tmp_path).folder / name
    os.truncate(path, path.stat().st_size - 3)
    assert token_store.find("tokens-1", [tmp_path]) is None
    with pytest.raises(UserError, match="is not a complete token store"):
        TokenStore(path.parent)
    assert built(tmp_path).read(0, 6).tolist() == [5, 70_000, 3, 1, 9, 8]


def test_a_store_whose_content_was_damaged_is_built_again_if_it_is_verified(tmp_path, monkeypatch):
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    path = built(tmp_path).folder / token_store.TOKENS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\1")
    built(tmp_path)
    assert path.read_bytes() != whole  # only sizes are compared
    with cache.verifying(True):
        built(tmp_path)
    assert path.read_bytes() == whole


def test_a_store_without_a_file_or_of_another_format_is_built_again(tmp_path):
    folder = built(tmp_path).folder
    (folder / SIZES).unlink()
    assert len(built(tmp_path).sizes) == 4
    (folder / HEADER).write_text((folder / HEADER).read_text().replace('"format": 1', '"format": 0'))
    assert token_store.find("tokens-1", [tmp_path]) is None
    built(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_said(tmp_path):
    store = built(tmp_path)
    os.truncate(store.folder / TOKENS, 8)
    with pytest.raises(UserError, match="tokens.ds: was truncated"):
        store.read(0, 6)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "locks")


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_nothing_is_left_of_a_build_that_fails(tmp_path, error):
    def broken(writer: Writer) -> dict:
        fill(writer)
        raise error("stop")

    with pytest.raises(error):
        token_store.get_or_build(tmp_path, "tokens-1", WIDE, broken)
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    left: list[str] = []

    def killed(writer: Writer) -> dict:
        fill(writer)
        for stream in writer.streams.values():
            stream.flush()
        copy = writer.folder.with_name(writer.folder.name + "0")  # of another process
        copy.mkdir()
        for file in writer.folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        left.append(copy.name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        token_store.get_or_build(tmp_path, "tokens-1", WIDE, killed)
    assert names(tmp_path) == left
    built(tmp_path)
    assert names(tmp_path) == ["tokens-1"]


class Full:
    """A file on a disk that is full."""

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", [TOKENS, ENDS, SIZES])
def test_a_full_disk_is_one_line_with_the_bytes_that_are_needed(tmp_path, name):
    def filling(writer: Writer) -> dict:
        writer.add(part(DOCUMENTS[:3]), 0.75)
        writer.streams[name].close()
        writer.streams[name] = Full()
        writer.add(part(DOCUMENTS[3:]), 1.0)
        return {}

    # 4 tokens of 4 bytes, 3 documents of 24
    said = rf"{tmp_path}: .*No space left on device\) after 88 of about 117 bytes; free disk space.*data.store"
    with pytest.raises(UserError, match=said):
        token_store.get_or_build(tmp_path, "tokens-1", WIDE, filling)
    assert names(tmp_path) == []
    built(tmp_path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be stored \(Not a directory\); name another folder in data.store"):
        built(tmp_path / "file")


def in_threads(tmp_path, slowly) -> list[TokenStore]:
    found: list[TokenStore] = []

    def run() -> None:
        found.append(token_store.get_or_build(tmp_path, "tokens-1", WIDE, slowly))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_of_two_builders_one_waits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "POLL", 0.001)
    monkeypatch.setattr(cache, "QUIET", 0)
    waiting = threading.Event()
    monkeypatch.setattr(cache, "tell", lambda text: (waiting.set(), print(text)))
    calls: list[int] = []

    def slowly(writer: Writer) -> dict:
        calls.append(1)
        assert waiting.wait(60)
        return fill(writer)

    found = in_threads(tmp_path, slowly)
    assert calls == [1] and [store.read(0, 6).tolist() for store in found] == [[5, 70_000, 3, 1, 9, 8]] * 2
    assert capsys.readouterr().out.count("waiting for another process that prepares the same data") == 1


def test_without_locks_both_build_and_one_store_is_left(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    both = threading.Barrier(2)

    def slowly(writer: Writer) -> dict:
        content = fill(writer)
        both.wait(60)
        return content

    found = in_threads(tmp_path, slowly)
    assert [store.read(0, 6).tolist() for store in found] == [[5, 70_000, 3, 1, 9, 8]] * 2
    assert names(tmp_path) == ["tokens-1"]


def test_the_place_is_the_config_s_or_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    assert token_store.place() == tmp_path / "cache" / "tokens"
    with token_store.stored_in(str(tmp_path / "ssd")):
        assert token_store.place() == tmp_path / "ssd"
        with token_store.stored_in(None):
            assert token_store.place() == tmp_path / "cache" / "tokens"
    assert token_store.place() == tmp_path / "cache" / "tokens"


def test_a_name_stands_for_the_content_and_not_for_names():
    files = [{"name": "a.txt", "size": 3, "sha256": "1f"}]
    one = {"source": "text", "split": "train", "record": "line", "files": files}
    other = one | {"split": "validation", "files": [files[0] | {"name": "b.txt"}]}
    key = lambda facts: token_store.key_of(without_names(facts), "text")  # noqa: E731
    assert key(one) == key(other)
    assert key(one) != key(one | {"record": "file"})
    assert key(one) != key(one | {"files": [files[0] | {"sha256": "20"}]})
    tfds = {"source": "tfds", "split": "train[:1%]", "version": "1.0.0"}
    assert key(tfds) != key(tfds | {"split": "train"})
    assert key({"books": one}) == key({"books": other})


HOST = """
import socket, sys
import numpy as np
name, folder = sys.argv[1:]
socket.gethostname = lambda: name
from fmjax.data.storage import token_store
from fmjax.data.storage.token_store import Part

def fill(writer):
    print("builds", flush=True)
    sys.stdin.readline()
    writer.add(Part(np.arange(3), np.array([3]), np.array([[3, 3]])))
    return {}

store = token_store.get_or_build(token_store.Path(folder), "tokens-1", np.dtype("<u2"), fill)
print(store.read(0, 3).tolist(), flush=True)
"""


def test_one_of_two_hosts_builds_for_both(tmp_path):
    """Two processes with caches and names of their own, and a shared folder on a disk whose locks both see."""
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, name, str(tmp_path / "shared")],
            env=os.environ | {"FMJAX_CACHE": str(tmp_path / name), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    (ready, *_), _, _ = select.select([host.stdout for host in hosts], [], [])
    builder, other = sorted(hosts, key=lambda host: host.stdout is not ready)
    assert builder.stdout.readline() == "builds\n"
    assert "waiting for another process that prepares the same data" in other.stderr.readline()
    answers = [host.communicate("go\n")[0] for host in (builder, other)]
    assert answers == ["[0, 1, 2]\n"] * 2 and [host.returncode for host in hosts] == [0, 0]
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["locks", "tokens-1"]
