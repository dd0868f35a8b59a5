"""fmjax's functions as a program calls them: from any thread, with its own values, on finished and moved runs."""

from __future__ import annotations

import copy
import json
import pickle
import pydoc
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

import fmjax
from fmjax.config.overrides import text_of
from fmjax.errors import UserError
from fmjax.train.judge import Judge

FINISHED = {"train.steps": np.int64(45), "train.eval_every": np.int32(15), "checkpoint.best": "accuracy"}


def test_a_finished_run_in_a_thread_with_data_that_have_moved(classifier, data, tmp_path, capsys):
    """Its metrics are those of its log. The data are known by their content, the tokenizer is that of the run."""
    workdir = shutil.copytree(classifier, tmp_path / "moved run")
    files = {split: shutil.copy(data / f"{split}.csv", tmp_path / f"other {split}.csv") for split in ("train", "dev")}
    overrides = FINISHED | {"data.files": {"train": tmp_path / "other train.csv", "validation": files["dev"]}}
    with ThreadPoolExecutor(1) as threads:
        metrics = threads.submit(fmjax.fit, f"{data / 'config.py'}:classify", workdir, overrides).result()
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "eval/validation/loss" in record][-1]
    assert last["step"] == 45 and metrics == {
        name.removeprefix("eval/validation/"): value for name, value in last.items() if name != "step"
    }
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["data"]["files"]["train"] == str(tmp_path / "other train.csv")


def test_other_data_are_refused_and_another_rate_is_told_how(classifier, data, tmp_path):
    workdir = shutil.copytree(classifier, tmp_path / "run")
    config = f"{data / 'config.py'}:classify"
    other = tmp_path / "train.csv"
    other.write_text((data / "train.csv").read_text() + "one more,person\n")
    with pytest.raises(UserError, match=r"data has changed since the run started \(train: train.csv: .* -> .*moving or renaming"):
        fmjax.fit(config, workdir, FINISHED | {"data.files.train": other})
    with pytest.raises(UserError, match=rf"optim.learning_rate: 0.01 -> 0.5; .*--config.init.weights={workdir}$"):
        fmjax.fit(config, workdir, FINISHED | {"optim.learning_rate": np.float64(0.5)})


def test_a_tokenizer_that_has_moved(run, data, refused, tmp_path):
    """That of the run is used, and another one that the config names is refused."""
    assert run(tmp_path / "run", "train.steps=1", "checkpoint.every=1") == 0
    moved = shutil.copytree(data / "tokenizer", tmp_path / "tokenizer")
    assert run(tmp_path / "run", "train.steps=1", f"data.tokenizer={moved}") == 0
    from fmjax.data.tokenizers.tokenizer import train_tokenizer

    train_tokenizer(["quite another text"] * 9, "wordpiece", 60).save(tmp_path / "other")
    message = refused(tmp_path / "run", "train.steps=1", f"data.tokenizer={tmp_path / 'other'}")
    assert "other: is not the tokenizer that the run started with" in message and "; use that one" in message


def test_a_metric_that_is_undefined_ends_no_run(run, data, tmp_path, capsys):
    rows = [line.rsplit(",", 1)[0] for line in (data / "dev.csv").read_text().splitlines()[1:]]
    for name, value in (("train", "{}"), ("dev", "7")):
        lines = [f"{text},{value.format(number % 3)}\n" for number, text in enumerate(rows)]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(lines))
    files = (f"data.files.train={tmp_path / 'train.csv'}", f"data.files.validation={tmp_path / 'dev.csv'}")
    settings = ("task.kind=regression", "checkpoint.best=pearson", "train.steps=4", "train.eval_every=2")
    assert run(tmp_path / "run", *files, *settings, arg="classify") == 0
    said = capsys.readouterr().err
    assert said.count("undefined metrics: pearson, spearman: only one class or value occurs") == 1
    assert fmjax.load(tmp_path / "run").step == 4  # none is the best, so the newest
    found = fmjax.evaluate(tmp_path / "run")
    assert found["undefined"] == ["pearson", "spearman"] and found["mse"] >= 0


def test_a_run_is_saved_where_its_evaluation_fails(run, tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> bool:
        raise UserError("validation: fails; correct it")

    monkeypatch.setattr(Judge, "evaluate", fail)
    assert run(tmp_path / "run", "train.steps=4", "train.eval_every=2", "checkpoint.every=0") == 2
    assert "error: validation: fails; correct it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


def test_the_values_of_overrides(tmp_path):
    values = {
        tmp_path: str(tmp_path),
        "text": "text",
        "null": "null",
        None: "none",
        True: "true",
        np.float32(0.5): "0.5",
        np.bool_(True): "true",
        (1, "b"): '[1, "b"]',
    }
    assert {value: text_of("a.b", value) for value in values} == values
    assert text_of("a", {"b": [tmp_path, np.arange(2)]}) == json.dumps({"b": [str(tmp_path), [0, 1]]})
    assert text_of("a", jnp.float32(2)) == "2.0"
    with pytest.raises(UserError, match="overrides: a.b is a object, which a config cannot contain; use text, a path"):
        text_of("a.b", object())


def test_a_model_can_be_compared_copied_and_pickled(classifier):
    model = fmjax.load(classifier)
    texts = ["the old cat sees the man", "the good woman likes the dog"]
    expected = model.predict(texts)
    assert model == model and model != fmjax.load(classifier) and len({model, model}) == 1
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.predict(texts) == expected and other != model
    assert re.fullmatch(r"Pretrained\(bert, [\d,]+ parameters, heads classify, step \d+\)", repr(model))


def test_the_public_functions_are_shown():
    # Python 3.13 breaks long signatures into lines.
    shown = re.sub(r"\(\s+", "(", pydoc.plain(pydoc.render_doc(fmjax)))
    functions = {"convert", "evaluate", "fit", "load", "plan"}
    assert set(fmjax.__all__) == functions | {"__version__"} and functions <= {*dir(fmjax)}
    for words in ("fit(config: ", "Trains what a config file describes", "load(path: ", "Returns the model of a Hugging"):
        assert words in shown
    assert all(getattr(fmjax, name).__doc__ for name in functions)
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        fmjax.fitt  # noqa: B018


def test_a_plan_from_python(data):
    result = fmjax.plan(data / "config.py", "cpu:2", {"data.batch_size": 4})
    assert result["devices"] == 2 and result["bytes_per_device"]["parameters"] > 0
