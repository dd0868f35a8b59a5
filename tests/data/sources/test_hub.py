"""Data sets of the Hugging Face Hub, without a network: a local repository, and a library that stands in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import parquet

from fmjax.data.sources.open import open_source
from fmjax.errors import UserError

COMMIT = "0123456789" * 4


class DatasetNotFoundError(FileNotFoundError):
    pass


def write(path: Path, count: int) -> None:
    """Writes an Arrow stream as `datasets` prepares it."""
    images = [{"bytes": bytes([index]), "path": None} for index in range(count)]
    table = pa.table({"text": [f"text {index}" for index in range(count)], "image": images})
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[tuple]:
    """A library `datasets` that knows owner/name with the configuration "small"; returns what it was asked for."""
    asked = []
    write(tmp_path / "train.arrow", 10)

    def builder(path: str, config: str | None, revision: str | None) -> SimpleNamespace:
        asked.append((path, config, revision))
        if path != "owner/name":
            raise DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub or cannot be accessed.\nMore.")
        if config != "small":
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['small']")
        dataset = SimpleNamespace(cache_files=[{"filename": str(tmp_path / "train.arrow")}])
        info = SimpleNamespace(splits={"train": SimpleNamespace(num_examples=10), "test": SimpleNamespace(num_examples=0)})
        return SimpleNamespace(
            info=info,
            base_path=f"hf://datasets/owner/name@{COMMIT}",
            download_and_prepare=lambda: None,
            as_dataset=lambda split: dataset if split == "train" else SimpleNamespace(cache_files=[]),
        )

    module = ModuleType("datasets")
    module.load_dataset_builder = builder
    module.exceptions = SimpleNamespace(DatasetNotFoundError=DatasetNotFoundError)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_of_the_hub(hub):
    source = open_source("hub", None, "train", name="owner/name/small@v1")
    assert hub == [("owner/name/small", None, "v1"), ("owner/name", "small", "v1")]
    assert len(source) == 10 and source[3] == {"text": "text 3", "image": b"\3"}, "files are not decoded"
    assert source.where(3) == "owner/name/small@v1 train record 3"
    assert source.fingerprint() == {
        "source": "hub", "name": "owner/name/small", "split": "train", "revision": COMMIT, "examples": 10,
    }  # fmt: skip
    part = open_source("hub", "train[:30%]", "validation", name="owner/name/small", columns=("text",))
    assert [part[index] for index in range(len(part))] == [{"text": f"text {index}"} for index in range(3)]


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("", None, "data.source=hub needs the name of a data set"),
        ("owner/other", None, r"data\.name=owner/other: there is no such data set .*Dataset 'owner/other' doesn't exist"),
        ("owner/name", None, r"data\.name=owner/name: cannot be opened \(Config name is missing"),
        ("owner/name/small", "trian", r'has no split "trian" \(did you mean "train"\?\); choose one of train, test'),
        ("owner/name/small", "test", r'owner/name/small: the split "test" is empty'),
    ],
)
def test_what_is_not_there(hub, name, files, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source("hub", files, "train", name=name)
    assert "\n" not in str(caught.value)


def test_the_library_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="data.source=hub needs the package datasets; install it with: pip install datasets"):
        open_source("hub", None, "train", name="owner/name")


def test_a_local_repository(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "repository").mkdir()
    for split, count in (("train", 5), ("test", 2)):
        table = pa.table({"text": [f"{split} {index}" for index in range(count)], "label": list(range(count))})
        parquet.write_table(table, tmp_path / "repository" / f"{split}.parquet")
    name = str(tmp_path / "repository")
    source = open_source("hub", None, "train", name=name)
    assert len(source) == 5 and source[4] == {"text": "train 4", "label": 4}
    assert len(open_source("hub", None, "test", name=name)) == 2
    assert source.fingerprint() == open_source("hub", None, "train", name=name).fingerprint()
