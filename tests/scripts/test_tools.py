"""What is done with a run: evaluating, predicting, converting; and training a tokenizer for the next one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fmjax
from scripts import convert, evaluate, predict, train_tokenizer

ROWS = [{"text": "the old cat sees the dog"}, "the good woman likes the bird", {"text": "the teacher", "more": 1}]


def test_the_classifier_has_learnt(classifier):
    lines = [json.loads(line) for line in (classifier / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["eval/validation/accuracy"] for line in lines if "eval/validation/accuracy" in line}
    assert list(scores) == [15, 30, 45]
    assert max(scores.values()) > 0.9  # the label is one of eight words
    assert fmjax.load(classifier).step == max(scores, key=scores.__getitem__)


def test_evaluation(classifier, data, capsys):
    assert evaluate.main(["--workdir", str(classifier)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = [json.loads(line) for line in (classifier / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if line["step"] == found["step"] and "eval/validation/loss" in line)
    assert (found["split"], found["examples"]) == ("validation", 20)
    assert found["accuracy"] == logged["eval/validation/accuracy"]
    assert found["loss"] == pytest.approx(logged["eval/validation/loss"], rel=1e-5)

    assert evaluate.main(["--workdir", str(classifier), "--split", "test", "--files", str(data / "test.csv")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["split"] == "test"


def predictions(folder: Path, tmp_path: Path) -> list[dict]:
    source, target = tmp_path / "in.jsonl", tmp_path / f"{folder.name}.out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "\n")
    assert predict.main(["--workdir", str(folder), "--input", str(source), "--output", str(target)]) == 0
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_from_a_run_to_hugging_face_and_back(classifier, tmp_path, capsys):
    said = predictions(classifier, tmp_path)
    assert [row["label"] for row in said] == ["animal", "person", "person"]
    assert all(set(row["scores"]) == {"animal", "person"} for row in said)

    folder, back = tmp_path / "exported", tmp_path / "back"
    assert convert.main(["--from", str(classifier), "--to", str(folder)]) == 0
    assert convert.main(["--from", str(folder), "--to", str(back)]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "animal", "1": "person"}
    ids = np.array([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
    arrays = {"input_ids": ids, "attention_mask": (ids > 0).astype(int), "token_type_ids": np.zeros_like(ids)}
    ours, *others = (fmjax.load(path).apply(**arrays) for path in (classifier, folder, back))
    for other in others:
        assert set(other) == set(ours) and "logits" in ours
        for name in ours:
            np.testing.assert_array_equal(other[name], ours[name], err_msg=name)
    for path in (folder, back):
        assert [row["label"] for row in predictions(path, tmp_path)] == [row["label"] for row in said]
    capsys.readouterr()


def test_predicting_masked_words(run, tmp_path):
    workdir = tmp_path / "run"
    assert run(workdir, "train.steps=1") == 0
    (tmp_path / "in.jsonl").write_text('"the [MASK] sees the [MASK]"\n{"text": "the old [MASK]"}\n')
    flags = ["--workdir", str(workdir), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert predict.main(flags) == 0
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert [len(row["masks"]) for row in (first, second)] == [2, 1]
    assert len(first["masks"][0]) == 5


@pytest.mark.parametrize(
    ("kind", "size"),
    [("bpe", 300), ("word", 40), *(pytest.param(*one, marks=pytest.mark.full) for one in (("wordpiece", 80), ("unigram", 300)))],
)
def test_training_a_tokenizer_and_with_it(kind, size, data, run, tmp_path):
    folder, workdir = tmp_path / "tokenizer", tmp_path / "run"
    words = ["--files", str(data / "train.csv"), "--kind", kind, "--vocab_size", str(size), "--output", str(folder)]
    assert train_tokenizer.main(words) == 0
    assert run(workdir, f"data.tokenizer={folder}", "train.steps=1", "data.max_length=32", arg="classify") == 0
    ours, theirs = fmjax.load(workdir).tokenizer, fmjax.load(workdir).model.settings.vocab_size
    assert ours.vocab_size == theirs <= size
    assert "old cat" in ours.decode(ours.encode_batch(["the old cat"])[0])
