"""Data, configs and commands for the tests of the scripts: small enough that a run takes seconds."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from scripts import train

ROOT = Path(__file__).resolve().parents[2]
PEOPLE, ANIMALS = ("child", "woman", "man", "teacher"), ("cat", "dog", "bird", "fish")

CONFIG = """
from fmjax.config import open_dict
from fmjax.defaults import experiment

def get_config(arg=""):
    words = arg.split(",")
    config = experiment("bert", "classify" if "classify" in words else "mlm")
    model, folder = config.model, {folder!r}
    model.width, model.layers, model.attention_heads, model.mlp_width, model.positions = 16, 1, 2, 16, 32
    if "dropout" not in words:
        model.dropout = model.embedding_dropout = model.attention_dropout = model.classifier_dropout = 0.0
    kind = "csv" if "classify" in words else "txt"
    config.data.files = open_dict(train=f"{{folder}}/train.{{kind}}", validation=f"{{folder}}/dev.{{kind}}")
    config.data.tokenizer = None if "classify" in words else f"{{folder}}/tokenizer"
    config.data.record = None if "classify" in words else "line"
    config.data.vocab_size, config.data.batch_size, config.data.max_length = 80, 16, 16
    if "buckets" not in words:
        config.data.buckets = ("none",)  # one length, hence one program to compile
    config.optim.schedule, config.optim.learning_rate = "constant", 0.01
    config.train.steps, config.train.log_every = 10, 1
    config.checkpoint.every, config.checkpoint.keep = 5, 10
    return config
"""


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Returns texts with their labels: whether the first noun is a person or an animal."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        noun = draw.choice(PEOPLE + ANIMALS)
        words = ("the", draw.choice(("small", "old", "good", "quiet")), noun, draw.choice(("sees", "likes", "finds")))
        made.append((" ".join((*words, "the", draw.choice(PEOPLE + ANIMALS))), "person" if noun in PEOPLE else "animal"))
    return made


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles each program once for all runs, in this process and in those it starts."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"
    values = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, dev and test as .txt and .csv, a tokenizer, and the config."""
    from fmjax.data.tokenizers.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("data")
    for seed, (split, count) in enumerate({"train": 120, "dev": 20, "test": 20}.items()):
        rows = sentences(count, seed)
        (folder / f"{split}.txt").write_text("".join(f"{text}\n" for text, _ in rows))
        (folder / f"{split}.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    texts = (folder / "train.txt").read_text().splitlines()
    train_tokenizer(texts, "wordpiece", 80).save(folder / "tokenizer")
    (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
    return folder


@pytest.fixture
def run(data: Path) -> Callable[..., int]:
    """Trains in this process: run(workdir, *overrides, arg="dropout") -> exit code."""

    def call(workdir: Path, *overrides: str, arg: str = "") -> int:
        return train.main(command(data, workdir, *overrides, arg=arg))

    return call


@pytest.fixture
def start(data: Path) -> Callable[..., subprocess.Popen]:
    """Starts training in a process of its own, by a driver that is given ahead of the command line."""

    def call(driver: str, workdir: Path, *overrides: str, arg: str = "") -> subprocess.Popen:
        words = [sys.executable, "-c", driver, *command(data, workdir, *overrides, arg=arg)]
        return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return call


def command(data: Path, workdir: Path, *overrides: str, arg: str = "") -> list[str]:
    settings = [f"--config.{override}" for override in overrides]
    return ["--config", f"{data / 'config.py'}{arg and ':' + arg}", "--workdir", str(workdir), *settings]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], run: Callable[..., int]) -> Callable[..., str]:
    """Checks that a call ends with 2 and one line, and returns it: refused(main, *argv), or refused(workdir, *overrides)."""

    def call(first: object, *words: str, arg: str = "") -> str:
        capsys.readouterr()
        code = first([str(word) for word in words]) if callable(first) else run(first, *words, arg=arg)
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, out, len(errors)) == (2, "", 1), err
        assert err.endswith(errors[0] + "\n") and "Traceback" not in err
        return errors[0]

    return call


@pytest.fixture(scope="session")
def classifier(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of classification, to be read and not to be written to."""
    workdir = tmp_path_factory.mktemp("runs") / "classifier"
    overrides = ("train.steps=45", "train.eval_every=15", "checkpoint.best=accuracy")
    assert train.main(command(data, workdir, *overrides, arg="classify")) == 0
    return workdir
