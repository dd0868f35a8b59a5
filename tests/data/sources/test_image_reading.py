"""Images are decoded when they are read: how little is held, what is decoded once, and what becomes of damaged ones."""

from __future__ import annotations

import gc
import gzip
import hashlib
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from support.image_files import (
    CLASSES,
    COLOURS,
    GOOD,
    IMAGES,
    LABELS,
    encoded,
    idx,
    read,
    same,
    write_tar,
    write_tree,
)

from fmjax.data.records import ConcatenatedSources
from fmjax.data.sources import folders
from fmjax.data.sources.open import hold_out, open_source
from fmjax.data.storage import cache
from fmjax.data.storage.fingerprints import data_differences, needs_contents, with_digests
from fmjax.data.stream.tolerance import Tolerance
from fmjax.errors import UserError
from fmjax.tasks.image_classify import Task as ImageClassify


def write_many(folder: Path, form: str, count: int) -> str:
    """Writes images of 3 kB, in which no two are the same, as a folder, an archive or an idx file."""
    arrays = np.random.default_rng(1).integers(0, 256, (count, 32, 32), np.uint8)
    if form == "idx":
        folder.mkdir()
        (folder / f"{IMAGES}.gz").write_bytes(gzip.compress(idx(arrays), 1))
        (folder / LABELS).write_bytes(idx(np.zeros(count, np.uint8)))
        return str(folder)
    files = [(f"{number % 7}/image-{number:06d}.png", encoded(arrays[number])) for number in range(count)]
    if form == "archive":
        return write_tar(folder.with_suffix(".tar.gz"), files, "w:gz")
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("form", ["folder", "archive", "idx"])
def test_images_are_read_when_they_are_asked_for(tmp_path, monkeypatch, form):
    """Of 800 images, 800 kB, nothing is held but names and offsets, and of what was read no more than is said."""
    read(open_source("auto", write_many(tmp_path / "warm", form, 8), "train"))  # imports what is needed
    path, count, most = write_many(tmp_path / "many", form, 800), 800, 64_000
    monkeypatch.setattr(folders, "MOST_KEPT", most)
    tracemalloc.start()
    try:
        begin = tracemalloc.get_traced_memory()[0]
        source = open_source("auto", path, "train")
        opened = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        shapes = {source[index]["image"].shape for index in range(count)}
        peak = tracemalloc.get_traced_memory()[1]
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(source) == count and shapes == {(32, 32, 1)}
    # What Python keeps for the next objects of a size differs from run to run, by 15 kB.
    assert opened - begin < 100 * count and kept - opened < most + 35_000 and peak - opened < most + 200_000
    assert len(pickle.dumps(source)) < 64 * count
    again = pickle.loads(pickle.dumps(source))
    assert all(np.array_equal(again[index]["image"], source[index]["image"]) for index in range(0, count, 50))
    assert again.fingerprint() == source.fingerprint() and again.where(99) == source.where(99)


def test_what_is_kept_is_decoded_once_and_labels_need_no_image(tmp_path, monkeypatch):
    folder, decoded = write_tree(tmp_path / "train"), []
    decode = folders.decode
    monkeypatch.setattr(folders, "decode", lambda data, where: decoded.append(where) or decode(data, where))
    source = open_source("auto", folder, "train")
    rest, held = hold_out(source, 0.5, by="label")
    task = ImageClassify()
    found = [task.find_labels(part, range(len(part)))["labels"] for part in (rest, held)]
    assert {*found[0], *found[1]} == {"cat", "dog", "Übel"}
    both = ConcatenatedSources({"a": rest, "b": held})
    assert [both.value(index, "label") for index in range(5)] and not decoded
    assert pickle.loads(pickle.dumps(source)).kept == {}
    settings = ImageClassify(image_size=4, channels=3).resolve(source)
    assert settings["labels"] == ("cat", "dog", "Übel") and not decoded
    with pytest.raises(UserError, match="is 4 x 5 pixels, not square"):
        task.find_images(source)
    assert len(decoded) == 5 and same(source, COLOURS[:5], ["cat", "cat", "dog", "dog", "Übel"]) and len(decoded) == 5
    assert same(source, COLOURS[:5], ["cat", "cat", "dog", "dog", "Übel"]) and source[-1]["label"] == "Übel"
    with pytest.raises(IndexError):
        source[5]


def test_damaged_images_are_left_out_where_that_is_tolerated(tmp_path):
    folder = Path(write_tree(tmp_path / "train"))
    (folder / "cat/2.PNG").write_bytes(GOOD[:-30])
    (folder / "dog/0.png").symlink_to(tmp_path / "nowhere.png")
    members = [(name, (folder / name).read_bytes()) for name in CLASSES]
    for files, most in ((str(folder), 2), (write_tar(tmp_path / "a.tar", members), 1)):
        tolerance = Tolerance(f"skip:{most}")
        with tolerance.active():
            kept, _ = tolerance.apply(open_source("auto", files, "train"), read, 2)
        assert same(kept, COLOURS[[0, 2, 3, 4]], ["cat", "dog", "dog", "Übel"])
        assert "cat/2.PNG: is not a complete image" in tolerance.found[0] and len(tolerance.found) == most
    with pytest.raises(UserError, match="train: dog/0.png: cannot be read"):
        open_source("auto", str(folder), "train")


def test_folders_are_read_in_the_order_of_their_names(tmp_path):
    names = ("a/1.png", "a b/1.png", "a.b/1.png", "a-b/.hidden/1.png", "a-b/2.png", "ab/10.png", "ab/9.png", "Z/1.png", "ä/1.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    source = open_source("class_folders", str(tmp_path), "train")
    files = [file for file in sorted(tmp_path.rglob("*.png")) if ".hidden" not in file.parts]
    assert [source.where(index) for index in range(8)] == [f"{tmp_path.name}: {file.relative_to(tmp_path)}" for file in files]
    names, contents = hashlib.sha256(), hashlib.sha256()
    for file in files:
        head = f"{file.relative_to(tmp_path)}\0{len(GOOD)}\0".encode()
        names.update(head)
        contents.update(head + GOOD)
    mark = {"name": tmp_path.name, "size": 8, "names": names.hexdigest()}
    assert source.fingerprint()["files"] == [mark]
    with cache.verifying(True):
        verified = open_source("class_folders", str(tmp_path), "train").fingerprint()
    assert verified["files"] == [mark | {"sha256": contents.hexdigest()}]
    # As an earlier version stored it; a resumed run then reads the folder as a whole.
    old = source.fingerprint() | {"files": [{"name": tmp_path.name, "size": 8, "sha256": contents.hexdigest()}]}
    assert needs_contents({"train": old}, (), False) and not needs_contents({"train": verified, "text": "x"}, (), False)
    assert data_differences({"train": old}, {"train": verified}) == []
    assert data_differences({"train": verified}, {"train": source.fingerprint()}) == []
    # A start that reads no contents keeps the digest of an earlier one, and none of other files.
    assert with_digests({"train": source.fingerprint()}, {"train": verified}) == {"train": verified}
    changed = {"train": source.fingerprint() | {"files": [mark | {"names": "0" * 64}]}}
    assert with_digests(changed, {"train": verified}) == changed
    assert "sha256 000000000000" in data_differences({"train": verified}, changed)[0]
