"""What provenance records of the data: the overlap of its splits, found once for the same data."""

from __future__ import annotations

import pytest
from support.processors import using
from support.sources import MemoryRecords

from fmjax.contracts import Config, Record
from fmjax.data.stream import overlap
from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.tasks import make
from fmjax.train.notes import remembered_overlap

TEXTS = [f"The dog sleeps {number} times." for number in range(20)]
PROCESSORS = using(train_tokenizer(TEXTS, "wordpiece", 100))


class Unknown(MemoryRecords):
    """Records whose fingerprint says nothing about them."""

    def fingerprint(self) -> Record:
        return {"source": "own"}


def found(train: list[str], held: list[str], kind: type[MemoryRecords] = MemoryRecords) -> Config:
    sources = (kind({"text": text} for text in texts) for texts in (train, held))
    return remembered_overlap(make({"name": "mlm"}), *sources, PROCESSORS)


def refuse(*_: object) -> None:
    raise AssertionError("compared again")


@pytest.mark.parametrize("cache", ["cache", "file/cache"])  # the second cannot be created
def test_an_overlap_is_found_once(tmp_path, monkeypatch, cache):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / cache))
    first = found(TEXTS, TEXTS[:3])
    assert first["facts"]["overlap"] == {"records": 3, "validation": 3, "training": 20}
    assert "3 of 3 validation records also occur in training" in first["warning"]
    assert found(TEXTS[3:], TEXTS[:3]) == {
        "warning": "",
        "facts": {"overlap": {"records": 0, "validation": 3, "training": 17}},
    }
    assert found(TEXTS, TEXTS[:3], Unknown)["facts"] == first["facts"]
    assert found(TEXTS[::-1], TEXTS[5:8], Unknown)["facts"] == first["facts"]
    assert found(TEXTS[3:] + TEXTS[3:6], TEXTS[:3], Unknown)["facts"]["overlap"]["records"] == 0
    if cache == "cache":
        monkeypatch.setattr(overlap, "find_overlap", refuse)
        assert found(TEXTS, TEXTS[:3]) == first
