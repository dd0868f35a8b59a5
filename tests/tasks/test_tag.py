"""Token classification: words and tokens aligned, windows, entities against seqeval, what is refused, and predictions."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from seqeval import metrics as seqeval
from seqeval.scheme import IOB2
from support.processors import using
from support.sources import MemoryRecords

from fmjax import load
from fmjax.config.overrides import apply_overrides
from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from fmjax.defaults import fields
from fmjax.errors import UserError
from fmjax.metrics import classes as class_metrics
from fmjax.models import bert
from fmjax.tasks import make
from fmjax.tasks.tag import Task
from fmjax.tasks.tagged_texts import Row, TaggedTexts

GOLDEN = Path(__file__).parents[1] / "golden"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
WORDS = ["ann", "lee", "paris", "in", "is", "xylo", "北", "京", "xx", "xxxx"]


class Records(MemoryRecords):
    place, first = "news.conll line", 1


def tagged(*pairs: str, **more: object) -> Records:
    """Returns sentences of words with tags, as "Ann/B-PER is/O"."""
    rows = [[word.split("/") for word in pair.split()] for pair in pairs]
    return Records({"tokens": [row[0] for row in words], "tags": [row[1] for row in words], **more} for words in rows)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text(
        "\n".join([*SPECIAL, "ann", "lee", "paris", "in", "is", "x", "##x", "北", "京", "x1"]) + "\n"
    )
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return train_tokenizer(["ann lee is in paris " * 9, "paris, in ann"], "bpe", 300)


def test_labels_are_found_outside_first():
    source = tagged("Ann/B-PER Lee/I-PER is/O", "Paris/B-LOC is/O")
    assert Task().resolve(source) == {"labels": ("O", "B-LOC", "B-PER", "I-PER")}
    assert Task(labels=LABELS).resolve(source) == {}
    found = Task(weighting="balanced").resolve(source)
    assert found["class_weights"] == (0.625, 1.25, 1.25, 1.25)
    assert Task(labels=LABELS).heads == {"tag": {"classes": 5}}
    assert [*Task(labels=LABELS).measures] == ["loss", "accuracy", "precision", "recall", "f1"]
    assert [*Task(labels=("NN", "VB")).measures] == ["loss", "accuracy", *class_metrics.AVERAGED]


def test_words_and_tokens_are_aligned(tokenizer):
    source = tagged("Ann/B-PER xxx/I-PER is/O zz/O")
    row = Task(labels=LABELS).examples(source, using(tokenizer), 10, train=True)[0]
    assert [tokenizer.token(int(i)) for i in row["input_ids"][:8]] == ["[CLS]", "ann", "x", "##x", "##x", "is", "[UNK]", "[SEP]"]
    assert row["labels"].tolist() == [0, 2, 4, 0, 0, 0, 0, 0, 0, 0]
    assert row["label_weights"].tolist() == [0, 1, 1, 0, 0, 1, 1, 0, 0, 0] and row["label_weights"].dtype == np.float32
    row = Task(labels=LABELS, pieces="all").examples(tagged("xxx/B-PER xx/O"), using(tokenizer), 9, train=True)[0]
    assert row["labels"].tolist() == [0, 2, 4, 4, 0, 0, 0, 0, 0]
    assert row["label_weights"].tolist() == [0, 1, 1, 1, 1, 1, 0, 0, 0]


def test_words_behind_spaces(byte_level):
    (ids, begins), _ = byte_level.encode_words([["ann", "paris"], ["in"]])
    assert byte_level.decode(ids) == " ann paris" and begins.tolist() == [0, len(byte_level.encode_batch([" ann"])[0])]


def test_words_that_vanish_are_read_as_unknown(tokenizer):
    with pytest.warns(UserWarning, match=r"2 words, such as '\\u200d', have no token"):
        ids, begins = tokenizer.encode_words([["ann", "\u200d", "", "is"]])[0]
    assert begins.tolist() == [0, 1, 2, 3] and ids.tolist()[1:3] == [tokenizer.unk_id] * 2


def rows_of(examples: TaggedTexts) -> list[Row]:
    return [examples.row(number)[0] for number in range(len(examples))]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=25), min_size=1, max_size=4),
    st.integers(5, 16),
    st.integers(0, 3),
)
def test_every_word_is_read_once(tokenizer, sentences, length, stride):
    source = Records({"tokens": words, "tags": [LABELS[(len(w) + i) % 5] for i, w in enumerate(words)]} for words in sentences)
    task = Task(labels=LABELS, overlong="split", stride=stride)
    examples = task.examples(source, using(tokenizer), length, train=True)
    read: list[list[int]] = [[] for _ in sentences]
    tags = np.zeros((len(examples), length), np.int32)
    for index, row in enumerate(rows_of(examples)):
        read[row.sentence] += row.words.tolist()
        example = examples[index]
        assert example["attention_mask"].sum() == row.end - row.begin + 2 <= length
        assert int(example["label_weights"].sum()) == row.words.size
        tags[index] = example["labels"]
    assert [sorted(words) for words in read] == [list(range(len(words))) for words in sentences]
    truth, guess = examples.sentence_tags(tags, np.ones(len(examples)))
    assert truth == guess == [record["tags"] for record in source]


def test_windows_give_each_word_its_wider_context(tokenizer):
    source = tagged(*[" ".join(f"{'ann' if i % 2 else 'is'}/O" for i in range(12))])
    examples = Task(labels=LABELS, overlong="split", stride=4).examples(source, using(tokenizer), 10, train=False)
    assert [(row.begin, row.end) for row in rows_of(examples)] == [(0, 8), (4, 12)]
    assert [row.words.tolist() for row in rows_of(examples)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    with pytest.raises(UserError, match=r"task\.stride=9: windows of 8 tokens .* every 1 to 8"):
        Task(labels=LABELS, overlong="split", stride=9).examples(source, using(tokenizer), 10, train=False)


def test_overlong_is_an_error_unless_cut(tokenizer):
    source = tagged("Ann/B-PER is/O in/O Paris/B-LOC")
    with pytest.raises(UserError, match=r"line 1: 6 tokens are more than data\.max_length=5; .*overlong=split or truncate"):
        Task(labels=LABELS).examples(source, using(tokenizer), 5, train=False)
    examples = Task(labels=LABELS, overlong="truncate").examples(source, using(tokenizer), 5, train=False)
    truth, guess = examples.sentence_tags(np.array([[0, 2, 0, 0, 0]]), np.ones(1))
    assert truth == [["B-PER", "O", "O", "B-LOC"]] and guess == [["B-PER", "O", "O", "O"]]  # cut off: outside
    with pytest.raises(UserError, match=r"data\.max_length=2 leaves no room"):
        Task(labels=LABELS).examples(source, using(tokenizer), 2, train=False)


def judged(task: Task, examples: TaggedTexts, tags: np.ndarray) -> dict[str, float]:
    """Returns the metrics of tags [N,L], as evaluation computes them, with a row that fills up the batch."""
    rows = np.concatenate([tags, tags[:1]])
    arrays = {"tags": rows, "losses": np.full(len(rows), 0.5), "weights": np.ones(len(rows))}
    return task.metrics(arrays, np.array([1.0] * len(examples) + [0.0]), examples)


def test_perfect_predictions_score_all(tokenizer):
    source = tagged("Ann/B-PER Lee/I-PER is/O in/O Paris/B-LOC", "北/B-LOC 京/I-LOC xxx/B-PER", "is/O")
    for mode in ("default", "strict"):
        for more in ({}, {"pieces": "all"}, {"overlong": "split"}):
            task = Task(labels=LABELS, mode=mode, **more)
            examples = task.examples(source, using(tokenizer), 5 if "overlong" in more else 8, train=False)
            values = judged(task, examples, np.stack([examples[index]["labels"] for index in range(len(examples))]))
            assert values.pop("loss") == 0.5
            assert values == dict.fromkeys(("accuracy", "precision", "recall", "f1"), 1.0)
            assert set(values) | {"loss"} == set(task.measures)
    tags = np.stack([examples[index]["labels"] for index in range(len(examples))])
    rows = task.details({"tags": tags}, np.ones(len(examples)), examples)["classes"]
    assert [(row["label"], row["count"], row["f1"]) for row in rows] == [("LOC", 2, 1.0), ("PER", 2, 1.0)]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.tuples(*[st.sampled_from(LABELS)] * 2), min_size=1, max_size=6), min_size=1, max_size=4))
def test_metrics_are_those_of_seqeval(tokenizer, pairs):
    truth, guess = ([[pair[side] for pair in sentence] for sentence in pairs] for side in (0, 1))
    source = Records({"tokens": ["is"] * len(tags), "tags": tags} for tags in truth)
    for mode, scheme in (("default", {}), ("strict", {"mode": "strict", "scheme": IOB2})):
        task = Task(labels=LABELS, mode=mode)
        examples = task.examples(source, using(tokenizer), 8, train=False)
        tags = np.zeros((len(guess), 8), np.int32)
        for row, own in zip(tags, guess, strict=True):
            row[1 : 1 + len(own)] = [LABELS.index(tag) for tag in own]
        values = judged(task, examples, tags)
        for name in ("precision", "recall", "f1"):
            assert values[name] == pytest.approx(getattr(seqeval, f"{name}_score")(truth, guess, zero_division=0, **scheme))
        assert values["accuracy"] == pytest.approx(np.mean(np.concatenate(truth) == np.concatenate(guess)))


def test_an_entity_that_does_not_begin(tokenizer):
    tags = ["O", "I-PER", "I-PER", "B-LOC", "I-PER"]
    assert Task(labels=LABELS).entities(tags) == [("PER", 1, 3), ("LOC", 3, 4), ("PER", 4, 5)]
    assert Task(labels=LABELS, mode="strict").entities(tags) == [("LOC", 3, 4)]
    assert Task(labels=("NN", "VB")).entities(["VB", "NN"]) == [("VB", 0, 1), ("NN", 1, 2)]


@pytest.mark.parametrize("mode", ["default", "strict"])
@pytest.mark.parametrize(
    "tags", ["I-PER I-PER O I-LOC", "B-PER E-PER O S-LOC", "B-PER L-PER O U-LOC", "B_PER E_PER O S_LOC", "I-PER E-PER O E-LOC"]
)
def test_other_schemes_than_bio(tokenizer, mode, tags):
    """Recognized in the training data: perfect predictions score all, and what is outside is no entity."""
    tags = tags.split()
    source = Records([{"tokens": ["ann", "lee", "in", "paris"], "tags": tags}, {"tokens": ["lee"], "tags": tags[3:]}])
    task = Task(mode=mode, **Task(mode=mode).resolve(source))
    examples = task.examples(source, using(tokenizer), 8, train=False)
    values = judged(task, examples, np.stack([examples[index]["labels"] for index in range(2)]))
    assert values == {"loss": 0.5, **dict.fromkeys(("accuracy", "precision", "recall", "f1"), 1.0)}
    assert set(values) == set(task.measures)
    assert task.entities(tags) == [("PER", 0, 2), ("LOC", 3, 4)]


def test_a_scheme_is_stored_where_labels_do_not_tell(tokenizer):
    source = tagged("Ann/I-PER Lee/I-PER is/O", "Paris/I-LOC Ann/I-PER Lee/B-PER")
    assert Task(mode="strict").resolve(source)["scheme"] == "IOB1" and "scheme" not in Task().resolve(source)
    assert Task(mode="strict", labels=LABELS).resolve(source) == {"scheme": "IOB1"}
    assert "scheme" not in Task(mode="strict").resolve(tagged("Ann/B-PER Lee/I-PER is/O"))
    with pytest.raises(UserError, match=r'task.scheme="IOB" .*choose one of IOB2, IOB1'):
        Task(scheme="IOB")


def test_the_scheme_is_set_on_the_command_line_and_new_to_old_runs():
    config = ConfigDict({"task": fields(Task)})
    assert config.task.scheme is None  # as in a run that was stored before the setting was there
    apply_overrides(config, [("task.scheme", "IOB1")])
    assert config.task.scheme == "IOB1"


def test_words_that_predictions_would_cut_are_refused():
    source = tagged(*["Angela/B-PER Merkel/I-PER visited/O Paris/B-LOC"] * 5)
    with pytest.raises(UserError, match=r'task.split=characters: 100.0% .* as "Angela"; set task.split=words'):
        Task(split="characters").resolve(source)
    assert Task().resolve(source)["labels"]
    assert Task(split="characters", labels=LABELS).resolve(source) == {}  # as in a run that is continued


def test_a_no_break_space_is_part_of_a_word():
    assert Task().read({"tokens": "10\u00a0000 is", "tags": "B-NUM\tO"}, "here") == (["10\u00a0000", "is"], ["B-NUM", "O"])


def test_tags_that_mark_no_entities(tokenizer):
    source = tagged("ann/NN is/VB", "in/IN paris/NN")
    task = Task(labels=("IN", "NN", "VB"))
    examples = task.examples(source, using(tokenizer), 6, train=False)
    values = judged(task, examples, np.array([[0, 1, 2, 0, 0, 0], [0, 0, 2, 0, 0, 0]]))
    assert values["accuracy"] == 0.75 and values["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_loss_counts_words_alone():
    logits = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    labels, weights = np.array([[0, 1, 2, 0], [1, 1, 0, 2]], np.int32), np.array([[0, 1, 1, 0], [0, 1, 0, 0]], np.float32)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(logs, labels[..., None], -1)[..., 0]
    batch = {"labels": labels, "label_weights": weights}
    task = Task(labels=("O", "B-X", "I-X"))
    assert float(task.loss({"tag": logits}, batch)["tag"]) == pytest.approx((each * weights).sum(), rel=1e-5)
    assert float(task.weights(batch)["tag"]) == 3
    task = Task(labels=("O", "B-X", "I-X"), class_weights=(1.0, 2.0, 4.0))
    own = weights * np.array([1.0, 2.0, 4.0])[labels]
    assert float(task.loss({"tag": logits}, batch)["tag"]) == pytest.approx((each * own).sum(), rel=1e-5)
    assert float(task.weights(batch)["tag"]) == own.sum()
    assert float(task.predictions({"tag": logits}, batch)["losses"].sum()) == pytest.approx((each * weights).sum(), rel=1e-5)


def test_token_dropout_is_of_training_alone(tokenizer):
    source, task = tagged("ann/O lee/O is/O in/O paris/O"), Task(labels=LABELS, token_dropout=0.5)
    train, evaluation = (task.examples(source, using(tokenizer), 8, train=flag) for flag in (True, False))
    drawn = [train.draw(train[0], np.random.default_rng(seed))["input_ids"] for seed in range(20)]
    assert 0.2 < (np.stack(drawn)[:, 1:6] == tokenizer.unk_id).mean() < 0.8
    assert np.array_equal(evaluation.draw(evaluation[0], np.random.default_rng(0))["input_ids"], evaluation[0]["input_ids"])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "line 2: has 2 words and 1 tags"),
        ({"tokens": [], "tags": []}, r'line 2: column "tokens" holds \[\], not one word or more'),
        ({"tokens": 3, "tags": ["O"]}, 'line 2: column "tokens" holds 3, not one word or more'),
        ({"tokens": ["a"], "tags": [1]}, 'line 2: column "tags" holds 1, not a string; .* names of numbers in task.labels'),
        ({"tokens": ["a"], "tags": [""]}, "line 2: column \"tags\" holds '', not a string"),
        ({"tokens": [None], "tags": ["O"]}, 'line 2: column "tokens" holds None, not a string'),
    ],
)
def test_malformed_records_are_named(record, message):
    with pytest.raises(UserError, match=message) as caught:
        Task().resolve(Records([{"tokens": ["a"], "tags": ["O"]}, record]))
    assert "\n" not in str(caught.value)


def test_unknown_tags_and_settings_are_refused(tokenizer):
    with pytest.raises(UserError, match=r'line 1: tag "B-LOK" is not one of O, .*did you mean "B-LOC"'):
        Task(labels=LABELS).examples(tagged("ann/B-LOK"), using(tokenizer), 8, train=False)
    for name in ("pieces", "mode", "split", "overlong"):
        with pytest.raises(UserError, match=rf'task\.{name}="x": choose one of'):
            make({"name": "tag", name: "x"})
    with pytest.raises(UserError, match="task.mode=strict reads BIO tags"):
        Task(labels=("NN",), mode="strict")
    with pytest.raises(UserError, match=r"token_dropout=1"):
        Task(token_dropout=1)


def test_numbers_stand_for_given_labels_and_strings_for_words(tokenizer):
    source = Records([{"tokens": "ann is", "tags": [2, 0]}, {"tokens": "paris", "tags": "B-LOC"}])
    examples = Task(labels=LABELS).examples(source, using(tokenizer), 5, train=False)
    assert [examples.sentence(number).tags.tolist() for number in range(2)] == [[2, 0], [1]]


def logits_for(task: Task, batch: dict, *tags: str) -> np.ndarray:
    """Returns logits by which the words of each row have these tags."""
    made = np.zeros((*batch["input_ids"].shape, len(task.labels)), np.float32)
    for row, own in enumerate(tags):
        for place, tag in enumerate(own.split()):
            made[row, place + 1, task.labels.index(tag)] = 5
    return made


def test_entities_are_described(tokenizer):
    task = Task(labels=LABELS)
    batch = task.inputs(["Ann Lee, in Paris.", ["paris", "ann"], {"tokens": ["is"]}], using(tokenizer), 12, "example {}".format)
    tags = ["B-PER I-PER O O B-LOC O", "B-LOC B-PER", "O"]
    first, second, third = task.describe({"tag": logits_for(task, batch, *tags)}, batch, using(tokenizer))
    sure = float(jax.nn.softmax(jnp.array([5.0, 0, 0, 0, 0]))[0])
    assert first["entities"] == [
        {"text": "Ann Lee", "label": "PER", "score": pytest.approx(sure), "start": 0, "end": 7},
        {"text": "Paris", "label": "LOC", "score": pytest.approx(sure), "start": 12, "end": 17},
    ]
    assert [(e["text"], e["start"], e["end"]) for e in second["entities"]] == [("paris", 0, 5), ("ann", 6, 9)]
    assert third == {"entities": []}


def test_a_column_of_words_is_read_as_in_training(tokenizer):
    task = Task(labels=LABELS)
    for example, count in (({"tokens": "U.S. is\u00a0in"}, 2), ({"text": "U.S. is\u00a0in"}, 6), ("U.S. is", 5)):
        assert len(task.inputs([example], using(tokenizer), 12, str)["_spans"][0]) == count


def test_chinese_characters_are_words(tokenizer):
    for split, example in (("words", "Ann在北京。"), ("characters", "在 北京"), ("characters", ["北", "京"])):
        task = Task(labels=LABELS, split=split)
        batch = task.inputs([example], using(tokenizer), 12, "example {}".format)
        count = len(batch["_spans"][0])
        tags = {5: "B-PER O B-LOC I-LOC O", 3: "O B-LOC I-LOC", 2: "B-LOC I-LOC"}[count]
        found = task.describe({"tag": logits_for(task, batch, tags)}, batch, using(tokenizer))[0]["entities"][-1]
        assert found["text"] == "北京" and found["end"] - found["start"] == 2


@pytest.mark.parametrize("example", ["", "  ", [], 3, ["a", 3], {"other": "x"}])
def test_inputs_without_words_are_refused(tokenizer, example):
    with pytest.raises(UserError, match="example 1: has no word"):
        Task(labels=LABELS).inputs(["ann", example], using(tokenizer), 12, "example {}".format)


def test_a_folder_predicts(tmp_path):
    """Long texts in windows, and the same entities when a text is given twice."""
    shutil.copytree(GOLDEN / "bert_tag", tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text("\n".join([*SPECIAL, *(f"w{i}" for i in range(36))]) + "\n")
    model = load(tmp_path / "model")
    text = " ".join(f"w{i % 30}" for i in range(70))
    short, long, again = model.predict(["w1 w2", text, "w1 w2"])
    assert short == again and len(long["entities"]) == 70 and len(short["entities"]) == 2
    assert {entity["label"] for entity in long["entities"]} <= {"no", "yes", "maybe"}
    batch = Task(labels=("no",), overlong="split").inputs(["w1 w2", text, "w1 w2"], using(model.tokenizer), 40, str)
    logits = model.apply(**{name: array for name, array in batch.items() if not name.startswith("_")})["logits"]
    best = np.asarray(jax.nn.softmax(logits[0, 1:3], axis=-1)).max(axis=-1)
    assert [entity["score"] for entity in short["entities"]] == pytest.approx(best.tolist(), rel=1e-4)


def test_msra_is_read(shared_data, tmp_path):
    import zipfile

    from fmjax.data.sources.open import hold_out, open_source

    archive = zipfile.ZipFile(shared_data / "zh_chinesenlpcorpus" / "dh_msra.zip")
    head = archive.open("dh_msra.txt").read(400_000).decode(errors="ignore").rpartition("\n\n")[0]
    (tmp_path / "msra.conll").write_text(head)
    source = open_source("auto", str(tmp_path / "msra.conll"), "train")
    train, held = hold_out(source, 0.1)
    task = Task(**Task().resolve(train))
    assert task.bio and set(task.labels) == {"O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in ("LOC", "ORG", "PER"))}
    tokenizer = train_tokenizer((" ".join(train[i]["tokens"]) for i in range(len(train))), "word", 5000)
    examples = task.examples(held, using(tokenizer), 112, train=False)
    values = judged(task, examples, np.stack([examples[index]["labels"] for index in range(len(examples))]))
    assert values["f1"] == values["accuracy"] == 1.0


def test_a_step_fits_the_model(tokenizer):
    task = Task(labels=LABELS)
    examples = task.examples(tagged("ann/B-PER is/O", "paris/B-LOC in/O"), using(tokenizer), 6, train=True)
    batch = {name: np.stack([examples[0][name], examples[1][name]]) for name in examples[0]}
    model = bert.build(heads=task.heads, width=8, layers=1, attention_heads=2, mlp_width=8, vocab_size=15, positions=8)

    def run(key):
        outputs, _ = model.init_with_output(key, batch)
        return task.loss(outputs, batch)["tag"], task.predictions(outputs, batch)

    loss, arrays = jax.eval_shape(run, jax.random.key(0))
    assert loss.shape == () and arrays["tags"].shape == (2, 6)
