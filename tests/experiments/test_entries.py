"""The file of claims: what it must have, what is refused, and that the pages say what it says."""

from __future__ import annotations

import math

import pytest

from fmjax import tasks
from fmjax.errors import UserError
from fmjax.experiments import pages, recording
from fmjax.experiments.entries import Measured, claims_file, read_claims
from fmjax.experiments.reproduce import full_config

ENTRY = """
[data.a]
folder = "a"
get = "somewhere"
sha256 = { "x.csv" = "00" }
[one]
title = "One"
[one.runs.base]
config = "bert_mlm"
set = { "data.files.train" = "{a}/x.csv", "train.steps" = 5 }
[one.runs.next]
label = "next"
like = "base"
set = { "init.weights" = "{base}" }
[[one.claims]]
run = "next"
metric = "loss"
better = "lower"
tolerance = 1
# --- measured
[measured.one."next"]
values.loss = [1.50, 2]
"""


@pytest.fixture
def read(tmp_path):
    def call(text):
        path = tmp_path / "claims.toml"
        path.write_text(text)
        return read_claims(path)

    return call


def test_an_entry(read):
    claims = read(ENTRY)
    one = claims.named("one")
    assert one.runs["next"].set == {"data.files.train": "{a}/x.csv", "train.steps": 5, "init.weights": "{base}"}
    assert one.places("next") == ("a", "base")
    assert one.data_run("next") == "base"
    assert claims.measured["one"]["next"].values == {"loss": (1.5, 2.0)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "One"', "", "one: title is missing; add it"),
        ('title = "One"', "title = 1", "one.title=1: is not a text"),
        ('title = "One"', 'title = "One"\ntitel = "One"', 'one: key="titel" .did you mean "title"'),
        ('like = "base"', 'like = "bse"', 'one.runs.next.like="bse" .did you mean "base"'),
        ("{base}", "{later}", '{later}="later": choose one of a, base'),
        ('run = "next"', 'run = "nxt"', 'claims.0..run="nxt" .did you mean "next"'),
        ("tolerance = 1", "tolerance = true", "tolerance=True: is not a number"),
        ("tolerance = 1", "tolerance = 1\npublished = 2.0", "published and source come together"),
        ('better = "lower"', 'better = "less"', 'better="less": choose one of higher, lower'),
        ('label = "next"\n', "", "one.runs.next: a claim is about it; give it a label"),
        ("set = {", "seeds = []\nset = {", "seeds: is empty"),
        ("measured.one", "measured.two", 'measured="two": choose one of one'),
        ('measured.one."next"', 'measured.one."nxt"', 'measured.one: row="nxt" .did you mean "next"'),
        ("tolerance = 1", 'tolerance = 1\nfloors = ["tfdf"]', 'claims.0..floors="tfdf" .did you mean "tfidf"'),
        ("[1.50, 2]", '[1.5, "2"]', "measured.one.next.values.loss='2': is not a number"),
        ("[[one.claims]]", "[[one.claims", "cannot be read as TOML"),
        ('folder = "a"', "", "data.a: folder is missing"),
        ("[one.runs.base]", "[one.runs.a]", "something else has that name, too|choose one of"),
    ],
)
def test_mistakes(old, new, message, read):
    assert old in ENTRY
    with pytest.raises(UserError, match=message):
        read(ENTRY.replace(old, new, 1))


def test_an_unknown_experiment(read):
    with pytest.raises(UserError, match=r'experiment "on" .did you mean "one"..: there is none; choose from one'):
        read(ENTRY).named("on")


CLAIMS = read_claims(claims_file())


def test_what_the_pages_claim_has_an_entry():
    assert len(CLAIMS.experiments) >= 14


@pytest.mark.parametrize("page", pages.PAGES)
def test_pages_say_what_the_claims_say(page):
    text = (claims_file().parents[1] / page).read_text(encoding="utf-8")
    assert pages.BLOCK.search(text)
    assert pages.written(text, CLAIMS) == text, "run python scripts/reproduce.py --write"


@pytest.mark.parametrize("name", CLAIMS.experiments)
def test_overrides_are_of_the_configs(name):
    one = CLAIMS.experiments[name]
    for label, run in one.runs.items():
        config = full_config(run, {key: str(value) for key, value in run.set.items()}, seed=7)
        assert config["train"]["seed"] == 7
        claimed = {metric for claim in one.claims if claim.run == label for metric in claim.metrics}
        of_data = {"f1"}  # of two classes, or of entities: only the data tell
        assert claimed - of_data <= set(tasks.make(config["task"]).measures)
        # MSRA's only epoch is evaluated once.
        chosen = "best" in config["checkpoint"] and run.split == "validation" and name != "msra"
        assert not claimed or ("chooses the step" in run.note) == chosen


def test_recording_keeps_the_claims(read, tmp_path):
    path = tmp_path / "claims.toml"
    claims = read(ENTRY)
    recording.record(path, "one", claims.measured["one"])
    assert path.read_text().startswith(ENTRY[: ENTRY.index("[measured")])
    assert "values.loss = [1.50, 2.0]" in path.read_text()  # as it was written
    assert read_claims(path) == claims


def test_recording_keeps_what_others_have_recorded(read, tmp_path):
    path, two = tmp_path / "claims.toml", ENTRY[ENTRY.index("[one]") : ENTRY.index("# ---")].replace("one", "two")
    read(ENTRY.replace("# ---", f"{two}# ---"))
    for name, loss in (("two", 3.0), ("one", math.nan)):
        recording.record(path, name, {"next": Measured({"loss": (loss,)}, commit="abc")})
    found = read_claims(path).measured
    assert found["two"]["next"].values == {"loss": (3.0,)} and found["two"]["next"].commit == "abc"
    assert math.isnan(found["one"]["next"].values["loss"][0])
    path.write_text(ENTRY.replace("# ---", "#"))
    with pytest.raises(UserError, match="has no line that begins with # --- measured"):
        recording.record(path, "one", {})
