"""Running experiments, with training and evaluation replaced: what is measured, recorded and refused."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from fmjax.errors import Diverged, UserError
from fmjax.examples import baselines
from fmjax.experiments import command, floors
from fmjax.experiments import reproduce as runner
from fmjax.experiments.entries import claims_file, read_claims
from fmjax.experiments.reproduce import Options, Runner
from scripts import reproduce

ENTRY = """
[weights.model]
package = "a-model==1"
folder = "a_model"
about = "a model"
quick = "vit_classify:tiny"
sha256 = { "x" = "1" }
[digits]
title = "Digits"
[digits.runs.base]
config = "vit_classify:tiny"
[digits.runs.scratch]
label = "ViT"
config = "vit_classify:tiny"
[digits.runs.next]
label = "after base"
like = "scratch"
seeds = [0, 1]
set = { "init.weights" = "{base}" }
[[digits.claims]]
run = "next"
metric = "accuracy"
tolerance = 0.02
floors = ["majority"]
[[digits.claims]]
run = "next"
metric = "loss"
better = "lower"
tolerance = 0.02
floors = ["majority"]
[[digits.claims]]
run = "scratch"
metric = "accuracy"
tolerance = 0.02
[other]
title = "Other"
[other.runs.vit]
label = "ViT"
config = "vit_classify:tiny"
[[other.claims]]
run = "vit"
metric = "accuracy"
tolerance = 0.02
# --- measured
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A file of claims in place of the shipped one, with pages beside it."""
    file = tmp_path / "configs" / "claims.toml"
    file.parent.mkdir()
    file.write_text(ENTRY)
    for page in command.pages.PAGES:
        (tmp_path / page).write_text("<!-- claims: all -->\n<!-- end of claims -->\n")
    monkeypatch.setattr(command, "claims_file", lambda: file)
    monkeypatch.setattr(command, "shipped_folder", lambda: file.parent)
    monkeypatch.chdir(tmp_path)
    return file


@pytest.fixture
def found(monkeypatch):
    """What each evaluation finds, to be changed; and the folders of the runs that were trained."""
    metrics = {"accuracy": 0.8, "loss": 0.5, "examples": 100}
    trained = []
    monkeypatch.setattr(runner, "train", lambda config, folder, name, **_: trained.append((config, folder)))
    monkeypatch.setattr(runner, "evaluate_run", lambda *_: dict(metrics))
    monkeypatch.setattr(runner, "load_run", lambda folder: SimpleNamespace(config={"data": {}}))
    monkeypatch.setattr(runner, "open_split", lambda *_: [0] * 100)
    floor = {"accuracy": 0.1, "loss": 2.0}
    monkeypatch.setitem(floors.FLOORS, "majority", ("majority label", lambda sight: floor))
    return SimpleNamespace(metrics=metrics, trained=trained)


def test_claims_on_one_run_are_all_checked(path, found, tmp_path):
    assert reproduce.main(["digits", "--record"]) == 0
    measured = read_claims(path).measured["digits"]
    assert measured["next"].values == {"accuracy": (0.8, 0.8), "loss": (0.5, 0.5)}
    assert measured["base/majority"].values == {"accuracy": (0.1,), "loss": (2.0,)}
    assert measured["base"].values == {}
    found.metrics["loss"] = 0.6
    assert reproduce.main(["digits", "--workdir", "anew"]) == 1
    report = json.loads((tmp_path / "anew/digits/report.json").read_text())
    assert [claim["holds"] for claim in report["claims"]] == [True, False, True]


def test_worse_results_are_recorded_only_if_asked(path, found, capsys):
    assert reproduce.main(["other", "--record"]) == 0
    before = path.read_text()
    found.metrics["accuracy"] = 0.5
    assert reproduce.main(["other", "--workdir", "anew", "--record"]) == 1
    assert path.read_text() == before
    assert "other: not recorded, since a claim fails; --record-worse records it" in capsys.readouterr().out
    assert reproduce.main(["other", "--workdir", "anew", "--record-worse"]) == 1
    assert read_claims(path).measured["other"]["vit"].values == {"accuracy": (0.5,)}


def test_a_run_that_diverges_fails_and_others_go_on(path, found, capsys, monkeypatch, tmp_path):
    found.metrics["loss"] = math.nan
    assert reproduce.main(["--all", "--record"]) == 1
    assert "loss is not finite: the run diverged" in capsys.readouterr().out
    assert list(read_claims(path).measured) == ["other"]
    assert json.loads((tmp_path / "runs/reproduce/digits/report.json").read_text())["claims"][1]["value"] is None

    def diverge(config, folder, name, **_):
        if "digits" in name:
            raise Diverged("loss not finite")

    monkeypatch.setattr(runner, "train", diverge)
    assert reproduce.main(["--all", "--workdir", "anew"]) == 1
    assert "error: digits: loss not finite" in capsys.readouterr().err
    assert (tmp_path / "anew/other/report.json").exists()


def settings(text, path, name="next"):
    path.write_text(text)
    claims = read_claims(path)
    return Runner(claims.named("digits"), claims, Options(path.parent, None)).settings(name, 0)


def test_a_digest_has_the_runs_and_the_weights_that_a_run_names(path):
    before, alone = settings(ENTRY, path), settings(ENTRY, path, "scratch")
    longer = ENTRY.replace('[digits.runs.scratch]', 'set = { "train.steps" = 7 }\n[digits.runs.scratch]')
    assert settings(longer, path) != before
    assert settings(longer, path, "scratch") == alone
    weights = ENTRY.replace("{base}", "{model}")
    assert settings(weights, path) != settings(weights.replace('"x" = "1"', '"x" = "2"'), path)


def test_shrunken_runs(path, found, tmp_path, capsys):
    assert reproduce.main(["digits", "--quick"]) == 0
    folder = tmp_path / "runs/reproduce-quick/digits"
    # The base is not evaluated, hence "scratch" is not taken for the same run; both start from random weights.
    assert [one.name for _, one in found.trained] == ["base-0", "scratch-0", "next-0"]
    assert found.trained[2][0]["init"]["weights"].endswith("digits/base-0")
    report = json.loads((folder / "report.json").read_text())
    assert report["quick"] and {claim["words"] for claim in report["claims"]} == {"ran"}
    assert {claim["holds"] for claim in report["claims"]} == {None}
    page = (folder / "report.html").read_text()
    assert "shrunken" in page and "digits --quick" in page
    assert reproduce.main(["digits", "--quick"]) == 0
    assert len(found.trained) == 6  # all again
    words = ["digits", "--quick", "--workdir", "runs/reproduce-quick"]
    assert reproduce.main(words) == 2
    assert "there are runs already" in capsys.readouterr().err


def test_the_same_shrunken_run_is_taken_once(path, found):
    again = '[digits.runs.again]\nlabel = "again"\nlike = "scratch"\n[digits.runs.next]'
    path.write_text(ENTRY.replace("[digits.runs.next]", again).replace("{base}", "{again}"))
    assert reproduce.main(["digits", "--quick"]) == 0
    assert [one.name for _, one in found.trained] == ["base-0", "scratch-0", "next-0"]
    assert found.trained[2][0]["init"]["weights"].endswith("scratch-0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workdir", "gs://bucket/runs"], "gs://bucket/runs: must be a local file or folder"),
        (["--data", "gs://bucket/data"], "gs://bucket/data: must be a local file or folder"),
        (["--workdir", "file/runs"], "--workdir=file/runs: cannot be written"),
    ],
)
def test_folders(words, message, path, found, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert reproduce.main(["other", *words]) == 2
    assert message in capsys.readouterr().err and not found.trained


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('better = "lower"\n', "", 'digits.claims[1]: better="higher" is not true of loss; write better = "lower"'),
        ("# --- measured", "", "has no line that begins with # --- measured"),
    ],
)
def test_mistakes_in_the_file_are_found_before_training(old, new, message, path, found, capsys):
    path.write_text(ENTRY.replace(old, new))
    assert reproduce.main(["digits", "--record"]) == 2
    assert message in capsys.readouterr().err and not found.trained


def test_shipped_claims_fit_their_tasks(tmp_path):
    claims = read_claims(claims_file())
    for one in claims.experiments.values():
        Runner(one, claims, Options(tmp_path, None)).check_claims()
    with pytest.raises(UserError, match="sst2: needs data: set FMJAX_DATA"):
        Runner(claims.named("sst2"), claims, Options(tmp_path, None)).check()


def test_a_label_that_the_training_data_lack():
    train = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    test = [{"text": "a", "label": "x"}, {"text": "b", "label": "new"}]
    assert baselines.majority(train, test)["accuracy"] == 0.5
