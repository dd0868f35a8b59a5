"""Text to text: what the model sees, lengths, loss against predictions, scores of what is generated, and a run end to end."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from support.processors import using
from support.sources import MemoryRecords

from fmjax.data.stream.examples import alike
from fmjax.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from fmjax.errors import UserError
from fmjax.tasks import make
from fmjax.tasks.mixture import SideBySide
from fmjax.tasks.seq2seq import Task, written

WORDS = ["red", "green", "blue", "rot", "blau", "translate"]


class Records(MemoryRecords):
    place, first = "pairs.tsv line", 1


PAIRS = Records([{"source": "red blue", "target": "rot blau"}, {"source": "blue red green", "target": "blau"}])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS)] * 3, "bpe", 261)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.assemble(tokenizer.encode_batch([text])[0])[0].tolist()


def test_an_example(tokenizer):
    examples = Task(prefix="translate: ", target_length=12).examples(PAIRS, using(tokenizer), 28, train=True)
    assert len(examples) == 2
    example = examples[0]
    source, target = ids(tokenizer, "translate: red blue"), ids(tokenizer, "rot blau")
    assert example["input_ids"].tolist() == source + [tokenizer.pad_id] * (28 - len(source))
    assert example["attention_mask"].tolist() == [1] * len(source) + [0] * (28 - len(source))
    assert example["labels"].tolist() == target + [tokenizer.pad_id] * (12 - len(target))
    assert example["label_weights"].tolist() == [1.0] * len(target) + [0.0] * (12 - len(target))
    assert examples.draw(example, np.random.default_rng(0)) is example
    assert all(array.dtype == (np.float32 if name == "label_weights" else np.int32) for name, array in example.items())


def test_texts_that_are_too_long(tokenizer):
    task = Task(target_length=5)
    with pytest.raises(UserError, match=r"pairs.tsv line 1: \d+ tokens exceed task.target_length=5"):
        task.examples(PAIRS, using(tokenizer), 30, train=True)
    with pytest.raises(UserError, match=r"pairs.tsv line 2: \d+ tokens exceed data.max_length=10"):
        Task().examples(PAIRS, using(tokenizer), 10, train=True)
    cut = Task(target_length=5, overlong="truncate").examples(PAIRS, using(tokenizer), 30, train=True)[0]
    whole = ids(tokenizer, "rot blau")
    assert cut["labels"].tolist() == [*whole[:4], tokenizer.end_id]
    with pytest.raises(UserError, match="data.max_length=2 leaves no room for a token besides the 2 special ones"):
        Task().examples(PAIRS, using(tokenizer), 2, train=True)


def test_every_target_has_an_end():
    characters = train_tokenizer([" ".join(WORDS)], "char", 40)
    assert characters.special_count() == 0
    task = Task(target_length=6, overlong="truncate")
    first, second = (example["labels"].tolist() for example in task.examples(PAIRS, using(characters), 24, train=True))
    assert characters.decode(first[:5]) == "rot b" and first[5] == second[4] == characters.end_id
    assert np.array_equal(task.examples(PAIRS, using(characters), 24, train=True)[1]["label_weights"], [1, 1, 1, 1, 1, 0])


def test_packed_rows_tell_pairs_apart(tokenizer):
    task = Task(pack=True, target_length=20, packed_target_length=24)
    one = task.examples(PAIRS, using(tokenizer), 40, train=True)
    assert len(one) == 1
    row, (first, second) = one[0], ([ids(tokenizer, record[name]) for name in ("source", "target")] for record in PAIRS)
    assert row["input_ids"].tolist()[: row["attention_mask"].sum()] == first[0] + second[0]
    assert row["labels"].tolist()[: int(row["label_weights"].sum())] == first[1] + second[1]
    for name, (a, b) in {"": (first[0], second[0]), "decoder_": (first[1], second[1])}.items():
        assert row[f"{name}segment_ids"].tolist()[: len(a) + len(b)] == [1] * len(a) + [2] * len(b)
        assert row[f"{name}position_ids"].tolist()[: len(a) + len(b)] == [*range(len(a)), *range(len(b))]
    assert row["input_ids"].shape == (40,) and row["labels"].shape == (24,)
    counts = row["attention_mask"].sum() / 40, row["label_weights"].sum() / 24
    assert one.fill == {"input_ids": pytest.approx(counts[0]), "labels": pytest.approx(counts[1])}
    # In evaluation, an example is a pair.
    alone = task.examples(PAIRS, using(tokenizer), 40, train=False)
    assert len(alone) == 2 and set(alone[1]) == {"input_ids", "attention_mask", "labels", "label_weights"}
    assert alone[1]["labels"].shape == (20,)


def test_targets_of_packed_rows_are_as_long_as_the_data_have_them(tokenizer):
    many = Records([*PAIRS, {"source": "red", "target": "rot blau blau"}] * 20)
    examples = Task(pack=True, target_length=30).examples(many, using(tokenizer), 60, train=True)
    sizes = np.array([[len(ids(tokenizer, record[name])) for name in ("source", "target")] for record in many])
    assert examples[0]["labels"].size == pytest.approx(60 * sizes[:, 1].sum() / sizes[:, 0].sum(), rel=0.05)
    assert min(examples.fill.values()) > 0.8 and max(examples.fill.values()) - min(examples.fill.values()) < 0.06
    # Of several sources in a mixture, all have the length of the longest.
    short = Records([{"source": "red blue green", "target": "rot"}] * 20)
    packed = Task(pack=True, target_length=30)
    parts = {"a": examples, "b": packed.examples(short, using(tokenizer), 60, train=True), "c": SideBySide({"one": examples})}
    assert parts["b"].row_lengths[1] < examples.row_lengths[1]
    found = alike(parts)
    assert found["a"] is examples and found["c"] is parts["c"] and found["b"].row_lengths == examples.row_lengths
    assert found["b"][0]["labels"].shape == examples[0]["labels"].shape
    with pytest.raises(UserError, match="length=20: a row must have room for at least one target, task.target_length=30; raise"):
        Task(pack=True, target_length=30, packed_target_length=20)


def test_loss_and_predictions_agree(tokenizer):
    examples = Task(target_length=12).examples(PAIRS, using(tokenizer), 24, train=True)
    batch = {name: jnp.stack([example[name] for example in examples]) for name in examples[0]}
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, tokenizer.vocab_size)).astype(np.float32))
    task, smooth = Task(), Task(label_smoothing=0.2)
    weight = float(task.weights(batch)["lm"])
    assert weight == sum(len(ids(tokenizer, record["target"])) for record in PAIRS)
    arrays = {name: np.asarray(array) for name, array in smooth.predictions({"lm": logits}, batch).items()}
    loss = float(task.loss({"lm": logits}, batch)["lm"])
    assert arrays["losses"].sum() == pytest.approx(loss, rel=1e-5) and arrays["weights"].sum() == weight
    assert float(smooth.loss({"lm": logits}, batch)["lm"]) != pytest.approx(loss, rel=1e-3)
    found = Task(scores=()).metrics(arrays, np.ones(2), examples)
    assert found["loss"] == pytest.approx(loss / weight, rel=1e-5) and found["perplexity"] == pytest.approx(
        math.exp(loss / weight), rel=1e-5
    )


def generated(tokenizer: Tokenizer, *texts: str) -> np.ndarray:
    """Returns rows as generation gives them: a start token, the text, its end, padding."""
    rows = [[tokenizer.pad_id, *ids(tokenizer, text)] for text in texts]
    return np.array([row + [tokenizer.pad_id] * (30 - len(row)) for row in rows], np.int32)


def test_scores_of_what_was_generated(tokenizer):
    task = Task(scores=("bleu", "chrf", "exact_match"))
    examples = task.examples(PAIRS, using(tokenizer), 24, train=False)
    arrays = {name: np.ones(4, np.float32) for name in ("losses", "weights", "correct")}
    arrays["generated"] = generated(tokenizer, "rot blau", "rot", "red", "red")
    found = task.metrics(arrays, np.array([1, 1, 0, 0]), examples)
    assert set(found) == set(task.measures) and found["exact_match"] == 0.5 and 0 < found["chrf"] < 100
    assert set(task.signatures) == {"bleu", "chrf"} and "tok:13a" in task.signatures["bleu"]
    shown = task.details(arrays | {"losses": np.arange(4.0)}, np.array([1, 1, 0, 0]), examples)
    rows = [
        {"example": 1 + number, "source": record["source"], "reference": record["target"], "output": output}
        for number, (record, output) in enumerate(zip(PAIRS, ("rot blau", "rot"), strict=True))
    ]
    assert shown == {"worst": [rows[1] | {"loss": 1.0}, rows[0] | {"loss": 0.0}], "samples": rows}


def test_what_is_written_ends_at_the_end(tokenizer):
    row = generated(tokenizer, "rot blau")[0]
    assert written(row, tokenizer) == "rot blau"
    assert written(np.append(row, row[1:4]), tokenizer) == "rot blau"
    # Where the decoder begins with the end token, as in BART, that ends nothing; ids beyond the tokenizer's are no text.
    row[0] = tokenizer.end_id
    assert written(np.insert(row, 2, tokenizer.vocab_size + 3), tokenizer) == "rot blau"
    assert Task().describe({"generated": row[None]}, {}, using(tokenizer)) == [{"text": "rot blau"}]


def test_inputs_are_texts_or_records(tokenizer):
    task = Task(prefix="translate ")
    batch = task.inputs(["red", {"source": "blue"}], using(tokenizer), 30, "example {}".format)
    assert batch["input_ids"][0, : batch["attention_mask"][0].sum()].tolist() == ids(tokenizer, "translate red")
    assert set(batch) == {"input_ids", "attention_mask"}
    with pytest.raises(UserError, match='example 1: is not text; pass a string, or an object with a "source"'):
        task.inputs(["red", {"text": "blue"}], using(tokenizer), 30, "example {}".format)
    with pytest.raises(UserError, match="example 0: .* tokens exceed data.max_length=8"):
        task.inputs(["red blue"], using(tokenizer), 8, "example {}".format)


def test_generation_follows_the_settings():
    assert Task(num_beams=5, length_penalty=0.6).generation == {
        "max_new_tokens": 128, "num_beams": 5, "length_penalty": 0.6, "no_repeat_ngram_size": 0
    }  # fmt: skip
    assert Task(max_new_tokens=9).generation["max_new_tokens"] == 9
    assert Task().needs_generation and not Task(scores=()).needs_generation
    assert tuple(Task(source="a", target="b").reads) == ("a", "b")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"overlong": "cut"}, 'task.overlong="cut"'),
        ({"label_smoothing": 1.0}, "task.label_smoothing=1.0"),
        ({"target_length": 1}, "task.target_length=1"),
        ({"scores": ["blue"]}, 'did you mean "bleu"'),
        ({"bleu_tokenize": "14a"}, 'task.bleu_tokenize="14a"'),
        ({"beams": 3}, "task.beams is not a setting"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, named):
    with pytest.raises(UserError) as caught:
        make({"name": "seq2seq", **settings})
    assert named in str(caught.value)


def test_records_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(UserError, match=r'no column "targets" \(did you mean "target"\?\)'):
        Task(target="targets").resolve(PAIRS)
    with pytest.raises(UserError, match='pairs.tsv line 1: column "target" holds 3, not text'):
        Task().examples(Records([{"source": "a", "target": 3}]), using(tokenizer), 30, train=True)
