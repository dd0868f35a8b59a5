"""Classification: labels found and checked, texts truncated, what the classifier reads, and loss against predictions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processors import using
from support.sources import MemoryRecords

from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from fmjax.errors import UserError
from fmjax.tasks import make
from fmjax.tasks.classify import Task

WORDS = [f"w{number}" for number in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)


class Records(MemoryRecords):
    place, first = "reviews.tsv line", 2


def labelled(*labels: object) -> Records:
    return Records({"text": f"w{number} w9", "label": label} for number, label in enumerate(labels))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("kind", "labels", "expected"),
    [
        ("single", ["pos", "neg", "pos"], ("neg", "pos")),
        ("single", [2, 0, 1, 1], ("0", "1", "2")),
        ("single", ["1", "0", "10", *map(str, range(2, 10))], tuple(map(str, range(11)))),  # by number, not by letter
        ("single", [" a ", "b"], ("a", "b")),
        ("multi", ["b|a", "", "c"], ("a", "b", "c")),
        ("multi", [["b", "a"], [], ["c"]], ("a", "b", "c")),
        ("multi", ["1|0", "2"], ("0", "1", "2")),
        ("multi", [[0, 1], 2], ("0", "1", "2")),
    ],
)
def test_labels_are_found_in_the_training_data(kind, labels, expected):
    assert Task(kind=kind).resolve(labelled(*labels)) == {"labels": expected}
    assert Task(kind=kind, labels=("x", "y")).resolve(labelled(*labels)) == {}
    assert Task(kind="regression").resolve(labelled(*labels)) == {}


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("single", [0, 1, 3], r'line 4: label "3" does not fit; .*without gaps, and .* are 0, 1, 3'),
        ("single", [0, 1, -1], r'line 4: label "-1" does not fit'),
        ("single", [1, 2], r'line 3: label "2" does not fit'),
        ("single", [0, "one", 1], r'line 3: label "one" does not fit'),
        ("single", ["a", ""], r'line 3: column "label" holds \'\', not a label'),
        ("single", ["a", "  "], r'line 3: column "label" holds \'  \', not a label'),
        ("single", ["a", None], r'line 3: column "label" holds None, not a label'),
        ("single", ["a", True], r'line 3: column "label" holds True, not a label'),
        ("single", [0, 1.0], r'line 3: column "label" holds 1\.0, not a label'),
        ("single", [["a"], ["a", "b"]], r"line 2: column \"label\" holds \['a'\], not a label"),
        ("multi", ["a|b", None], r'line 3: column "label" holds None, not a label'),
        ("multi", ["a|b", True], r'line 3: column "label" holds True, not a label'),
        ("multi", [["a"], ["b", None]], r'line 3: column "label" holds None, not a label'),
        ("multi", [["a"], [["b"]]], r"line 3: column \"label\" holds \['b'\], not a label"),
        ("multi", ["a| |b"], r'line 2: column "label" holds \' \', not a label'),
    ],
)
def test_bad_labels_name_the_record(kind, labels, message):
    with pytest.raises(UserError, match=message) as caught:
        Task(kind=kind).resolve(labelled(*labels))
    assert "\n" not in str(caught.value)


def test_targets_are_places_among_the_labels(tokenizer):
    single = Task(labels=("neg", "pos")).examples(labelled("pos", "neg", " pos "), using(tokenizer), 8, train=True)
    assert [int(single[index]["labels"]) for index in range(3)] == [1, 0, 1]
    assert single[0]["labels"].dtype == np.int32
    multi = Task(kind="multi", labels=("a", "b", "c")).examples(labelled("c|a", "", ["b"]), using(tokenizer), 8, train=True)
    assert [multi[index]["labels"].tolist() for index in range(3)] == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert multi[0]["labels"].dtype == np.float32
    number = Task(kind="regression").examples(labelled("1.5", -2, 0.25), using(tokenizer), 8, train=True)
    assert [float(number[index]["labels"]) for index in range(3)] == [1.5, -2, 0.25]
    assert number[0]["labels"].dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "labels", "value", "message"),
    [
        ("single", ("neg", "positive"), "positve", r'"positve" is out of range \(did you mean "positive"\?\); .*neg, positive'),
        ("single", ("0", "1"), 2, r'label "2" is out of range'),
        ("single", ("0", "1"), -1, r'label "-1" is out of range'),
        ("multi", ("a", "b"), "a|c", r'label "c" is out of range'),
        ("regression", (), float("nan"), "holds nan, not a number"),
        ("regression", (), "inf", "holds 'inf', not a number"),
        ("regression", (), "five", "holds 'five', not a number"),
        ("regression", (), None, "holds None, not a number"),
        ("regression", (), True, "holds True, not a number"),
        ("regression", (), "", "holds '', not a number"),
    ],
)
def test_labels_out_of_range_name_the_record(tokenizer, kind, labels, value, message):
    good = {"single": labels and labels[0], "multi": "a", "regression": 1.0}[kind]
    with pytest.raises(UserError, match=f"reviews.tsv line 4: .*{message}"):
        Task(kind=kind, labels=labels).examples(labelled(good, good, value), using(tokenizer), 8, train=False)


def test_missing_columns_are_refused(tokenizer):
    with pytest.raises(UserError, match=r'no column "lable" \(did you mean "label"\?\)'):
        Task(label="lable").resolve(labelled("a"))
    with pytest.raises(UserError, match='no column "other"'):
        Task(text_pair="other", labels=("a",)).examples(labelled("a"), using(tokenizer), 8, train=True)
    with pytest.raises(UserError, match='line 2: column "text" holds 7, not text'):
        Task(labels=("a",)).examples(Records([{"text": 7, "label": "a"}]), using(tokenizer), 8, train=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "singel"}, r'task\.kind="singel" \(did you mean "single"\?\): choose one of single, multi, regression'),
        ({"pool": "cls"}, r'task\.pool="cls": choose one of first, mean, mask'),
        ({"overlong": "cut"}, r"task\.overlong="),
        ({"label_smoothing": 1.0}, r"task\.label_smoothing=1.0"),
        ({"token_dropout": -0.1}, r"task\.token_dropout=-0.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make({"name": "classify"} | settings)


def test_heads_follow_the_labels_and_the_pool():
    assert make({"name": "classify", "labels": ["a", "b", "c"]}).heads == {"classify": {"classes": 3}}
    assert Task(labels=("a", "b"), pool="mean").heads == {"classify_mean": {"classes": 2}}
    assert Task(kind="regression", pool="mask").heads == {"classify_mean": {"classes": 1}}


def test_rows_are_padded_texts_and_pairs(tokenizer):
    source = Records([{"text": "w1 w2", "other": "w3", "label": "a"}])
    row = Task(labels=("a",)).examples(source, using(tokenizer), 7, train=True)[0]
    assert row["input_ids"].tolist() == [CLS, 6, 7, SEP, PAD, PAD, PAD]
    assert row["attention_mask"].tolist() == [1, 1, 1, 1, 0, 0, 0] and not row["token_type_ids"].any()
    row = Task(labels=("a",), text_pair="other").examples(source, using(tokenizer), 7, train=True)[0]
    assert row["input_ids"].tolist() == [CLS, 6, 7, SEP, 8, SEP, PAD]
    assert row["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 0] and row["attention_mask"].tolist() == [1] * 6 + [0]


def pair(first: int, second: int) -> Records:
    """Returns one pair of w0 w1 ... and w30 w31 ..., so many words each."""
    return Records([{"text": " ".join(WORDS[:first]), "other": " ".join(WORDS[30 : 30 + second]), "label": "a"}])


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [(10, 3, (4, 3)), (3, 10, (3, 4)), (10, 10, (3, 4)), (7, 0, (7, 0)), (20, 1, (6, 1)), (4, 3, (4, 3))],
)
def test_the_longer_text_of_a_pair_is_truncated(tokenizer, first, second, left):
    task = Task(labels=("a",), text_pair="other", overlong="truncate")
    row = task.examples(pair(first, second), using(tokenizer), 10, train=True)[0]
    ids = row["input_ids"][row["attention_mask"] == 1]
    words = [tokenizer.token(int(number)) for number in ids]
    assert words == ["[CLS]", *WORDS[: left[0]], "[SEP]", *WORDS[30 : 30 + left[1]], "[SEP]"]


def test_overlong_texts_are_an_error_unless_truncated(tokenizer):
    source = Records([{"text": "w1", "label": "a"}, {"text": " ".join(WORDS[:9]), "label": "a"}])
    with pytest.raises(UserError, match=r"line 3: 11 tokens exceed data\.max_length=10; .*task\.overlong=truncate"):
        Task(labels=("a",)).examples(source, using(tokenizer), 10, train=False)
    assert len(Task(labels=("a",)).examples(source, using(tokenizer), 11, train=False)) == 2
    with pytest.raises(UserError, match="example 0: 11 tokens"):
        Task(labels=("a",)).inputs([source[1]], using(tokenizer), 10, "example {}".format)


def test_no_room_for_special_tokens_is_an_error(tokenizer):
    task = Task(labels=("a",), text_pair="other", overlong="truncate")
    with pytest.raises(UserError, match=r"data\.max_length=2"):
        task.examples(pair(3, 3), using(tokenizer), 2, train=False)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 25), st.integers(0, 25), st.integers(0, 25), st.booleans(), st.integers(6, 20))
def test_truncation_keeps_the_mask(tokenizer, before, after, other, second, length):
    texts = [" ".join([*WORDS[:before], "[MASK]", *WORDS[30 : 30 + after]]), " ".join(WORDS[:other])]
    source = Records([{"text": texts[second], "other": texts[not second], "label": "a"}])
    task = Task(labels=("a",), text_pair="other", pool="mask", overlong="truncate")
    row = task.examples(source, using(tokenizer), length, train=True)[0]
    assert row["input_ids"].shape == (length,)
    assert int(row["attention_mask"].sum()) == min(length, before + 1 + after + other + 3)
    place = np.flatnonzero(row["input_ids"] == MASK)
    assert place.size == 1
    assert row["pool_weights"].tolist() == [float(index == place[0]) for index in range(length)]


def test_a_window_is_around_the_mask(tokenizer):
    text = " ".join([*WORDS[:20], "[MASK]", *WORDS[20:40]])
    task = Task(labels=("a",), pool="mask", overlong="truncate")
    row = task.examples(Records([{"text": text, "label": "a"}]), using(tokenizer), 9, train=True)[0]
    assert [tokenizer.token(int(i)) for i in row["input_ids"][1:-1]] == ["w17", "w18", "w19", "[MASK]", "w20", "w21", "w22"]


def test_pool_weights_choose_what_is_read(tokenizer):
    source = Records([{"text": "w1 unheard [MASK] w2 [MASK]", "label": "a"}])
    mean = Task(labels=("a",), pool="mean").examples(source, using(tokenizer), 9, train=True)[0]
    assert mean["pool_weights"].tolist() == [0, 1, 1, 0, 1, 0, 0, 0, 0] and mean["pool_weights"].dtype == np.float32
    mask = Task(labels=("a",), pool="mask").examples(source, using(tokenizer), 9, train=True)[0]
    assert mask["pool_weights"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert "pool_weights" not in Task(labels=("a",)).examples(source, using(tokenizer), 9, train=True)[0]
    batch = Task(labels=("a",), pool="mask").inputs(["w1 [MASK]", "[MASK]"], using(tokenizer), 9, "example {}".format)
    assert batch["pool_weights"].tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    with pytest.raises(UserError, match=r"line 2: the text has no \[MASK\]; task.pool=mask needs one"):
        Task(labels=("a",), pool="mask").examples(labelled("a"), using(tokenizer), 9, train=True)


def test_token_dropout_is_of_training_alone(tokenizer):
    source = Records([{"text": " ".join([*WORDS[:40], "[MASK]"]), "label": "a"}])
    task = Task(labels=("a",), token_dropout=0.25)
    train, evaluation = (task.examples(source, using(tokenizer), 48, train=flag) for flag in (True, False))
    example = train[0]
    drawn = [train.draw(example, np.random.default_rng(seed))["input_ids"] for seed in range(100)]
    dropped = np.stack(drawn) == UNK
    assert not dropped[:, [0, 41, 42]].any() and not dropped[:, 43:].any()
    assert dropped[:, 1:41].mean() == pytest.approx(0.25, abs=0.03)
    assert all(np.array_equal(ids[~hit], example["input_ids"][~hit]) for ids, hit in zip(drawn, dropped, strict=True))
    assert np.array_equal(drawn[0], train.draw(example, np.random.default_rng(0))["input_ids"]) and drawn[0].dtype == np.int32
    assert evaluation.draw(example, np.random.default_rng(0)) is example


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


LOGITS = np.array([[0.5, -1.0, 2.0], [1.0, 1.5, -0.5], [-2.0, 0.0, 0.3], [0.1, 0.2, 0.3]], np.float32)


def test_loss_of_one_label_is_smoothed_in_training_alone():
    labels, outputs = np.array([2, 0, 1, 2], np.int32), {"classify": LOGITS}
    logs = log_softmax(LOGITS.astype(np.float64))
    plain = -logs[np.arange(4), labels]
    for smoothing in (0.0, 0.2):
        task = Task(labels=("a", "b", "c"), label_smoothing=smoothing)
        expected = (1 - smoothing) * plain - smoothing * logs.mean(-1)
        assert float(task.loss(outputs, {"labels": labels})["classify"]) == pytest.approx(expected.sum(), rel=1e-5)
        assert float(task.weights({"labels": labels})["classify"]) == 4
        arrays = task.predictions(outputs, {"labels": labels})
        np.testing.assert_allclose(arrays["losses"], plain, rtol=1e-5)
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        values = task.metrics(arrays, np.array([1, 1, 1, 0.0]))
        assert values["loss"] == pytest.approx(plain[:3].mean(), rel=1e-5) and values["accuracy"] == pytest.approx(1 / 3)


def test_loss_of_several_labels_and_of_numbers():
    labels = np.array([[0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0]], np.float32)
    task = Task(kind="multi", labels=("a", "b", "c"))
    wide = LOGITS.astype(np.float64)
    each = np.log1p(np.exp(wide)) - labels * wide
    assert float(task.loss({"classify": LOGITS}, {"labels": labels})["classify"]) == pytest.approx(each.mean(-1).sum(), rel=1e-5)
    arrays = {name: np.asarray(array) for name, array in task.predictions({"classify": LOGITS}, {"labels": labels}).items()}
    values = task.metrics(arrays, np.ones(4))
    assert values["loss"] == pytest.approx(each.mean(), rel=1e-5)
    assert values["accuracy"] == pytest.approx(((LOGITS > 0) == (labels > 0.5)).all(-1).mean())

    task, numbers = Task(kind="regression", pool="mean"), np.array([1.0, -1.0, 0.5, 0], np.float32)
    outputs = {"classify_mean": LOGITS[:, :1]}
    squares = (LOGITS[:, 0] - numbers) ** 2
    assert float(task.loss(outputs, {"labels": numbers})["classify"]) == pytest.approx(squares.sum(), rel=1e-5)
    arrays = {name: np.asarray(array) for name, array in task.predictions(outputs, {"labels": numbers}).items()}
    values = task.metrics(arrays, np.array([1, 1, 0, 1.0]))
    assert values["loss"] == pytest.approx(values["mse"], rel=1e-5) == pytest.approx(squares[[0, 1, 3]].mean(), rel=1e-5)


def test_descriptions_are_what_the_predictions_say(tokenizer):
    scores = np.exp(log_softmax(LOGITS.astype(np.float64)))
    found = Task(labels=("a", "b", "c")).describe({"classify": LOGITS}, {}, using(tokenizer))
    assert [row["label"] for row in found] == ["c", "b", "c", "c"]
    for row, expected in zip(found, scores, strict=True):
        assert row["score"] == pytest.approx(expected.max(), rel=1e-5)
        assert list(row["scores"]) == ["a", "b", "c"] and list(row["scores"].values()) == pytest.approx(expected, rel=1e-5)
    several = Task(kind="multi", labels=("a", "b", "c")).describe({"classify": LOGITS}, {}, using(tokenizer))
    assert [row["labels"] for row in several] == [["a", "c"], ["a", "b"], ["c"], ["a", "b", "c"]]
    assert several[0]["scores"]["b"] == pytest.approx(1 / (1 + math.e), rel=1e-5)
    number = Task(kind="regression").describe({"classify": LOGITS[:, :1]}, {}, using(tokenizer))
    assert number[1] == {"score": 1.0}
    json.dumps([found, several, number])


def test_inputs_are_texts_pairs_or_records(tokenizer):
    single, double = Task(labels=("a",)), Task(labels=("a",), text_pair="other")
    batch = single.inputs(["w1", {"text": "w2 w3", "label": "unused"}, ["w4"]], using(tokenizer), 8, "example {}".format)
    assert batch["input_ids"].tolist() == [[CLS, 6, SEP, PAD], [CLS, 7, 8, SEP], [CLS, 9, SEP, PAD]]
    pairs = double.inputs([("w1", "w2"), ["w1", "w2"], {"other": "w2", "text": "w1"}], using(tokenizer), 8, "example {}".format)
    assert pairs["input_ids"].tolist() == [[CLS, 6, SEP, 7, SEP]] * 3
    assert pairs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]] * 3


@pytest.mark.parametrize(
    ("columns", "example", "message"),
    [
        ({"text_pair": "other"}, "w1", 'example 1: lacks "other"; the task reads text, other'),
        ({}, {"txt": "w1"}, 'example 1: lacks "text"'),
        ({}, ("w1", "w2"), "example 1: has 2 texts"),
        ({}, 7, 'example 1: column "text" holds 7, not text'),
        ({}, None, 'example 1: column "text" holds None, not text'),
    ],
)
def test_examples_that_do_not_fit_are_refused(tokenizer, columns, example, message):
    good = {"text": "w1", "other": "w2"}
    with pytest.raises(UserError, match=message):
        Task(labels=("a",), **columns).inputs([good, example], using(tokenizer), 8, "example {}".format)
