"""The shipped configs: each loads with every argument that its docstring names, and the tiny ones train."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import corpus

from fmjax import models, tasks
from fmjax.config import apply_overrides, load_config, to_dict
from fmjax.errors import UserError
from fmjax.train.experiment import prepare
from fmjax.train.loop import train

FOLDER = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__init__")


def named_arguments(path: Path) -> list[str]:
    """Returns the arguments that a config's docstring names, as `:tiny`."""
    return re.findall(r"`:(\w+)`", ast.get_docstring(ast.parse(path.read_text())) or "")


SPECS = [(path, argument) for path in FILES for argument in ("", *named_arguments(path))]


def test_all_configs_are_found():
    assert {"bert_mlm", "bert_classify", "bert_sst2", "quickstart"} <= {path.stem for path in FILES}
    assert set(named_arguments(FOLDER / "bert_mlm.py")) == {"tiny", "nsp", "whole_word"}


@pytest.mark.parametrize(("path", "argument"), SPECS, ids=[f"{path.stem}:{argument}" for path, argument in SPECS])
def test_every_config_loads(path, argument):
    config = load_config(f"{path}:{argument}" if argument else str(path))
    plain = to_dict(config)
    assert set(plain) >= {"model", "task", "data", "optim", "train", "checkpoint", "mesh", "init"}
    assert ("steps" in plain["train"]) != ("epochs" in plain["train"])
    task = tasks.make(plain["task"])
    family = models.family(plain["model"]["name"])
    sizes = {key: value for key, value in plain["model"].items() if key != "name"}
    fields = {field.name for field in dataclasses.fields(family.Settings)}
    family.build(heads=task.heads, **{name: 100 for name in ("vocab_size",) if name in fields} | sizes)
    assert set(plain["model"]) - {"name", "size"} <= fields


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_an_unknown_argument_is_refused(path):
    with pytest.raises(UserError, match='config argument "tinyy" is not known.*; choose from '):
        load_config(f"{path}:tinyy")


@pytest.fixture
def small_corpus() -> Iterator[None]:
    with corpus.small():
        yield


QUICK = {"bert_mlm.py:tiny", "gpt_clm.py:tiny", "t5_span.py:tiny", "bert_classify.py:tiny"}
TINY = [
    *(f"{path.name}:tiny" for path in FILES),
    "bert_sst2.py:tiny,pretrain",
    "bert_classify.py:tiny,multi",
    "bert_classify.py:tiny,regression",
]


@pytest.mark.parametrize("spec", [pytest.param(spec, marks=[] if spec in QUICK else pytest.mark.full) for spec in TINY])
def test_tiny_configs_train(spec, small_corpus, tmp_path):
    config = load_config(str(FOLDER / spec))
    steps = [("train.steps", "2"), ("train.log_every", "1"), ("train.epochs", "none")]
    kinds = [f"{name}dropout" for name in ("", "embedding_", "attention_", "classifier_")]
    dropout = [(f"model.{name}", "0.0") for name in kinds if name in config.model]  # slow to compile
    apply_overrides(config, [*steps, *dropout, ("model.layers", "1")])
    plain = to_dict(config)
    experiment = prepare(plain, tmp_path / "abstract")
    assert experiment.built.steps == 2
    assert {path.name for path in (tmp_path / "abstract").iterdir()} == {".lock"}

    metrics = train(plain, tmp_path / "run")
    assert metrics["loss"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
