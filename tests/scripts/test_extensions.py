"""A family, a task, a kind of column and a source that are defined here, outside of fmjax: they train, evaluate, predict,
continue and load through the ordinary scripts, if FMJAX_EXTENSIONS permits them, with no other file changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fmjax.config.names import EXTENSIONS
from fmjax.inference.load import load
from fmjax.runs.folder import read_provenance
from scripts import evaluate, predict, train

FAMILY = '''
"""A model of numbers and a category: two embeddings are added, and classified."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

INPUTS = ("numbers", "shares", "categories")


@dataclasses.dataclass(frozen=True)
class Settings:
    numbers: int
    shares: int
    categories: int
    width: int = 16


class Toy(nn.Module):
    settings: Settings
    heads: dict

    def one_row_batch(self):
        floats = {name: jnp.zeros((1, getattr(self.settings, name))) for name in ("numbers", "shares")}
        return floats | {"categories": jnp.zeros((1, 1), jnp.int32)}

    def forward_flops(self, batch):
        return 4.0 * len(batch["numbers"]) * self.settings.width

    @nn.compact
    def __call__(self, batch):
        s = self.settings
        x = nn.Dense(s.width, name="embed")(jnp.concatenate([batch["numbers"], batch["shares"]], axis=1))
        x = nn.tanh(x + nn.Embed(s.categories, s.width, name="category")(batch["categories"]).sum(axis=1))
        return {kind: nn.Dense(head["classes"], name=f"head_{kind}")(x) for kind, head in self.heads.items()}


def build(heads, size="", **settings):
    return Toy(Settings(**settings), heads)
'''

TASK = '''
"""Classification of the rows of a table."""

import dataclasses

from fmjax.contracts import Examples
from fmjax.data.kinds import category, number
from fmjax.data.sources.open import check_columns
from fmjax.tasks.labels import LabelTask
from toys import share


@dataclasses.dataclass(frozen=True)
class Task(LabelTask):
    age: str = "age"
    part: str = "part"
    city: str = "city"

    @property
    def reads(self):
        return {self.age: "number", self.part: "toys.share", self.city: "category"}

    def resolve(self, source):
        check_columns(source, self.columns)
        return self.find_labels(source, range(len(source)))

    def arrays(self, records, processors, where):
        kinds = {"numbers": number, "shares": share, "categories": category}
        return {name: processors.of(kind.Processor).arrays(records, where) for name, kind in kinds.items()}

    def examples(self, source, processors, max_length, train):
        check_columns(source, self.columns)
        records = [source[index] for index in range(len(source))]
        return Rows(self.arrays(records, processors, source.where) | {"labels": self.targets(source, range(len(source)))})

    def inputs(self, examples, processors, max_length, where):
        return self.arrays(examples, processors, where)

    def describe(self, outputs, batch, processors):
        return self.described(outputs[self.head])


class Rows(Examples):
    def __init__(self, arrays):
        self.arrays, self.classes = arrays, arrays["labels"]

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        return {name: array[index] for name, array in self.arrays.items()}
'''

KIND = '''
"""Shares, written as "12 %": read as numbers are."""

from fmjax.data.kinds import number


class Processor(number.Processor):
    kind = "toys.share"
    model_settings = ("shares",)

    @classmethod
    def fit(cls, columns, settings, added=()):
        return cls({column.name: (50.0, 50.0) for column in columns})

    def sizes(self):
        return {"shares": len(self.scales)}

    def arrays(self, records, where):
        name = next(iter(self.scales))
        return super().arrays([record | {name: str(record[name]).rstrip(" %")} for record in records], where)
'''

SOURCE = '''
"""People: those of Rome are "in" if they are old, all others if they are young; a share has the last word."""

import random

from fmjax.data.records import RecordSource
from fmjax.data.sources.kinds import SourceKind


class People(RecordSource):
    columns = ("age", "part", "city", "label")

    def __init__(self, files, split):
        draw = random.Random(split)
        self.rows = []
        for _ in range(400 if split == "train" else 60):
            age, part, city = draw.randint(1, 99), draw.randint(0, 100), draw.choice(("Rome", "Oslo", "Bonn"))
            inside = (age > 50) == (city == "Rome") if part < 90 else True
            self.rows.append({"age": age, "part": f"{part} %", "city": city, "label": "in" if inside else "out"})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return dict(self.rows[index])

    def where(self, index):
        return f"person {index}"

    def fingerprint(self):
        return {"people": len(self)}


SOURCES = (SourceKind("", People, reads="nothing"),)
'''

CONFIG = '''
from fmjax.defaults import experiment


def get_config(arg=""):
    config = experiment("toys.family", "toys.table")
    config.data.source = "toys.people"
    config.data.batch_size, config.optim.learning_rate, config.optim.schedule = 32, 0.03, "constant"
    config.train.epochs, config.train.log_every, config.checkpoint.best = 15.0, 20, "accuracy"
    config.train.eval_every, config.optim.no_decay = 60, ("bias$",)
    return config
'''


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a package of extensions, on the path and permitted, and a config that uses it."""
    (tmp_path / "toys").mkdir()
    parts = {"family": FAMILY, "table": TASK, "share": KIND, "people": SOURCE, "__init__": ""}
    for name, text in parts.items():
        (tmp_path / "toys" / f"{name}.py").write_text(text.lstrip())
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(EXTENSIONS, "toys")
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "toys"]:
        del sys.modules[name]


def call(main: Callable[[list[str]], int], *words: object) -> int:
    return main([str(word) for word in words])


def test_they_train_evaluate_predict_continue_and_load(toys, capsys):
    run = ("--config", toys / "config.py", "--workdir", toys / "run")
    assert call(train.main, *run, "--config.train.epochs=8") == 0
    assert call(train.main, *run) == 0  # continues
    capsys.readouterr()
    assert call(evaluate.main, "--workdir", toys / "run") == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["accuracy"] > 0.9 and measured["examples"] == 60

    people = [{"age": 70, "part": "10 %", "city": "Rome"}, {"age": "20", "part": "10 %", "city": "Rome"}]
    people.append({"age": 30, "part": "0 %", "city": "Atlantis"})
    (toys / "in.jsonl").write_text("".join(json.dumps(person) + "\n" for person in people))
    assert call(predict.main, "--workdir", toys / "run", "--input", toys / "in.jsonl", "--output", toys / "out.jsonl") == 0
    predicted = [json.loads(line) for line in (toys / "out.jsonl").read_text().splitlines()]
    assert [one["label"] for one in predicted[:2]] == ["in", "out"] and len(predicted) == 3

    loaded = load(toys / "run")
    assert [(one.pop("line"), one.pop("input")) for one in predicted] == [*enumerate(people, start=1)]
    assert loaded.predict(people) == predicted and loaded.tokenizer is None
    assert {key: processor.unit for key, processor in loaded.processors.items()} == {
        "number": "rows", "toys.share": "rows", "category": "rows"
    }  # fmt: skip
    stored = read_provenance(toys / "run")["data"]
    assert stored["processors"] == {key: {"sha256": one.sha256} for key, one in loaded.processors.items()}
    for kind in loaded.processors:
        assert (toys / "run" / "processors" / kind / "columns.json").is_file()
    logged = [json.loads(line) for line in (toys / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(np.isfinite(line.get("rows_per_second", np.nan)) for line in logged)
    config = json.loads((toys / "run" / "config.json").read_text())
    assert config["model"] == {"name": "toys.family", "numbers": 1, "shares": 1, "categories": 4, "width": 16}
    assert config["task"]["labels"] == ["in", "out"]


def test_a_processor_that_was_changed_is_noticed(toys, capsys):
    run = ("--config", toys / "config.py", "--workdir", toys / "run")
    assert call(train.main, *run, "--config.train.epochs=1") == 0
    stored = toys / "run" / "processors" / "number" / "columns.json"
    stored.write_text(json.dumps({"age": [40.0, 1.0]}))
    capsys.readouterr()
    assert call(train.main, *run, "--config.train.epochs=2") == 2
    assert "processors: number: sha256" in capsys.readouterr().err


def test_they_are_refused_unless_permitted(toys, capsys, monkeypatch):
    assert call(train.main, "--config", toys / "config.py", "--workdir", toys / "run", "--config.train.epochs=1") == 0
    monkeypatch.delenv(EXTENSIONS)
    for main, words in ((evaluate.main, ()), (predict.main, ("--input", toys / "config.py", "--output", toys / "out"))):
        capsys.readouterr()
        assert call(main, "--workdir", toys / "run", *words) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and ("allow its package: export FMJAX_EXTENSIONS=toys" in error or words)


def test_bad_rows_are_named(toys, capsys):
    run = ("--config", toys / "config.py", "--workdir", toys / "run", "--config.train.epochs=1")
    assert call(train.main, *run) == 0
    for row, message in (
        ({"age": 1, "part": "1 %"}, 'in.jsonl line 1: lacks "city", which the task reads; add it'),
        ({"age": "old", "part": "1 %", "city": "Rome"}, "in.jsonl line 1: column \"age\" holds 'old', not a number"),
        ({"age": 1, "part": "1 %", "city": None}, 'in.jsonl line 1: column "city" holds None, not the name of a category'),
    ):
        (toys / "in.jsonl").write_text(json.dumps(row) + "\n")
        capsys.readouterr()
        assert call(predict.main, "--workdir", toys / "run", "--input", toys / "in.jsonl", "--output", toys / "out") == 2
        assert message in capsys.readouterr().err
