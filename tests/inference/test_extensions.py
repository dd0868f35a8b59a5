"""A family outside of fmjax, of which a module defines `build` and `Settings` alone: predictions,
runs, and what it lacks."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fmjax import models, tasks
from fmjax.config import write_config
from fmjax.config.names import EXTENSIONS
from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.errors import UserError
from fmjax.hub import families
from fmjax.inference.convert import convert
from fmjax.inference.load import load
from fmjax.inference.pretrained import abstract_params
from fmjax.runs.checkpoint import Checkpoints

TOY = """
from fmjax.models import bert

Settings = bert.Settings


def build(**settings):
    return bert.build(**settings)
"""
CLASSIFY = {"name": "classify", "labels": ["bad", "good"]}
SIZES = {"width": 12, "layers": 1, "attention_heads": 2, "mlp_width": 8, "positions": 16}


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package of our own that is permitted."""
    folder = tmp_path / "toy_models"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(EXTENSIONS, "toy_models")
    yield folder
    for name in [name for name in sys.modules if name.startswith("toy_models")]:
        del sys.modules[name]


@pytest.fixture
def run(package, tmp_path) -> Path:
    """A run at step 1 of such a family."""
    tokenizer = train_tokenizer(["the cat sat", "a dog ran"] * 3, "wordpiece", 60)
    task = tasks.make(CLASSIFY)
    model = models.family("toy_models.toy").build(
        heads=task.heads, vocab_size=tokenizer.vocab_size, **SIZES
    )
    config = {
        "model": {"name": "toy_models.toy"} | dataclasses.asdict(model.settings),
        "task": CLASSIFY,
        "data": {"max_length": 16},
        "checkpoint": {"mode": "max"},
    }
    folder = tmp_path / "run"
    write_config(folder, config)
    tokenizer.save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract_params(model)
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(1, {"params": params, "step": np.int32(1)}, {})
    checkpoints.close()
    return folder


def test_what_a_module_leaves_out_has_a_default(package):
    family = models.family("toy_models.toy")
    assert (family.name, family.inputs) == ("toy_models.toy", ())
    assert family.checked_batch({"x": np.ones(2)}, None).keys() == {"x"}
    assert family.settings_from_tokenizer(None) == {} and family.fit_params({"a": 1}, None) == {
        "a": 1
    }
    assert families.reference("toy_models.toy") is None
    (package / "half.py").write_text("build = dict")
    with pytest.raises(
        UserError, match='model.name="toy_models.half": the module has no `Settings`'
    ):
        models.family("toy_models.half")


def test_a_run_is_loaded_and_predicts(run):
    model = load(run)
    assert model.reference is None
    [found] = model.predict(["the cat sat"])
    assert found["label"] in ("bad", "good")
    outputs = model.apply(input_ids=np.array([[3, 4]]))
    assert set(outputs) == {"last_hidden_state", "pooler_output", "logits"}


@pytest.mark.parametrize(
    "export", [lambda run, to: load(run).save(to), lambda run, to: convert(run, to)]
)
def test_exporting_says_that_there_is_no_counterpart(run, tmp_path, export):
    with pytest.raises(
        UserError, match=r'model.name="toy_models.toy" has no Hugging Face counterpart'
    ) as caught:
        export(run, tmp_path / "folder")
    assert "\n" not in str(caught.value) and not (tmp_path / "folder").exists()


def test_a_table_of_its_own_makes_it_exportable(package, run, tmp_path):
    (package / "toy.py").write_text(TOY + "\nfrom fmjax.hub.families.bert import REFERENCE\n")
    del sys.modules["toy_models.toy"]
    load(run).save(tmp_path / "folder")
    assert load(tmp_path / "folder").config["architectures"] == ["BertForSequenceClassification"]


OWN = """
import dataclasses
from fmjax.hub.families import bert as table

REFERENCE = dataclasses.replace(table.REFERENCE, model_types=("toy",))
"""


def test_an_export_with_a_model_type_of_its_own_is_loaded_where_its_package_is_permitted(
    package, run, tmp_path, monkeypatch
):
    (package / "toy.py").write_text(TOY + OWN)
    del sys.modules["toy_models.toy"]
    model = load(run)
    model.save(tmp_path / "folder")
    again = load(tmp_path / "folder")
    assert again.config["model_type"] == "toy" and again.family.name == "toy_models.toy"
    assert again.model.settings == model.model.settings and again.reference == model.reference
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))
    again.save(tmp_path / "again")
    assert load(tmp_path / "again").config == again.config

    monkeypatch.delenv(EXTENSIONS)
    with pytest.raises(
        UserError,
        match='config.json: fmjax_family="toy_models.toy" names a module outside fmjax; '
        "if you trust it, allow its package: export FMJAX_EXTENSIONS=toy_models",
    ):
        load(tmp_path / "folder")
