"""Sources of images: idx files, class folders and archives of them, scikit-learn's digits; and what is wrong with them."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.image_files import (
    CLASSES,
    COLOURS,
    GOOD,
    GREYS,
    IMAGES,
    LABELS,
    encoded,
    idx,
    read,
    same,
    write_tar,
    write_tree,
)

from fmjax.data.kinds import pixels
from fmjax.data.sources import folders
from fmjax.data.sources import idx as idx_source
from fmjax.data.sources.open import hold_out, open_source
from fmjax.data.storage import cache
from fmjax.data.storage.paths import is_image
from fmjax.errors import UserError


def refused(kind: str, files: str | list[str] | None, split: str, match: str) -> None:
    """Checks that opening a source, or reading it, raises a UserError of one line that says so."""
    with pytest.raises(UserError, match=match) as caught:
        read(open_source(kind, files, split))
    assert "\n" not in str(caught.value)


@pytest.fixture
def mnist(tmp_path) -> Path:
    """A folder like MNIST's, the training files gzipped and the test files not."""
    labels = np.arange(6, dtype=np.uint8)
    (tmp_path / f"{IMAGES}.gz").write_bytes(gzip.compress(idx(GREYS)))
    (tmp_path / f"{LABELS}.gz").write_bytes(gzip.compress(idx(labels)))
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(GREYS[:2]))
    (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(idx(labels[:2]))
    return tmp_path


def test_idx_files_named_in_upper_case(mnist):
    wanted = open_source("auto", str(mnist), "train").fingerprint()["files"]
    for file in mnist.iterdir():
        file.rename(mnist / file.name.upper())
    whole = open_source("auto", str(mnist), "train")
    assert len(whole) == 6 and len(open_source("auto", str(mnist), "test")) == 2
    assert [file["sha256"] for file in whole.fingerprint()["files"]] == [file["sha256"] for file in wanted]
    images, labels = (mnist / f"T10K-{name}-UBYTE" for name in ("IMAGES.IDX3", "LABELS.IDX1"))
    labels.rename(mnist / "t10k-labels.idx1-ubyte")  # one of each
    assert len(open_source("auto", str(images), "test")) == 2
    (mnist / "t10k-labels.idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"T10K-LABELS-IDX1-UBYTE.GZ or T10K-LABELS-IDX1-UBYTE, is not in the same folder"):
        open_source("auto", str(images), "test")


def test_idx_files(mnist):
    train = open_source("auto", str(mnist), "train")
    assert same(train, GREYS[..., None], range(6)) and train.columns == ("image", "label")
    assert train.where(3) == f"{IMAGES}.gz image 3" and str(mnist) not in json.dumps(train.fingerprint())
    for split, files in (("test", str(mnist)), ("validation", str(mnist / "t10k-images.idx3-ubyte"))):
        assert same(open_source("auto", files, split), GREYS[:2, ..., None], range(2))
    assert train.fingerprint() != open_source("idx", str(mnist), "test").fingerprint()
    again = pickle.loads(pickle.dumps(train))
    assert same(again, GREYS[..., None], range(6)) and again.fingerprint() == train.fingerprint()
    rest, held = hold_out(train, 1 / 3)
    assert sorted(part[index]["label"] for part in (rest, held) for index in range(len(part))) == list(range(6))
    assert same(open_source("auto", f"{mnist}[:50%]", "train"), GREYS[:3, ..., None], range(3))


# What is wrong -> the file, what it holds instead, and the message.
BAD_IDX = {
    "type": (
        IMAGES,
        b"\0\0\x0d\x03" + idx(GREYS)[4:],
        f"{IMAGES}: begins with 00 00 0d 03, not 00 00 08 03 as an idx file of im",
    ),
    "axes": (IMAGES, idx(GREYS[0]), f"{IMAGES}: begins with 00 00 08 02"),
    "empty": (IMAGES, b"", f"{IMAGES}: begins with nothing"),
    "head": (IMAGES, idx(GREYS)[:9], f"{IMAGES}: begins with 00 00 08 03"),
    "short": (IMAGES, idx(GREYS)[:-1], f"{IMAGES}: its header promises 120 bytes, but it has 119; fetch it again"),
    "long": (IMAGES, idx(GREYS) + b"\0", f"{IMAGES}: its header promises 120 bytes, but it has 121"),
    "huge": (IMAGES, b"\0\0\x08\x03" + b"\xff" * 12, "promises 79,228,162,458,924,105,385,300,197,375 bytes, but it has 0"),
    "fewer": (IMAGES, idx(GREYS[:5]), f"{LABELS}: has 6 labels for the 5 images of {IMAGES}; fetch both again"),
    "gzip": (f"{IMAGES}.gz", gzip.compress(idx(GREYS))[:-12], f"{IMAGES}.gz: is not a complete gzip file"),
    "page": (f"{IMAGES}.gz", b"<html>", rf"{IMAGES}.gz: cannot be read as gzip \(Not a gzipped file"),
    "flipped": (
        f"{IMAGES}.gz",
        gzip.compress(idx(GREYS), 0)[:-9] + bytes(9),
        f"{IMAGES}.gz: cannot be read as gzip .CRC check failed",
    ),
    "swapped": (LABELS, idx(GREYS), f"{LABELS}: begins with 00 00 08 03, not 00 00 08 01 as an idx file of labels does"),
    "alone": (LABELS, None, f"{IMAGES}: the file of its labels, {LABELS}.gz or {LABELS}, is not in the same folder; put it"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_faults_of_idx_files(tmp_path, case):
    name, content, message = BAD_IDX[case]
    (tmp_path / IMAGES).write_bytes(idx(GREYS))
    (tmp_path / LABELS).write_bytes(idx(np.arange(6, dtype=np.uint8)))
    if name.endswith(".gz"):
        (tmp_path / IMAGES).unlink()
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused("auto", str(tmp_path), "train", match=message)


def test_files_that_are_not_idx_files_of_images(tmp_path):
    (tmp_path / "numbers.bin").write_bytes(idx(GREYS))
    refused("idx", str(tmp_path / "numbers.bin"), "train", match="numbers.bin: is not named like an idx file")
    refused("idx", str(tmp_path), "train", match="has no idx file of images for train")
    refused("idx", [str(tmp_path), "other"], "train", match="has 2 names, but data.source=idx reads one")
    refused("idx", f"{tmp_path}/number.bin", "train", match=r'number.bin: no such .*did you mean "numbers.bin"')


def test_class_folders(tmp_path):
    folder = write_tree(tmp_path / "train")
    for litter in (".DS_Store.png", "cat/.hidden.png", "__MACOSX/cat/1.png", "cat/notes.txt", "cat/folder.png/1.txt"):
        (tmp_path / "train" / litter).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / litter).write_text("no image")
    source = open_source("auto", folder, "train")
    assert same(source, COLOURS[:5], ["cat", "cat", "dog", "dog", "Übel"])
    assert [source.where(index) for index in range(5)] == [f"train: {name}" for name in CLASSES]
    assert source.fingerprint() == open_source("class_folders", folder, "train").fingerprint()
    assert str(tmp_path) not in json.dumps(source.fingerprint())
    with cache.verifying(True):
        whole = open_source("auto", folder, "train").fingerprint()
        (tmp_path / "train/dog/1.png").write_bytes(encoded(COLOURS[5]))
        assert whole != open_source("auto", folder, "train").fingerprint()
    (tmp_path / "train/dog/1.png").write_bytes(encoded(COLOURS[5]) + b"x")
    assert source.fingerprint() != open_source("auto", folder, "train").fingerprint()


@pytest.mark.parametrize(
    ("ending", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar.xz", "w:xz"), ("tar.bz2", "w:bz2")]
)
def test_archives_of_class_folders(tmp_path, ending, mode):
    names = list(reversed(CLASSES))  # in the archive's own order
    members = [(f"./outer/{name}", encoded(COLOURS[CLASSES[name]])) for name in names]
    folder = tarfile.TarInfo("outer/empty.png")
    folder.type = tarfile.DIRTYPE
    litter = [("outer/readme.txt", b"no image"), ("outer/cat/._2.png", b"no image")]
    path = write_tar(tmp_path / f"train.{ending}", [*litter, *members], mode)
    source = open_source("auto", path, "train")
    assert same(source, COLOURS[4::-1], ["Übel", "dog", "dog", "cat", "cat"])
    assert (
        source.where(0) == f"train.{ending}: outer/Übel/1.png" and source.fingerprint()["files"][0]["name"] == f"train.{ending}"
    )
    assert same(open_source("auto", f"{path}[-2:]", "train"), COLOURS[1::-1], ["cat", "cat"])


# What is wrong -> the files, and the message.
BAD_CLASSES = {
    "empty": ({}, r"train: no images for train \(.jpg, .jpeg, .png, .bmp, ...\)"),
    "texts": ({"cat/readme.txt": b"no image"}, "train: no images for train"),
    "no class": ({"1.png": GOOD}, "train: 1.png: is not in a class folder"),
    "two splits": (
        {"train/cat/1.png": GOOD, "val/cat/1.png": GOOD},
        "train: val/cat/1.png: class folders lie in train/ and val/",
    ),
    "cut PNG": ({"cat/1.png": GOOD, "dog/1.png": GOOD[:-30]}, r"train: dog/1.png: is not a complete image \("),
    "cut JPEG": ({"cat/1.jpg": encoded(COLOURS[0], "JPEG")[:-40]}, r"cat/1.jpg: is not a complete image \(image file is trunc"),
    "no bytes": ({"cat/1.png": b""}, r"train: cat/1.png: is not a complete image \(no known format\); fetch it again"),
    "a page": ({"cat/1.png": b"<html>" * 99}, r"train: cat/1.png: is not a complete image \(no known format\)"),
    "16 bits": ({"cat/1.png": encoded(GREYS[0].astype(np.uint16))}, r"cat/1.png: has more than 8 bits per channel \(mode I;16\)"),
}


@pytest.mark.parametrize("case", BAD_CLASSES)
@pytest.mark.parametrize("form", ["folder", "archive"])
def test_faults_of_class_folders(tmp_path, form, case):
    members, message = BAD_CLASSES[case]
    path = tmp_path / "train"
    path.mkdir()
    for name, content in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    if form == "archive":
        write_tar(tmp_path / "train.tar", list(members.items()))
        path, message = tmp_path / "train.tar", message.replace("train: ", "train.tar: ")
    refused("class_folders", str(path), "train", match=message)


def test_links_to_nothing_are_refused(tmp_path):
    write_tree(tmp_path / "train")
    (tmp_path / "train/cat/3.png").symlink_to(tmp_path / "nowhere.png")
    refused("auto", str(tmp_path / "train"), "train", match="train: cat/3.png: cannot be read")


def linked(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("cat/2.png")
    member.type, member.linkname = kind, "../../etc/passwd"
    return member


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../cat/2.png", "a.tar: ../cat/2.png: would be extracted outside the archive"),
        ("cat/../../2.txt", "a.tar: cat/../../2.txt: would be extracted outside"),
        ("/cat/2.png", "a.tar: /cat/2.png: would be extracted outside"),
        (linked(tarfile.SYMTYPE), "a.tar: cat/2.png: is a link, a device or sparse"),
        (linked(tarfile.LNKTYPE), "a.tar: cat/2.png: is a link, a device or sparse"),
        (linked(tarfile.CHRTYPE), "a.tar: cat/2.png: is a link, a device or sparse"),
    ],
)
def test_members_that_do_not_belong_in_an_archive(tmp_path, member, message):
    before = set(tmp_path.iterdir())
    path = write_tar(tmp_path / "a.tar", [("cat/1.png", encoded(COLOURS[0])), (member, b"")])
    refused("auto", path, "train", match=message)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "a.tar"}


@pytest.mark.parametrize(("ending", "step"), [("tar", 256), ("tar.gz", 7), ("tar.xz", 9)])
def test_an_archive_that_is_cut_off_is_refused_or_whole(tmp_path, ending, step):
    """Wherever it is cut: tarfile takes a head that is cut off for the end of the archive."""
    members = [(f"{number % 2}/{number}.png", encoded(COLOURS[number])) for number in range(6)]
    path = tmp_path / f"a.{ending}"
    write_tar(path, members, "w" + ending.removeprefix("tar").replace(".", ":"))
    content = path.read_bytes()
    whole = 0
    for end in (*range(0, len(content), step), len(content)):
        path.write_bytes(content[:end])
        try:
            assert len(read(open_source("auto", str(path), "train"))) == 6
            whole += 1
        except UserError as error:
            assert not whole and str(path) in str(error)
    assert whole


def test_a_damaged_head_and_other_files_are_no_archives(tmp_path):
    path = Path(write_tar(tmp_path / "a.tar", [(f"cat/{number}.png", encoded(COLOURS[number])) for number in range(3)]))
    content = bytearray(path.read_bytes())
    content[1024 + 10] ^= 1  # in the name of the second
    for wrong in (bytes(content), b"", b"PK\3\4" * 400):
        path.write_bytes(wrong)
        refused("auto", str(path), "train", match="a.tar: is not a complete tar archive .*; fetch it again")


def test_what_would_fill_the_memory_or_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    folder = write_tree(tmp_path / "train")
    members = [("cat/1.png", encoded(COLOURS[0])), ("cat/2.txt", bytes(500))]
    path, packed = write_tar(tmp_path / "a.tar", members), write_tar(tmp_path / "b.tar.gz", members, "w:gz")
    monkeypatch.setattr(folders, "MOST_FILE", 499)
    refused("auto", path, "train", match="a.tar: cat/2.txt: takes more than 499 bytes; remove it")
    monkeypatch.setattr(folders, "MOST_BYTES", 9999)
    message = "b.tar.gz: decompresses to more than 9,999 bytes; if you trust it, decompress it yourself"
    refused("auto", packed, "train", match=message)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    monkeypatch.setattr(pixels, "MOST_PIXELS", 19)
    refused("auto", folder, "train", match="train: cat/10.png: 5 x 4 pixels are more than 19; scale the image down")


def test_an_archive_with_more_behind_its_end_or_another_ending(tmp_path):
    path = Path(write_tar(tmp_path / "a.tar", [("cat/1.png", GOOD)]))
    path.write_bytes(path.read_bytes() * 2)
    refused("auto", str(path), "train", match="a.tar: has data after its end; if archives were concatenated")
    path = write_tar(tmp_path / "b.tar", [("cat/1.png", GOOD)], "w:gz")
    refused("class_folders", path, "train", match=r"b.tar: is not a complete tar archive .*; it seems to be compressed; add .gz")


def test_digits():
    sources = {split: open_source("digits", None, split) for split in idx_source.DIGITS}
    assert {split: len(source) for split, source in sources.items()} == idx_source.DIGITS
    seen = [source[index]["image"].tobytes() for source in sources.values() for index in range(len(source))]
    assert len(seen) == 1797 == len(set(seen))
    first = sources["train"][0]
    assert first["image"].shape == (8, 8, 1) and first["image"].max() == 255 and type(first["label"]) is int
    assert [sources["test"][index]["label"] for index in range(8)] == [0, 3, 9, 9, 0, 2, 4, 9]  # a resumed run depends on it
    refused("digits", None, "dev", match='digits has no split "dev"')
    refused("digits", "x", "train", match="built in and reads no files")


def test_mnist(shared_data):
    source = open_source("auto", str(shared_data / "img_mnist"), "test")
    assert len(source) == 10_000 and [source[index]["label"] for index in range(5)] == [7, 2, 1, 0, 4]
    assert source[0]["image"].shape == (28, 28, 1) and source.images.mean() / 255 == pytest.approx(0.1325, abs=1e-4)


@pytest.mark.full
def test_cifar(shared_data):
    source = open_source("auto", str(shared_data / "img_cifar10_jpeg" / "test_10k.tar.xz"), "test")
    assert len(source) == 10_000 and sorted(Counter(map(source.label, range(10_000))).values()) == [1000] * 10
    assert source[0]["image"].shape == (32, 32, 3)


def test_texts_in_class_folders(tmp_path):
    """As in the movie reviews of IMDB, and without extensions as in 20 Newsgroups."""
    files = {"neg/0_2.txt": b"\xef\xbb\xbfbad\r\nfilm", "pos/1_9.txt": "schön".encode(), "pos/12": b"good"}
    files |= {"pos/.hidden.txt": b"x", "pos/README": b"x"}
    for name, content in files.items():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(content)
    source = open_source("auto", str(tmp_path / "train"), "train")
    expected = [{"text": "bad\nfilm", "label": "neg"}, {"text": "good", "label": "pos"}, {"text": "schön", "label": "pos"}]
    key = lambda record: record["text"]  # noqa: E731
    assert sorted(read(source), key=key) == expected and source.columns == ("text", "label")
    assert source.value(0, "label") == "neg" and source.where(0) == "train: neg/0_2.txt"
    with tarfile.open(tmp_path / "train.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "train", "train")
    packed = open_source("class_folders", str(tmp_path / "train.tar.gz"), "train")
    assert sorted(read(pickle.loads(pickle.dumps(packed))), key=key) == expected
    (tmp_path / "train" / "pos" / "1_9.txt").write_bytes(b"sch\xf6n")
    refused("auto", str(tmp_path / "train"), "train", r"train: pos/1_9.txt: is not UTF-8 \(byte 0xf6\)")
    (tmp_path / "train" / "list.txt").write_text("a file of texts")
    assert read(open_source("auto", str(tmp_path / "train"), "train")) == [{"text": "a file of texts"}]
    refused("class_folders", str(tmp_path / "train"), "train", "list.txt: is not in a class folder")


def test_class_folders_are_recognized_by_their_first_file(tmp_path, monkeypatch):
    for name in (".git/HEAD", "__MACOSX/a.png", "train/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert not folders.is_class_folders(str(tmp_path))
    for number in range(3):
        (tmp_path / "train" / f"{number}.png").write_bytes(b"x")
    asked = []
    monkeypatch.setattr(folders, "is_image", lambda name: asked.append(name) or is_image(name))
    assert folders.is_class_folders(str(tmp_path)) and len(asked) == 1


def test_tokens_of_datatrove_are_refused(tmp_path):
    for name in ("0.ds", "0.ds.index"):
        (tmp_path / name).write_bytes(bytes(8))
    refused("auto", str(tmp_path), "train", "0.ds: has tokens that datatrove wrote, without .* --tokenizer TOKENIZER --output")
    (tmp_path / "0.ds.metadata").write_text("gpt2|2\n4\n4 T")
    refused("auto", str(tmp_path / "0.ds"), "train", "that datatrove wrote by gpt2, .* --tokenizer gpt2 --output FOLDER")
