"""Every mistake in the input ends with exit code 2 and one line that says what, why and how to fix; nothing is overwritten."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scripts import convert, evaluate, predict, train, train_tokenizer

FILES = {
    "empty.txt": b"",
    "blank.txt": b"\n  \n\n",
    "short.txt": b"the cat sees\n",
    "latin.txt": b"the cat\nthe d\xf6g\n",
    "long.csv": b"text,label\nthe cat,animal\n" + b"the cat " * 40 + b",animal\n",
    "header.csv": b"text,label\n",
    "ragged.csv": b"text,label\nthe cat\n",
    "unknown.csv": b"text,label\nthe cat,person\nthe dog,robot\n",
    "gap.jsonl": b'{"text": "the cat", "label": 0}\n{"text": "the dog", "label": 7}\n',
    "typed.jsonl": b'{"text": "the cat", "label": "a"}\n{"text": "the dog", "label": null}\n',
    "number.jsonl": b'{"text": 5, "label": "a"}\n{"text": "the dog", "label": "b"}\n',
    "broken.jsonl": b'{"text": "the cat"}\n{"text": \n',
    "words.csv": b"text,label\nthe cat,1.5\nthe dog,many\n",
    "data.xyz": b"the cat\n",
}

# arg of the config, overrides, and what the message has to say. {here} has FILES, {data} the data that are in order.
CASES = {
    "missing file": ("", ("data.files.train={data}/trian.txt",), ("no such file", "train.txt")),
    "missing folder": ("", ("data.files.train={here}/none/x.txt",), ("no such file, nor the folder",)),
    "no match": ("", ("data.files.train={here}/*.nothing",), ("no file matches",)),
    "unknown ending": ("", ("data.files.train={here}/data.xyz", "data.record=none"), ("data.xyz", "--config.data.source")),
    "empty file": ("", ("data.files.train={here}/empty.txt",), ("empty.txt", "no records for train")),
    "blank file": ("", ("data.files.train={here}/blank.txt",), ("blank.txt", "no records")),
    "header alone": ("classify", ("data.files.train={here}/header.csv",), ("header.csv", "no records")),
    "empty validation": ("", ("data.files.validation={here}/empty.txt",), ("no records for validation",)),
    "less than a batch": ("", ("data.files.train={here}/short.txt",), ("1 examples, fewer than data.batch_size=16",)),
    "label out of range": (
        "classify",
        ("data.files.validation={here}/unknown.csv",),
        ("unknown.csv line 3", '"robot"', "animal, person"),
    ),
    "labels with a gap": ("classify", ("data.files.train={here}/gap.jsonl",), ("gap.jsonl line 2", '"7"', "task.labels")),
    "label of no type": ("classify", ("data.files.train={here}/typed.jsonl",), ("typed.jsonl line 2", "None", "not a label")),
    "label not a number": (
        "classify",
        ("data.files.train={here}/words.csv", "task.kind=regression"),
        ("words.csv line 3", "'many'", "not a number"),
    ),
    "text not a text": ("classify", ("data.files.train={here}/number.jsonl",), ("number.jsonl line 1", "not text")),
    "text not a text, named tokenizer": (
        "classify",
        ("data.files.train={here}/number.jsonl", "data.tokenizer={data}/tokenizer"),
        ("number.jsonl line 1", "not text"),
    ),
    "no such column": ("classify", ("task.text=sentence",), ('no column "sentence"', "text, label")),
    "no such label column": ("classify", ("task.label=lable",), ('no column "lable" (did you mean "label"?)', "text, label")),
    "no such text column": ("", ("task.column=body",), ('no column "body"', "has text")),
    "not UTF-8": ("", ("data.files.train={here}/latin.txt",), ("latin.txt line 2", "not UTF-8", "0xf6")),
    "not JSON": ("classify", ("data.files.train={here}/broken.jsonl",), ("broken.jsonl line 2", "not JSON")),
    "ragged": ("classify", ("data.files.train={here}/ragged.csv",), ("ragged.csv line 2", "1 fields, not the 2")),
    "over the position table": ("", ("data.max_length=33",), ("data.max_length=33", "model.positions=32")),
    "no room for a text": ("", ("data.max_length=2",), ("data.max_length", "raise it")),
    "no room for a truncated text": ("classify", ("data.max_length=2", "task.overlong=truncate"), ("data.max_length=2",)),
    "overlong text": ("classify", ("data.files.validation={here}/long.csv",), ("long.csv line 3", "task.overlong=truncate")),
    "few embeddings": ("", ("model.vocab_size=20",), ("the tokenizer has", "model.vocab_size=20")),
    "batch over devices": ("", ("data.batch_size=12",), ("data.batch_size=12", "8 devices", "multiple of 8")),
    "batch over parts": ("", ("train.accumulate=3",), ("data.batch_size=16", "train.accumulate=3")),
    "part over devices": ("", ("train.accumulate=4",), ("=4: is not divisible by 8 devices",)),
    "mesh": ("", ("mesh.axes.data=3",), ("the 8 devices",)),
    "unknown rules": ("", ("mesh.rules=fdsp",), ('no such table (did you mean "fsdp"?)', "dp, fsdp")),
    "unknown key": ("", ("optim.learning_rat=1",), ("optim.learning_rat", 'did you mean "learning_rate"?', "weight_decay")),
    "key of another group": ("", ("data.learning_rate=1",), ("no such key", "learning_rate", "batch_size")),
    "mistyped": ("", ("train.steps=many",), ("config.train.steps=many", "int")),
    "unknown task": ("", ("task.name=mml",), ('no such task (did you mean "mlm"?)', "classify")),
    "unknown model": ("", ("model.name=brt",), ('no such model (did you mean "bert"?)', "roberta")),
    "unknown size": ("", ("model.size=hgue",), ("model.size", "tiny, mini")),
    "unknown schedule": ("", ("optim.schedule=cosin",), ('did you mean "cosine"?', "linear")),
    "unknown optimizer": ("", ("optim.name=adamm",), ('did you mean "adamw"?',)),
    "unknown dtype": ("", ("model.dtype=float8",), ("float32, bfloat16",)),
    "heads": ("", ("model.attention_heads=3",), ("model.width=16", "model.attention_heads=3")),
    "freeze of nothing": ("", ('optim.freeze=["^encodr"]',), ("optim.freeze", "matches no parameter")),
    "steps and epochs": ("", ("train.epochs=1.0",), ("either train.steps or train.epochs",)),
    "unknown metric": ("", ("checkpoint.best=accurcy",), ('checkpoint.best="accurcy"', 'did you mean "accuracy"?', "perplexity")),
    "unknown stopping metric": (
        "classify",
        ("train.early_stopping.metric=f2", "train.early_stopping.patience=1"),
        ('train.early_stopping.metric="f2" is not a metric', "roc_auc"),
    ),
    "seed below 0": ("", ("train.seed=-1",), ("train.seed=-1: must be a whole number from 0 to 4,294,967,295",)),
    "seed of 33 bits": ("", ("train.seed=4294967296",), ("train.seed=4294967296",)),
    "dropout above 1": ("", ("model.dropout=1.5",), ("model.dropout=1.5: must be at least 0 and less than 1",)),
    "no heads": ("", ("model.attention_heads=0",), ("model.attention_heads=0",)),
    "patience": ("", ("train.early_stopping.patience=-1",), ("train.early_stopping.patience=-1",)),
    "very long": ("", ("data.max_length=1000000000",), ("data.max_length=1000000000",)),
    "no steps": ("", ("train.steps=0",), ("train.steps=0", "positive")),
    "unknown tokenizer kind": ("classify", ("data.tokenizer_kind=wordpeace",), ('did you mean "wordpiece"?',)),
    "no tokenizer there": ("", ("data.tokenizer={here}/none",), ("none", "no such")),
    "no origin": ("", ("init.from={here}/none",), ("none: no such folder",)),
    "unprepared TFDS": (
        "classify",
        ("data.source=tfds", "data.files={{}}", "data.name=glue/sst2", "data.data_dir={here}/tfds"),
        ("glue/sst2 is not prepared", "data.download=true"),
    ),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def exported(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder; `classifier`, a run, is what it holds."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert convert.main(["--from", str(classifier), "--to", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("case", CASES)
def test_training(case, refused, here, data, tmp_path):
    arg, overrides, parts = CASES[case]
    workdir = tmp_path / "run"
    message = refused(workdir, *(override.format(here=here, data=data) for override in overrides), arg=arg)
    for part in parts:
        assert part in message
    assert re.search(r"[:;] |\?", message.removeprefix("error: ")), message  # what and why, then how to fix it
    left = {path.name for path in workdir.iterdir()} if workdir.exists() else set()
    assert left <= {".lock"}


def test_config_file(refused, data, tmp_path):
    assert "no such file" in refused(train.main, "--config", data / "confg.py", "--workdir", tmp_path / "run")
    (tmp_path / "bad.py").write_text("def get_config():\n    return 1 / 0\n")
    assert "bad.py:2" in refused(train.main, "--config", tmp_path / "bad.py", "--workdir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_foreign_folder(refused, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    message = refused(tmp_path)
    assert "is not empty (thesis.tex)" in message and "name a new folder" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # a Hugging Face folder
    assert "does not contain a run" in refused(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "bert"}'


def test_another_experiment(refused, classifier):
    before = {path: path.read_bytes() for path in classifier.rglob("*") if path.is_file()}
    message = refused(classifier)
    assert "started with another config" in message and 'task.name: "classify" -> "mlm"' in message
    assert {path: path.read_bytes() for path in classifier.rglob("*") if path.is_file()} == before


def test_unwritable_folder(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file, not a folder" in refused(tmp_path / "file")
    assert "is a file, not a folder" in refused(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    assert "cannot be written to" in refused(Path("/proc/fmjax"))
    if os.geteuid():
        tmp_path.chmod(0o500)
        assert "cannot be written to" in refused(tmp_path / "run")
        tmp_path.chmod(0o700)


def test_weights_that_do_not_fit(refused, exported, tmp_path):
    tensors = load_file(exported / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("layer.0.attention.self.query.weight"))
    shaped = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    spoiled = {name: array for name, array in tensors.items() if name != lost}
    spoiled |= {shaped: tensors[shaped][:, :-1].copy(), "bert.encoder.layer.9.extra": np.zeros(3, np.float32)}
    folder = shutil.copytree(exported, tmp_path / "spoiled")
    save_file(spoiled, folder / "model.safetensors")
    message = refused(tmp_path / "run", f"init.weights={folder}", arg="classify")
    for part in (f"missing (1): {lost}", "unexpected (1): bert.encoder.layer.9.extra", "misshapen (1): ", shaped):
        assert part in message

    whole = (exported / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors: is damaged" in refused(tmp_path / "run", f"init.weights={folder}", arg="classify")
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(tmp_path / "run", f"init.weights={folder}", arg="classify")


@pytest.mark.parametrize("form", ["run", "folder"])
def test_weights_that_do_not_fit_the_model(form, refused, classifier, exported, tmp_path):
    origin = f"init.weights={classifier if form == 'run' else exported}"
    place = origin.partition("=")[2]
    for name, value, own in (("width", 32, 16), ("embedding_width", 8, 0)):
        message = refused(tmp_path / "run", origin, f"model.{name}={value}", arg="classify")
        assert f"model.{name}={value}, but init.weights={place} has {name}={own}; leave model.{name} out" in message
    assert "--config.model.name=bert" in refused(tmp_path / "run", origin, "model.name=roberta", arg="classify")


def test_tokenizer_of_other_weights(refused, exported, data, tmp_path):
    other = shutil.copytree(data / "tokenizer", tmp_path / "other")
    content = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(content.replace('"the"', '"thy"'))
    for path in other.glob("vocab.txt"):
        path.write_text(path.read_text().replace("\nthe\n", "\nthy\n"))
    message = refused(tmp_path / "run", f"init.weights={exported}", f"data.tokenizer={other}", arg="classify")
    assert "is not the tokenizer of init.weights" in message and "leave data.tokenizer out" in message


def test_evaluation(refused, classifier, here, tmp_path):
    def fails(*words: str) -> str:
        return refused(evaluate.main, "--workdir", classifier, *words)

    assert 'has no "test", only train, validation' in fails("--split", "test")
    assert "no such file" in fails("--files", "none.csv")
    assert '"robot"' in fails("--files", str(here / "unknown.csv"))
    assert "name the folder of a run" in refused(evaluate.main, "--workdir", tmp_path)
    empty = tmp_path / "run"
    empty.mkdir()
    shutil.copy(classifier / "config.json", empty)
    shutil.copytree(classifier / "tokenizer", empty / "tokenizer")
    assert "has no checkpoint yet" in refused(evaluate.main, "--workdir", empty)


INPUTS = {
    '{"text": \n': "line 1: is not JSON",
    "": "has no examples",
    '{"txt": "the cat"}\n': 'lacks "text"',
    "\n5\n": "in.jsonl line 2",
    '{"text": 5}\n': "not text",
    json.dumps({"text": "the cat " * 40}): "tokens exceed data.max_length=16",
}


@pytest.mark.parametrize("content", INPUTS)
def test_prediction(content, refused, classifier, tmp_path):
    (tmp_path / "in.jsonl").write_text(content)
    flags = ("--workdir", classifier, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert INPUTS[content] in refused(predict.main, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_prediction_files(refused, classifier, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def fails(**flags: Path) -> str:
        flags = {"workdir": classifier, "input": source, "output": target} | flags
        return refused(predict.main, *(word for name, value in flags.items() for word in (f"--{name}", value)))

    assert "cannot be read" in fails()
    source.write_bytes(b'"the d\xf6g"\n')
    assert "is not UTF-8" in fails()
    source.write_text('"the cat"\n')
    assert "cannot be written" in fails(output=tmp_path / "none" / "out.jsonl")
    assert "cannot be written" in fails(output=source / "out.jsonl")
    target.write_text("mine")
    assert "already exists" in fails()
    assert target.read_text() == "mine"


def test_conversion(refused, classifier, exported, data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    for source in (classifier, exported):
        refused(convert.main, "--from", source, "--to", tmp_path / "mine")
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert "no such folder" in refused(convert.main, "--from", tmp_path / "none", "--to", tmp_path / "new")
    refused(convert.main, "--from", data, "--to", tmp_path / "new")
    refused(convert.main, "--from", exported, "--to", classifier)
    assert not (tmp_path / "new").exists()


def test_tokenizer_training(refused, data, here, tmp_path):
    def fails(*words: object) -> str:
        return refused(train_tokenizer.main, "--output", tmp_path / "new", *words)

    assert "no such file" in fails("--files", data / "none.txt")
    assert 'no column "body"' in fails("--files", data / "train.csv", "--column", "body")
    assert "not text" in fails("--files", here / "number.jsonl")
    assert 'did you mean "wordpiece"?' in fails("--files", data / "train.txt", "--kind", "wordpeace")
    assert "raise it" in fails("--files", data / "train.txt", "--vocab_size", 3)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("mine")
    assert "--output" in refused(train_tokenizer.main, "--files", data / "train.txt", "--output", tmp_path / "file")
    assert "is not empty" in refused(train_tokenizer.main, "--files", data / "train.txt", "--output", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
