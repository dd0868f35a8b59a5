"""What is in the cache, and what is removed: what no process has used for some days and none has open."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from fmjax.data.sources.open import open_source
from fmjax.data.storage import cache, cleaning, token_store
from fmjax.data.storage.token_store import Part
from scripts import clean_cache

OLD = 10**9  # a time long ago


def fill(writer) -> dict:
    writer.add(Part(np.arange(4), np.array([4]), np.array([[9, 9]])))
    return {}


def test_old_entries_are_removed_unless_in_use(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path))
    paths = [cache.get_or_make(Path("unpacked", name, name), lambda stream: stream.write(b"x" * 1000)) for name in "abc"]
    store = token_store.get_or_build(tmp_path / "tokens", "tokens-1", np.dtype("<u2"), fill)
    (tmp_path / "files" / f".{0:032x}.part").write_bytes(b"left")
    (tmp_path / "data.txt").write_bytes(b"line\n\n" * 20_000)
    assert clean_cache.main([]) == 0 and "3  decompressed files" in capsys.readouterr().out
    for path in tmp_path.rglob("*"):
        os.utime(path, (OLD, OLD))
    assert cache.get_or_make(Path("unpacked", "a", "a"), lambda stream: None) == paths[0]  # is used
    with paths[1].open("rb"):  # is in use, as is the store
        assert clean_cache.main(["--older_than", "30"]) == 0
    assert "removed 2 entries, 0.0 MB; 2 are in use and stay" in capsys.readouterr().out
    assert [path.exists() for path in paths] == [True, True, False] and store.read(1, 3).tolist() == [1, 2]
    assert not list(tmp_path.rglob("*.part"))
    del store
    assert cleaning.remove(30)[::2] == (2, 0) and [entry.kind for entry in cleaning.entries()] == ["unpacked"]
    assert token_store.find("tokens-1", [tmp_path / "tokens"]) is None
    assert len(open_source("auto", str(tmp_path / "data.txt"), "train")) == 20_000
    assert clean_cache.main(["--older_than", "-1"]) == 2 and "--older_than" in capsys.readouterr().err


def test_files_of_others_and_of_trees_in_use_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path))
    other = [
        *("tokens/.git/HEAD", "tokens/mine/store.json", "tokens/tokens-1/store.json", "digests/notes.json", "files/.mine.part"),
        *("hashes/mine.json", "hashes/list.json", "hashes/folder.json", "files/mine", "files/folder/a.txt"),
    ]
    for name in other:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"format": 1}')
    (tmp_path / "hashes" / "list.json").write_text("[1]")
    (tmp_path / "hashes" / "folder.json").write_text(json.dumps({"size": 1, "sha256": "0" * 64}))
    in_use, single = (Path("remote", key, "gs", "b", "1.png") for key in ("ab", "cd"))
    paths = [cache.get_or_make(name, lambda stream: stream.write(b"x")) for name in (in_use, single)]
    cache.hold(cache.tree_of(paths[0]))
    cache.remember(tmp_path / "a.txt", cache.Known((cache.SMALL, 0, 0, 0), "0" * 64, False))
    for path in tmp_path.rglob("*"):
        os.utime(path, (OLD, OLD))
    assert cleaning.remove(30)[::2] == (2, 1) and [path.exists() for path in paths] == [True, False]
    assert all((tmp_path / name).exists() for name in other)
    assert clean_cache.main(["--older_than", "1"]) == 2 and "--older_than" in capsys.readouterr().err


def test_a_cache_on_another_disk_and_what_cannot_be_removed(tmp_path, monkeypatch, capsys):
    root = tmp_path / "cache"
    monkeypatch.setenv("FMJAX_CACHE", str(root))
    (tmp_path / "disk").mkdir()
    root.mkdir()
    (root / "files").symlink_to(tmp_path / "disk")
    paths = [cache.get_or_make(Path("unpacked", name), lambda stream: stream.write(b"x")) for name in "ab"]
    for path in root.rglob("*.json"):
        os.utime(path, (OLD, OLD))
    real = Path.unlink

    def unlink(self, missing_ok=False):
        if self.name == "b.json":
            raise PermissionError("no")
        real(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with paths[0].open("rb"):
        assert clean_cache.main(["--older_than", "30"]) == 0
    assert "removed 0 entries, 0.0 MB; 1 are in use and stay; 1 could not be removed" in capsys.readouterr().out
    assert all(path.exists() for path in paths)
