"""Causal language modelling: labels are the next tokens, evaluation reads every token once, and bits are bits."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from support.processors import using
from support.sources import MemoryRecords

from fmjax.data.stream.batches import TrainBatches, eval_batches
from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from fmjax.errors import UserError
from fmjax.inference.evaluate import evaluate
from fmjax.models import gpt
from fmjax.tasks import make
from fmjax.tasks.clm import Task

LETTERS = "abcdefgé日\n "
END = 1  # of the tokenizer of characters
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]


class Records(MemoryRecords):
    place, first = "poems.txt record", 1


def source(*texts: str) -> Records:
    return Records({"text": text} for text in texts)


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    return train_tokenizer([LETTERS], "char", 50)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Tokenizer:
    """A tokenizer without a special token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(LETTERS)}, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    path = tmp_path_factory.mktemp("bare") / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    """A BERT's tokenizer: [CLS] before a text, [SEP] behind it."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(BERT) + "\n")
    return load_tokenizer(folder)


def pieces(row: dict) -> list[tuple[list[int], list[int]]]:
    """Returns the inputs and the labels of each segment, after checking how they lie in the row."""
    segments, positions, filled = row["segment_ids"], row["position_ids"], int((row["segment_ids"] > 0).sum())
    assert (segments[:filled] > 0).all() and segments[0] == 1 and set(np.diff(segments[:filled])) <= {0, 1}
    assert row["label_weights"].tolist() == [1.0] * filled + [0.0] * (len(segments) - filled)
    assert not row["labels"][filled:].any() and not positions[filled:].any()
    found = []
    for segment in range(1, segments.max() + 1):
        here = segments == segment
        assert positions[here].tolist() == list(range(here.sum()))
        found.append((row["input_ids"][here].tolist(), row["labels"][here].tolist()))
    assert {name: array.dtype for name, array in row.items()} == {
        **dict.fromkeys(("input_ids", "segment_ids", "position_ids", "labels"), np.int32), "label_weights": np.float32,
    }  # fmt: skip
    return found


TEXTS = st.lists(st.text(st.sampled_from(LETTERS), max_size=30), min_size=1, max_size=6).filter(any)


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.integers(1, 24), st.booleans())
def test_packed_rows_predict_every_token_once(characters, texts, length, train):
    examples = Task().examples(source(*texts), using(characters), length, train=train)
    rows = [examples.draw(examples[index], np.random.default_rng(0)) for index in range(len(examples))]
    found = [piece for row in rows for piece in pieces(row)]
    documents = [[END, *ids.tolist(), END] for ids in characters.encode_batch(texts) if ids.size]
    cut = [document[at : at + length + 1] for document in documents for at in range(0, len(document) - 1, length)]
    assert sorted(inputs for inputs, _ in found) == sorted(piece[:-1] for piece in cut)
    assert sorted(labels for _, labels in found) == sorted(piece[1:] for piece in cut)
    assert all(len(inputs) == len(labels) <= length and inputs[1:] == labels[:-1] for inputs, labels in found)
    # A document is cut where it is longer than a row, and nowhere else.
    assert sum(len(inputs) for inputs, _ in found) == sum(len(document) - 1 for document in documents)
    assert len(found) == sum(math.ceil((len(document) - 1) / length) for document in documents)


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.integers(1, 24), st.integers(0, 99))
def test_offset_rows_are_of_one_long_text(characters, bare, texts, length, seed):
    for tokenizer, between in ((characters, [END]), (bare, [])):
        whole: list[int] = []
        for ids in tokenizer.encode_batch([text for text in texts if text]):
            whole += (between if whole else []) + ids.tolist()
        task = Task(rows="offset")
        if len(whole) == 1:
            with pytest.raises(UserError, match="none of [1-6] records has two tokens"):
                task.examples(source(*texts), using(tokenizer), length, train=True)
            continue
        evaluated = task.examples(source(*texts), using(tokenizer), length, train=False)
        rows = [evaluated.draw(evaluated[index], np.random.default_rng(seed)) for index in range(len(evaluated))]
        assert [ids for row in rows for _, labels in pieces(row) for ids in labels] == whole[1:]
        assert [ids for row in rows for inputs, _ in pieces(row) for ids in inputs] == whole[:-1]
        assert all(len(inputs) == length for row in rows[:-1] for inputs, _ in pieces(row))
        drawn = task.examples(source(*texts), using(tokenizer), length, train=True)
        assert len(drawn) == len(evaluated)
        row = drawn.draw(drawn[0], np.random.default_rng(seed))
        ((inputs, labels),) = pieces(row)
        span = min(length, len(whole) - 1)
        assert (inputs, labels) in [(whole[at : at + span], whole[at + 1 : at + 1 + span]) for at in range(len(whole) - span)]


def test_offsets_are_drawn_evenly_and_anew(characters):
    text = "".join(LETTERS[number % 7] for number in range(40)) + "é日é日é日é日"
    examples = Task(rows="offset").examples(source(text), using(characters), 8, train=True)
    ids = characters.encode_batch([text])[0]
    rng = np.random.default_rng(0)
    seen = [tuple(examples.draw(examples[0], rng)["input_ids"]) for _ in range(4000)]
    places = [next(at for at in range(40) if tuple(ids[at : at + 8]) == row) for row in set(seen)]
    # Of the 40 places, those a period apart look alike; the last is that of which the text's last token is a label.
    assert max(places) == 39 and len(set(seen)) == len({tuple(ids[at : at + 8]) for at in range(40)})
    assert seen.count(tuple(ids[39:47])) == pytest.approx(100, abs=50)
    batches = TrainBatches(examples, batch_size=4, seed=0)
    first, again = next(batches), next(TrainBatches(examples, batch_size=4, seed=0))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["input_ids"], next(batches)["input_ids"])


def test_documents_begin_and_end_as_the_tokenizer_says(words, bare, characters):
    def inputs(tokenizer: Tokenizer, rows: str) -> list[int]:
        examples = Task(rows=rows).examples(source("abc", "de"), using(tokenizer), 20, train=False)
        return [*examples[0]["input_ids"][examples[0]["segment_ids"] > 0], *examples[0]["labels"][examples[0]["segment_ids"] > 0]]

    unknown, begin, end = BERT.index("[UNK]"), BERT.index("[CLS]"), BERT.index("[SEP]")
    assert inputs(words, "packed") == [begin, unknown, begin, unknown, unknown, end, unknown, end]
    assert inputs(words, "offset") == [begin, unknown, end, begin, unknown, end, begin, unknown]
    a, b, c, d, e = characters.encode_batch(["abcde"])[0].tolist()
    assert inputs(characters, "packed") == [END, a, b, c, END, d, e, a, b, c, END, d, e, END]
    assert inputs(characters, "offset") == [a, b, c, END, d, b, c, END, d, e]
    assert inputs(bare, "packed") == [0, 1, 3, 1, 2, 4]


SIZE = {"width": 12, "layers": 1, "attention_heads": 2, "mlp_width": 16, "positions": 16}


@pytest.fixture(scope="module")
def logits(characters):
    """The logits of a small GPT, whose parameters, biases and norms included, are random and large enough to matter: a function
    of the arrays of four packed rows of 16, so that it is compiled once."""
    model = gpt.build(heads=Task().heads, vocab_size=characters.vocab_size, **SIZE)
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.one_row_batch())["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    apply = jax.jit(lambda batch: model.apply({"params": params}, batch)["lm"])
    return lambda batch: apply({name: batch[name] for name in ("input_ids", "segment_ids", "position_ids")})


def alone(logits, inputs: list[int]) -> np.ndarray:
    """Returns the logits of a text in a row of its own."""
    row = np.zeros((4, 16), np.int32)
    row[0, : len(inputs)] = inputs
    segments = np.arange(16)[None] < np.array([[len(inputs)], [0], [0], [0]])
    batch = {"input_ids": row, "segment_ids": segments.astype(np.int32), "position_ids": np.arange(16)[None].repeat(4, 0)}
    return np.asarray(logits(batch))[0, : len(inputs)]


def test_packed_documents_do_not_see_each_other(characters, logits):
    packed = Task().examples(source("abc", "gfe日"), using(characters), 16, train=False)
    assert len(packed) == 1
    together = np.asarray(logits({name: array[None].repeat(4, 0) for name, array in packed[0].items()}))[3]
    for number, (inputs, _) in enumerate(pieces(packed[0]), start=1):
        np.testing.assert_allclose(together[packed[0]["segment_ids"] == number], alone(logits, inputs), atol=1e-5)


@pytest.mark.parametrize("rows", ["packed", "offset"])
def test_metrics_are_those_of_all_tokens_at_once(characters, logits, rows):
    task = Task(rows=rows)
    texts = ["abcé日 gfe\n", "日", "aabbccddeeffgg" * 2, "é", "fgfgfgfgfg"]
    examples = task.examples(source(*texts), using(characters), 16, train=False)

    def predict(params, batch):
        return task.predictions({"lm": logits(batch)}, batch)

    found = evaluate(predict, task, {}, eval_batches(examples, batch_size=4, seed=0), examples)
    nats, count, right = 0.0, 0, 0
    for row in (examples[index] for index in range(len(examples))):
        for inputs, labels in pieces(row):
            scores = log_softmax(alone(logits, inputs).astype(np.float64), axis=-1)
            nats -= scores[np.arange(len(labels)), labels].sum()
            right += (scores.argmax(-1) == labels).sum()
            count += len(labels)
    letters, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
    assert count == letters + (5 if rows == "packed" else 4 - 1)  # ends; or what stands between, but for the first
    assert set(found) == set(task.measures) and size == letters + 6
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5) and found["accuracy"] == pytest.approx(right / count)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["bits_per_character"] == pytest.approx(nats / math.log(2) / letters, rel=1e-5)


def test_bits_of_a_uniform_model_are_those_of_its_vocabulary(characters):
    """Eight letters, each likely an eighth and one byte long, take three bits."""
    task, letters = Task(rows="offset"), "abcdefg "
    examples = task.examples(source(letters * 4), using(characters), 8, train=False)
    logits = jnp.full((1, 1, characters.vocab_size), -1e9).at[..., characters.encode_batch([letters])[0]].set(0.0)

    def predict(params, batch):
        return task.predictions({"lm": jnp.broadcast_to(logits, (*batch["labels"].shape, characters.vocab_size))}, batch)

    found = evaluate(predict, task, {}, eval_batches(examples, batch_size=2, seed=0), examples)
    assert found["bits_per_byte"] == pytest.approx(3 * 31 / 32) == found["bits_per_character"]
    assert found["perplexity"] == pytest.approx(8)


def test_the_loss_is_the_sum_over_real_labels(characters, logits):
    task = Task()
    batch = next(eval_batches(task.examples(source("abcdefg", "a日b"), using(characters), 16, train=True), batch_size=4, seed=0))
    outputs = {"lm": logits(batch)}
    loss, weight = task.loss(outputs, batch)["lm"], task.weights(batch)["lm"]
    other = batch | {"labels": np.where(batch["label_weights"] > 0, batch["labels"], 7)}
    assert float(task.loss(outputs, other)["lm"]) == float(loss)
    arrays = task.predictions(outputs, batch)
    assert float(weight) == batch["label_weights"].sum() == float(arrays["weights"].sum())
    assert float(loss) == pytest.approx(float(arrays["losses"].sum()), rel=1e-6)


def test_prompts_are_padded_on_the_left(characters, words, bare):
    a, b, c = characters.encode_batch(["abc"])[0].tolist()
    batch = Task(rows="offset").inputs(["abc", {"text": "b"}], using(characters), 8, "line {}".format)
    assert batch["input_ids"].tolist() == [[a, b, c], [0, 0, b]] and batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    # What training puts before a text stands before a prompt; nothing ends it.
    assert Task().inputs(["a", ""], using(characters), 8, str)["input_ids"].tolist() == [[END, a], [0, END]]
    assert Task(rows="offset").inputs([""], using(characters), 8, str)["input_ids"].tolist() == [[END]]
    assert Task().inputs(["a a"], using(words), 8, str)["input_ids"].tolist() == [
        [BERT.index("[CLS]"), BERT.index("a"), BERT.index("a")]
    ]
    assert Task().inputs(["b"], using(bare), 8, str)["input_ids"].tolist() == [[1]]
    for examples, tokenizer, message in (
        ([3], characters, 'line 0: is not text; pass a string, or an object with a "text"'),
        ([{"txt": "a"}], characters, "line 0: is not text"),
        (["a", "abcdefgabc"], characters, "line 1: has 11 tokens, more than the 8 that this model reads; shorten it"),
        ([""], bare, "line 0: is empty, and the tokenizer has no start token"),
    ):
        with pytest.raises(UserError, match=message):
            Task().inputs(examples, using(tokenizer), 8, "line {}".format)


def test_continuations_end_where_the_text_does(characters, bare):
    a, b, c = characters.encode_batch(["abc"])[0].tolist()
    made = np.array([[a, b, c, b], [b, END, 0, 0], [END, 0, 0, 0], [c, 2, a, 99]])
    prompts = {"input_ids": np.array([[c, END]] * 4)}
    outputs = {"generated": np.concatenate([prompts["input_ids"], made], axis=1)}
    assert Task().describe(outputs, prompts, using(characters)) == [{"text": text} for text in ("abcb", "b", "", "ca")]
    outputs = {"generated": np.array([[2, 0, 1, 0]])}
    assert Task().describe(outputs, {"input_ids": np.array([[2]])}, using(bare)) == [{"text": "aba"}]


def test_settings():
    assert make({"name": "clm"}).generation == {"max_new_tokens": 64, "num_beams": 1}
    drawn = {"do_sample": True, "temperature": 0.5, "top_k": 9, "top_p": 1.0}
    assert make({"name": "clm", "temperature": 0.5, "top_k": 9}).generation == {"max_new_tokens": 64, "num_beams": 1} | drawn
    json.dumps(Task().generation)
    for given_settings, message in (
        ({"rows": "ofset"}, r'task.rows="ofset" \(did you mean "offset"\?\): choose one of packed, offset'),
        ({"temperature": -1.0}, "task.temperature=-1.0: must not be negative"),
        ({"top": 1}, "task.top is not a setting"),
    ):
        with pytest.raises(UserError, match=message):
            make({"name": "clm"} | given_settings)
    with pytest.raises(UserError, match='no column "text"'):
        Task().resolve(Records([{"txt": "a"}]))
