"""What is in the cache, and what is removed: what no process has used for some days and none has open."""

from __future__ import annotations

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
    (tmp_path / "files" / ".1.part").write_bytes(b"left")
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
