"""scripts/reproduce.py: an experiment from its entry to the verdict, again, and every mistake in one line."""

from __future__ import annotations

import json
import shutil

import pytest

from fmjax.experiments import command
from fmjax.experiments import reproduce as runner
from scripts import reproduce

ENTRY = """
[data.words]
folder = "words"
get = "train.csv and dev.csv of the tests"
sha256 = {{ "train.csv" = "{train}", "dev.csv" = "{dev}" }}
[weights.model]
package = "a-model==1"
folder = "a_model"
about = "a model"
quick = "bert_mlm:tiny"
sha256 = {{}}
[nouns]
title = "People and animals"
[nouns.runs.bert]
label = "BERT"
config = "{config}:classify"
quick = "bert_classify:tiny"
seeds = [0, 1]
set = {{ "data.files.train" = "{{words}}/train.csv", "data.files.validation" = "{{words}}/dev.csv" }}
[[nouns.claims]]
run = "bert"
metric = "accuracy"
tolerance = 0.02
floors = ["majority"]
[pretrained]
title = "From weights"
[pretrained.runs.bert]
label = "BERT"
config = "bert_classify:files"
set = {{ "init.weights" = "{{model}}" }}
[[pretrained.claims]]
run = "bert"
metric = "accuracy"
tolerance = 0.02
# --- measured
"""


@pytest.fixture
def claims(data, tmp_path, monkeypatch):
    """A file of claims in place of the shipped one, its data, and a page."""
    from fmjax.experiments.datasets import digest

    (tmp_path / "words").mkdir()
    for name in ("train.csv", "dev.csv"):
        shutil.copy(data / name, tmp_path / "words" / name)
    path = tmp_path / "configs" / "claims.toml"
    path.parent.mkdir()
    digests = {name: digest(data / f"{name}.csv") for name in ("train", "dev")}
    path.write_text(ENTRY.format(config=data / "config.py", **digests))
    for page in command.pages.PAGES:
        (tmp_path / page).write_text("<!-- claims: nouns -->\n<!-- end of claims -->\n")
    monkeypatch.setattr(command, "claims_file", lambda: path)
    monkeypatch.setattr(command, "shipped_folder", lambda: path.parent)
    monkeypatch.delenv("FMJAX_DATA", raising=False)
    return path


def test_from_entry_to_verdict(claims, tmp_path, capsys, monkeypatch):
    words = ["nouns", "--data", str(tmp_path), "--workdir", str(tmp_path / "runs")]
    # The first attempt ends in the middle: what was done is kept.
    evaluate = runner.evaluate_run
    monkeypatch.setattr(runner, "evaluate_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert reproduce.main(words) == 75
    half = json.loads((tmp_path / "runs/nouns/bert-0.json").read_text())
    assert half["cpu_seconds"] > 0 and "metrics" not in half
    monkeypatch.setattr(runner, "evaluate_run", evaluate)
    assert reproduce.main([*words, "--record"]) == 0
    done = json.loads((tmp_path / "runs/nouns/bert-0.json").read_text())
    assert done["cpu_seconds"] > half["cpu_seconds"] and done["metrics"]["examples"] == 20
    report = json.loads((tmp_path / "runs/nouns/report.json").read_text())
    assert report["claims"][0]["holds"] is None and report["claims"][0]["words"].startswith("first measurement")
    assert set(report["measured"]) == {"bert", "bert/majority"}
    assert "People and animals" in (tmp_path / "runs/nouns/report.html").read_text()
    assert "| majority label |" in (tmp_path / "README.md").read_text()

    # Nothing is run again, and a claim that is too good does not hold.
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("trains again"))
    text = claims.read_text()
    assert text.count("values.accuracy") == 2
    claims.write_text(text.replace("values.accuracy = [", "values.accuracy = [9, "))
    capsys.readouterr()
    assert reproduce.main(words) == 1
    assert "FAILS: worse than the claimed" in capsys.readouterr().out
    # Settings that have changed since are not mixed with what was measured before.
    claims.write_text(text.replace('set = { "data', 'set = { "optim.learning_rate" = 0.5, "data'))
    assert reproduce.main(words) == 2
    assert "was measured with other settings than the claims have now; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name experiments, or --all; --list shows their names"),
        (["nouns", "--all"], "name experiments, or --all"),
        (["noun"], 'experiment "noun" .did you mean "nouns"'),
        (["nouns"], "nouns: needs data: set FMJAX_DATA or --data to a folder that contains words/ with train.csv, dev.csv"),
        (["nouns", "--data", "/nowhere"], "/nowhere/words/train.csv: no such file"),
        (["pretrained"], "repeat the command with --download"),
        (["nouns", "--quick", "--record"], "--record would write the results of shrunken runs"),
    ],
)
def test_mistakes(words, message, claims, refused, tmp_path):
    import re

    assert re.search(message, refused(reproduce.main, *words, "--workdir", tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_list(claims, capsys):
    assert reproduce.main(["--list"]) == 0
    assert "nouns       People and animals  not run yet  words" in capsys.readouterr().out
