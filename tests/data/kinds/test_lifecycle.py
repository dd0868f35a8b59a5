"""The life of processors: groups of columns, stored in a run and restored, old runs without them, parts of a mixture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.sources import MemoryRecords

from fmjax.contracts import Column, Processors
from fmjax.data import kinds
from fmjax.data.kinds import image, lifecycle, text
from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.errors import UserError
from fmjax.tasks import make

IMAGES = {"name": "image_classify", "labels": ("a", "b"), "image_size": 8, "channels": 3}
MAE = {"name": "mae", "patch_size": 2, "image_size": 8, "channels": 3}


def test_kinds_are_found_by_name():
    assert [kind.kind for kind in kinds.known()] == ["category", "image", "number", "text"]
    assert kinds.find("image") is image.Processor
    with pytest.raises(UserError, match=r'task.reads="imgae": no such kind of column \(did you mean "image"\?\)'):
        kinds.find("imgae")
    with pytest.raises(UserError, match="names a module outside fmjax; if you trust it"):
        kinds.find("elsewhere.kind")


def test_a_run_stores_a_tokenizer_where_it_always_was_and_other_processors_by_kind(tmp_path):
    tokenizer = train_tokenizer(["a b c"] * 3, "word", 50)
    processors = Processors(text.Processor(tokenizer), *lifecycle.from_settings(make(IMAGES)).values())
    lifecycle.store(tmp_path, processors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["processors", "tokenizer"]
    assert (tmp_path / "processors" / "image" / "preprocessor_config.json").is_file()
    assert lifecycle.restore(tmp_path, make({"name": "mlm"})).of(text.Processor).sha256 == tokenizer.sha256
    assert lifecycle.restore(tmp_path, make(IMAGES))["image"] == processors["image"]
    assert lifecycle.hashes(processors) == {
        "tokenizer": tokenizer.sha256, "processors": {"image": {"sha256": processors["image"].sha256}}
    }  # fmt: skip
    assert lifecycle.hashes(Processors()) == {}


def test_what_is_stored_counts_and_an_old_run_of_images_has_none(tmp_path):
    task = make(IMAGES)
    assert lifecycle.restore(tmp_path, task)["image"] == lifecycle.from_settings(task)["image"]
    changed = image.Processor(image_size=(4, 4))
    lifecycle.store(tmp_path, Processors(changed))
    assert lifecycle.restore(tmp_path, task)["image"].sizes()["image_size"] == 4
    with pytest.raises(UserError, match="tokenizer"):
        lifecycle.restore(tmp_path, make({"name": "mlm"}))


def test_a_model_folder_has_what_hugging_face_knows_beside_the_weights(tmp_path):
    tokenizer = train_tokenizer(["a b c"] * 3, "word", 50)
    rows = MemoryRecords([{"a": 1}, {"a": 2}])
    numbers = kinds.find("number").fit([Column(rows, "a")], {})
    lifecycle.save(tmp_path, Processors(text.Processor(tokenizer), image.Processor(image_size=(8, 8)), numbers))
    for name in ("tokenizer.json", "preprocessor_config.json", "processors/number/columns.json"):
        assert (tmp_path / name).is_file(), name


def test_parts_of_a_mixture_share_a_processor_unless_their_settings_differ():
    parts = {"a": IMAGES, "b": MAE, "c": MAE | {"mean": (0.1, 0.2, 0.3)}}
    mixture = make({"name": "mixture", "parts": parts})
    processors = lifecycle.from_settings(mixture)
    assert list(processors) == ["image", "c/image"]
    assert processors.part("a")["image"] is processors.part("b")["image"] is processors["image"]
    assert processors.part("c").of(image.Processor).mean == (0.1, 0.2, 0.3) and list(processors.part("c")) == ["image"]
    assert processors.sizes() == {"image_size": 8, "channels": 3} and mixture.model_settings == {"patch_size": 2}
    assert lifecycle.run_folder(Path("run"), "c/image").parts == ("run", "processors", "c", "image")


def test_what_is_missing():
    task = make({"name": "mlm"})
    assert list(lifecycle.missing(task, Processors())) == [text.Processor]
    assert not list(lifecycle.missing(task, Processors(text.Processor(train_tokenizer(["a b"] * 3, "word", 50)))))


def test_columns_give_values_and_places():
    column = Column(MemoryRecords([{"a": 1}, {"a": np.int32(2)}]), "a")
    assert list(column.values()) == [(1, "line 1"), (2, "line 2")]
